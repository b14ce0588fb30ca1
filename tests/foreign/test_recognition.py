"""What a foreign file is told from, what is refused and why, and that no container's code runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.foreign.containers import PICKLED
from icmsr_core.foreign.conversion import load_any_generator
from icmsr_core.foreign.told import Told
from tests.support.foreign_files import Q, hypir_checkpoint
from tests.support.hostile_pickle import HostileValue, assert_runs_code

LORA = {f"unet.{Q}.lora_A.weight": torch.ones(4, 320), f"unet.{Q}.lora_B.weight": torch.ones(320, 4)}
S3DIFF = {
    **{f"{name}_lora_target_modules": ["to_q"] for name in ("unet", "vae")},
    "rank_unet": 32,
    "rank_vae": 16,
    "w": torch.ones(3),
    **{f"state_{name}": {} for name in ("dict_unet", "dict_vae", "dict_unet_de_mlp", "dict_vae_de_mlp", "embeddings")},
}
TADSR = {
    **{f"unet_lora_{group}_modules": ["x"] for group in ("encoder", "decoder", "others")},
    "vae_lora_encoder_modules": ["x"],
    "rank_unet": 4,
    "rank_vae": 4,
    **{f"state_dict_{name}": {} for name in ("unet", "vae", "vae_time")},
}


def load(path: Path, told: Told | None = None):
    return load_any_generator(path, told or Told())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (S3DIFF, "this is S3Diff, which cannot work: its LoRA changes with each picture"),
        (TADSR, "this is TADSR, which cannot work: its VAE depends on the time"),
    ],
)
def test_the_relatives_that_cannot_work_are_refused_by_name(tmp_path, values, words):
    torch.save(values, tmp_path / "x.pkl")
    with pytest.raises(IcmsrError, match=words) as caught:
        load(tmp_path / "x.pkl", Told("sd21", 999, "eps"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        ["lora_unet_input_blocks_7_1_transformer_blocks_3_attn1_to_q.lora_down.weight"],
        ["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
        ["unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight"],
        ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"],
    ],
)
def test_a_lora_of_sdxl_is_refused_for_what_it_is(tmp_path, keys):
    save_file(dict.fromkeys(keys, torch.ones(4, 2048)), tmp_path / "xl.safetensors")
    with pytest.raises(IcmsrError, match="this is a LoRA of SDXL, which cannot work"):
        load(tmp_path / "xl.safetensors", Told("sd21", 999, "eps"))


@pytest.mark.parametrize("suffix", [".safetensors", *PICKLED])
def test_a_lora_runs_when_all_three_are_told_and_in_every_container(tmp_path, suffix):
    path = tmp_path / f"lora{suffix}"
    write = save_file if suffix == ".safetensors" else torch.save
    write(LORA, path)
    for told, missing in (
        (Told(), "family, timestep, prediction"),
        (Told("sd21", prediction="eps"), "timestep"),
        (Told(timestep=999, prediction="eps"), "family"),
    ):
        with pytest.raises(IcmsrError, match=f"say what its authors trained: {missing} "):
            load(path, told)
    generator, found = load(path, Told("sd21", 399, "v"))
    assert (
        found == "found a LoRA of a UNet: rank 4 on 1 modules of the UNet; sd21, v at timestep 399; licence: not stated"
    )
    assert (generator.info.timestep, generator.info.prediction) == (399, "v")
    assert torch.equal(generator.unet.lora[Q].down, LORA[f"unet.{Q}.lora_A.weight"])


def test_a_wrapped_state_dict_is_read_and_other_files_are_named(tmp_path):
    torch.save({"state_dict": LORA}, tmp_path / "wrapped.pt")
    assert load(tmp_path / "wrapped.pt", Told("sd21", 999, "eps"))[0].unet.lora.keys() == {Q}
    for values, words in (
        ({"first_stage_model.x": torch.ones(1)}, "it holds a VAE alone"),
        ({"something": torch.ones(1)}, "it holds entries such as something"),
    ):
        torch.save(values, tmp_path / "x.pth")
        with pytest.raises(IcmsrError, match=words):
            load(tmp_path / "x.pth")
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(IcmsrError, match=r"ends in \.safetensors, \.pkl, \.pth, \.pt, \.bin"):
        load(tmp_path / "x.onnx")


def test_a_lora_saved_as_hypir_saves_is_no_hypir_when_it_has_few_of_its_modules(tmp_path, shapes):
    """A PEFT network's own names, without a prefix, are no proof."""
    attention = {key: value for key, value in hypir_checkpoint(shapes["unet"], 4).items() if ".attn1.to_" in key}
    torch.save(attention, tmp_path / "x.pth")
    with pytest.raises(IcmsrError, match="a LoRA of which nothing else is known"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", PICKLED)
@pytest.mark.parametrize("place", ["entry", "tensor"])
def test_no_code_in_a_container_runs(tmp_path, suffix, place):
    mark, path = tmp_path / "touched", tmp_path / f"evil{suffix}"
    evil = (
        {**LORA, "more": HostileValue(mark)} if place == "entry" else {**S3DIFF, "state_dict_unet": HostileValue(mark)}
    )
    torch.save(evil, path)
    assert_runs_code(path, mark)
    with pytest.raises(IcmsrError, match="refused, and no code in it was run"):
        load(path, Told("sd21", 999, "eps"))
    assert not mark.exists()
