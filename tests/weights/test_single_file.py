"""Bases from a checkpoint in one file, in the original layout."""

import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from icmsr_core.cli.inspection import file_report
from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import Picture, read_picture, write_picture
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.precision import PRECISIONS
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import BaseInfo, open_base
from icmsr_core.weights.generator_file import PartWeights, save_generator
from icmsr_core.weights.sd_families import SD_VAE_WIDTHS, SD_WIDTHS, sd_unet_config, sd_vae_config
from icmsr_core.weights.single_file import diffusers_name
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.merging import merged_part
from tests.support.model_files import write_base, write_generator
from tests.support.sd_files import (
    CONTEXT_WIDTH,
    ORIGINAL_PREFIX,
    lora_everywhere,
    original_name,
    shapes_of,
    unet_config,
    vae_config,
    write_sd_checkpoint,
    write_sd_folder,
)

UNET, VAE = ORIGINAL_PREFIX["unet"], ORIGINAL_PREFIX["vae"]

FAMILIES = ("sd15", "sd21")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """The family, and the same narrow model as a folder and as a file."""
    root = tmp_path_factory.mktemp(request.param)
    return (
        request.param,
        write_sd_folder(root / "folder", request.param, 10),
        write_sd_checkpoint(root / "model.safetensors", request.param, 10),
    )


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory) -> Path:
    return write_sd_folder(tmp_path_factory.mktemp("narrow") / "narrow", "sd21", 10, torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_and_shape_of_the_published_size(family: str) -> None:
    """The shipped configurations give the published networks, and every one of their tensors has its place."""
    shipped = {
        "unet": sd_unet_config(SD_WIDTHS, CONTEXT_WIDTH[family], family == "sd21"),
        "vae": sd_vae_config(SD_VAE_WIDTHS),
    }
    for part, published, count in (("unet", unet_config(family), 686), ("vae", vae_config(), 248)):
        shapes = shapes_of(part, published)
        assert len(shapes) == count
        assert shapes_of(part, shipped[part]) == shapes
        originals = {original_name(part, key): key for key in shapes}
        assert len(originals) == count
        assert {diffusers_name(part, name): key for name, key in originals.items()} == {key: key for key in shapes}
        other = "vae" if part == "unet" else "unet"
        assert all(diffusers_name(other, name) is None for name in originals)
        for key, value in published.items():
            assert key.startswith("_") or shipped[part].get(key, value) == value, key
    assert shipped["unet"]["attention_head_dim"] == ([5, 10, 20, 20] if family == "sd21" else 8)
    assert shipped["vae"]["scaling_factor"] == 0.18215


@pytest.mark.parametrize(
    ("part", "original", "name"),
    [  # read off the published files
        ("unet", "model.diffusion_model.input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
        (
            "unet",
            "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
            "down_blocks.1.resnets.0.conv_shortcut.weight",
        ),
        ("unet", "model.diffusion_model.middle_block.2.emb_layers.1.bias", "mid_block.resnets.1.time_emb_proj.bias"),
        ("unet", "model.diffusion_model.output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("unet", "model.diffusion_model.output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        (
            "unet",
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight",
        ),
        ("vae", "first_stage_model.decoder.up.0.block.2.norm1.weight", "decoder.up_blocks.3.resnets.2.norm1.weight"),
        ("vae", "first_stage_model.decoder.up.3.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
        (
            "vae",
            "first_stage_model.encoder.mid.attn_1.proj_out.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
        ),
        ("vae", "first_stage_model.encoder.norm_out.bias", "encoder.conv_norm_out.bias"),
        ("vae", "first_stage_model.quant_conv.weight", "quant_conv.weight"),
        ("vae", "first_stage_model.loss.logvar", None),
        ("unet", "model_ema.diffusion_modelinput_blocks00weight", None),
        ("unet", "cond_stage_model.model.token_embedding.weight", None),
        ("unet", "model.diffusion_model.input_blocks.1.0.in_layers.9.weight", "input_blocks.1.0.in_layers.9.weight"),
    ],
)
def test_original_names_have_their_diffusers_names(part: str, original: str, name: str | None) -> None:
    assert diffusers_name(part, original) == name


def test_diffusers_own_conversion_agrees(pair) -> None:
    _, _, file = pair
    base, raw = open_base(file), load_file(file)
    for part, state, expected in (
        ("unet", base.unet_state(), convert_ldm_unet_checkpoint(dict(raw), dict(base.unet_config))),
        (
            "vae",
            base.vae_state(),
            convert_ldm_vae_checkpoint(
                {key: value for key, value in raw.items() if "loss" not in key}, dict(base.vae_config)
            ),
        ),
    ):
        assert state.keys() == expected.keys(), part
        assert all(torch.equal(value, expected[key]) for key, value in state.items()), part


def test_folder_and_file_hold_the_same_tensors(pair) -> None:
    family, folder, file = pair
    base = open_base(file)
    assert base.info == BaseInfo(f"random {family}", family, licence="CC0-1.0")
    assert base.prompt_embedding() is None
    for part in ("unet", "vae"):
        for dtype in (torch.float32, torch.bfloat16):
            ours, expected = dict(base.tensors(part, dtype)), dict(open_base(folder).tensors(part, dtype))
            assert ours.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in ours.items())


def test_folder_and_file_compute_the_same(pair, tmp_path) -> None:
    """With LoRA on every matrix: encode, one UNet pass and decode, bitwise."""
    _, folder, file = pair
    generator = lora_everywhere(open_base(file))
    one, two = load_backbone(Recipe(folder, generator)), load_backbone(Recipe(file, generator))
    assert one.unet.config.attention_head_dim == two.unet.config.attention_head_dim
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = [backbone.encode(image) for backbone in (one, two)]
        outputs = [backbone.predict_noise(latents[0], 999) for backbone in (one, two)]
        pictures = [backbone.decode(latents[0]) for backbone in (one, two)]
    for first, second in (latents, outputs, pictures):
        assert torch.equal(first, second)
    with torch.no_grad():
        plain = load_backbone(Recipe(folder, replace(generator, unet=PartWeights())))
        assert not torch.equal(plain.predict_noise(latents[0], 999), outputs[0])


def test_the_command_line_takes_a_file(tmp_path, narrow: Path, narrow_folder: Path, capsys) -> None:
    generator, source = tmp_path / "generator.safetensors", tmp_path / "in.png"
    save_generator(generator, lora_everywhere(open_base(narrow)))
    write_picture(source, Picture(rgb=torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)).numpy()))
    results = []
    for base in (narrow, narrow_folder):
        target = tmp_path / f"{base.name}.png"
        run = ["upscale", str(source), str(target), "--base", str(base), "--model", str(generator), "--dtype", "bf16"]
        assert main(run) == 0, capsys.readouterr().err
        results.append(read_picture(target).rgb)
    assert results[0].shape == (64, 64, 3)
    assert (results[0] == results[1]).all()


def test_inspect_tells_what_a_file_holds(narrow: Path) -> None:
    text = file_report(narrow)
    assert "base, a checkpoint in one file" in text
    assert re.search(r"family +sd21", text)
    assert re.search(r"latent +4 channels, 1 cell per 8 px", text)


def test_attention_that_is_already_linear_is_read_too(tmp_path, narrow: Path) -> None:
    """As some tools save it."""
    state = load_file(narrow)
    state = {k: v[:, :, 0, 0].contiguous() if ".attn_1." in k and v.ndim == 4 else v for k, v in state.items()}
    own = {"format": "icmsr-base", "icmsr": '{"name": "n", "family": "sd21"}'}
    save_file(state, tmp_path / "linear.safetensors", metadata=own)
    expected = open_base(narrow).vae_state()
    found = open_base(tmp_path / "linear.safetensors").vae_state()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fidelity", [None, 0.0, 0.4, 1.0])
def test_merging_one_by_one_is_merging_at_once(tmp_path, dtype: str, fidelity: float | None) -> None:
    """In float32 and cast afterwards, bitwise; both sets, LoRA and whole tensors."""
    from icmsr_core.weights.generator_file import load_generator

    folder = write_base(tmp_path / "base")
    generator = load_generator(write_generator(folder / "generator.safetensors", folder, two_sets=True))
    backbone = load_backbone(Recipe(folder, generator, dtype=dtype, fidelity=fidelity))
    base = open_base(folder)
    for network, part, state in ((backbone.unet, "unet", base.unet_state()), (backbone.vae, "vae", base.vae_state())):
        expected = {**state, **merged_part(generator.at_fidelity(fidelity), part, state)}
        found = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key].to(PRECISIONS[dtype])) for key, value in found.items())


def test_what_does_not_fit_is_said_before_weights_are_read(narrow: Path, monkeypatch) -> None:
    generator = lora_everywhere(open_base(narrow))
    vae = PartWeights(tensors={"encoder.attic.weight": torch.ones(3)})
    monkeypatch.setattr("icmsr_core.weights.base.BaseFolder.tensors", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(IcmsrError, match=r"does not fit this base model: vae\.encoder\.attic\.weight \[3\]"):
        load_backbone(Recipe(narrow, replace(generator, vae=vae)))


@pytest.mark.parametrize(
    ("keys", "metadata", "text"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], {}, "a LoRA, not a base"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], {}, "a LoRA, not a base"),
        (["first_stage_model.encoder.conv_in.weight"], {}, "a VAE alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], {}, "a VAE alone"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], {}, "a diffusers UNet alone: name the folder"),
        (["adapter.conv_in.weight"], {}, "a T2I-Adapter"),
        (["body.0.block1.weight"], {}, "a T2I-Adapter"),
        (["unet.conv_in.weight"], {"format": "icmsr-generator"}, "a generator file, .*use it as the generator"),
        (["conditioner.embedders.1.model.positional_embedding"], {}, "a checkpoint of SDXL"),
        (["model.diffusion_model.double_blocks.0.img_attn.proj.weight"], {}, "a model of another kind"),
        (["double_blocks.0.img_attn.proj.weight"], {}, "not a Stable Diffusion checkpoint: no key b"),
    ],
)
def test_files_that_are_not_a_base_are_refused(tmp_path, keys: list[str], metadata: dict, text: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path, metadata=metadata)
    with pytest.raises(IcmsrError, match=rf"model\.safetensors: {text}.*a base is a diffusers folder or a full"):
        open_base(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unread(tmp_path, name: str, zipped: bool, capsys) -> None:
    path, mark = tmp_path / name, tmp_path / "executed"
    if zipped:
        torch.save({"state_dict": HostileValue(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": HostileValue(mark)}))
    with pytest.raises(IcmsrError, match=rf"{name}: a pickled checkpoint, which can run code .*choose the \.saf"):
        open_base(path)
    assert_runs_code(path, mark)
    source = tmp_path / "in.png"
    write_picture(source, Picture(rgb=torch.zeros(8, 8, 3).numpy()))
    assert main(["upscale", str(source), str(tmp_path / "out.png"), "--base", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"icmsr: error: {path}: a pickled checkpoint")


def test_damaged_files_are_refused(tmp_path, narrow: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(narrow.read_bytes()[:-100])
    with pytest.raises(IcmsrError, match=r"cut\.safetensors: not a readable \.safetensors file"):
        open_base(path)
    path.write_bytes(b"")
    with pytest.raises(IcmsrError, match=r"cut\.safetensors: not a readable \.safetensors file"):
        open_base(path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(IcmsrError, match=r"notes\.txt: neither a base folder nor a \.safetensors checkpoint"):
        open_base(tmp_path / "notes.txt")


def rewrite(source: Path, target: Path, change) -> Path:
    state = load_file(source)
    change(state)
    save_file(state, target, metadata={"format": "icmsr-base", "icmsr": '{"name": "n", "family": "sd21"}'})
    return target


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{UNET}middle_block.0.in_layers.2.weight", math.nan),
        (f"{UNET}time_embed.0.bias", -math.inf),
        (f"{VAE}decoder.mid.attn_1.q.bias", math.inf),
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path, narrow: Path, key: str, value: float) -> None:
    path = rewrite(narrow, tmp_path / "bad.safetensors", lambda state: state[key].view(-1)[3:4].fill_(value))
    with pytest.raises(IcmsrError, match=rf"bad\.safetensors: NaN or infinite values in {key}"):
        build_networks(open_base(path))


def test_missing_and_surplus_tensors_are_named(tmp_path, narrow: Path) -> None:
    lacking = rewrite(narrow, tmp_path / "a.safetensors", lambda state: state.pop(f"{UNET}out.0.bias"))
    with pytest.raises(IcmsrError, match=r"a\.safetensors \(unet\): the weights do not .*Missing.*conv_norm_out\.b"):
        build_networks(open_base(lacking))
    extra = {f"{UNET}input_blocks.12.7.x": torch.ones(1)}
    surplus = rewrite(narrow, tmp_path / "b.safetensors", lambda state: state.update(extra))
    with pytest.raises(IcmsrError, match=r"Unexpected key.*input_blocks\.12\.7\.x"):
        build_networks(open_base(surplus))


@pytest.mark.parametrize("description", ["{", "[]", '{"name": "x"}', '{"name": "x", "family": "sd21", "steps": 0}'])
def test_a_damaged_description_is_refused(tmp_path, narrow: Path, description: str) -> None:
    path = tmp_path / "own.safetensors"
    save_file(load_file(narrow), path, metadata={"format": "icmsr-base", "icmsr": description})
    with pytest.raises(IcmsrError, match=r"own\.safetensors: .*description|at least 1 step"):
        open_base(path)


def test_the_extension_may_be_in_capitals(tmp_path, narrow: Path) -> None:
    loud = tmp_path / "NARROW.SAFETENSORS"
    loud.write_bytes(narrow.read_bytes())
    assert open_base(loud).hash() == open_base(narrow).hash()
