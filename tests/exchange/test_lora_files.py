"""LoRA files of diffusers, peft and kohya become generator files that merge as peft merges."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.layouts import kohya_name, lora_keys
from icmsr_core.foreign.told import Told
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator
from icmsr_core.weights.tensor_files import read_tensors
from tests.support.foreign_files import Q, assert_merges_as, load_unet, targets, write_diffusers
from tests.support.merging import merged_part
from tests.support.sd_files import write_sd_folder

# The peers' own use of PEFT, several adapters on one network, is what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def test_a_diffusers_lora_as_diffusers_writes_it(base, trained, tmp_path):
    source = write_diffusers(trained, tmp_path / "lora")
    settings = ImportSettings(Told(timestep=250, prediction="v"), base)
    import_checkpoint("lora", source, tmp_path / "l.safetensors", settings)
    assert_merges_as(trained, base, tmp_path / "l.safetensors")
    info = load_generator(tmp_path / "l.safetensors").info
    assert (info.timestep, info.prediction, info.rank, info.alpha, info.family) == (250, "v", 4, 6, "sd21")
    trained.save_lora_adapter(tmp_path / "unprefixed", adapter_name="default", upcast_before_saving=False)
    import_checkpoint("lora", tmp_path / "unprefixed", tmp_path / "u.safetensors", settings)
    assert read_tensors(tmp_path / "u.safetensors")[0].keys() == read_tensors(tmp_path / "l.safetensors")[0].keys()
    assert_merges_as(trained, base, tmp_path / "u.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_as_peft_writes_it(base, tmp_path, rslora):
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "conv1"], use_rslora=rslora, init_lora_weights=False)
    wrapped = get_peft_model(load_unet(base), config)
    wrapped.save_pretrained(tmp_path / "peft")
    state = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in state)
    import_checkpoint("lora", tmp_path / "peft", tmp_path / "l.safetensors", ImportSettings(base=base))
    merged = merged_part(load_generator(tmp_path / "l.safetensors"), "unet", load_unet(base).state_dict())
    deltas = {
        name: module.base_layer.weight + module.get_delta_weight("default")
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(deltas) == len(merged)
    for name, expected in deltas.items():
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)
    (tmp_path / "peft/adapter_config.json").unlink()
    with pytest.raises(IcmsrError, match=r"adapter_config.json: missing, and .* needs it for its alpha"):
        import_checkpoint("lora", tmp_path / "peft", tmp_path / "l.safetensors", ImportSettings(base=base))


def kohya_tensors(base: Path, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """kohya's layout: attention of rank 4, convolutions of rank 2 with an alpha of their own."""
    random = torch.Generator().manual_seed(8)
    unet, tensors = load_unet(base), {}
    for name in targets(unet):
        weight = unet.get_submodule(name).weight
        rank = 4 if weight.ndim == 2 else 2
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=random) * 0.05
        ones = [1] * (weight.ndim - 2)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(weight.shape[0], rank, *ones, generator=random) * 0.05
        tensors[f"{stem}.alpha"] = torch.tensor(alpha if rank == 4 else 3.0)
    return tensors


def test_a_kohya_file_scales_each_lora_by_its_own_alpha(base, tmp_path):
    tensors = kohya_tensors(base)
    save_file(tensors, tmp_path / "kohya.safetensors")
    import_checkpoint("lora", tmp_path / "kohya.safetensors", tmp_path / "l.safetensors", ImportSettings(base=base))
    unet = load_unet(base)
    merged = merged_part(load_generator(tmp_path / "l.safetensors"), "unet", unet.state_dict())
    assert len(merged) == 258
    for name in targets(unet):
        stem, weight = "lora_unet_" + name.replace(".", "_"), unet.get_submodule(name).weight
        down, up = tensors[f"{stem}.lora_down.weight"].double(), tensors[f"{stem}.lora_up.weight"].double()
        scale = float(tensors[f"{stem}.alpha"]) / down.shape[0]
        expected = weight.double() + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_one_pixel_convolutions_and_linear_layers_are_taken_in_either_form(tmp_path):
    """SD1.5's proj_in is a convolution; trainers also write it as a linear layer, and linear layers as convolutions."""
    other = write_sd_folder(tmp_path / "sd15", "sd15", width_divisor=10)
    block = "lora_unet_down_blocks_0_attentions_0"
    shapes = {f"{block}_proj_in": (32, 32), f"{block}_transformer_blocks_0_attn1_to_q": (32, 32, 1, 1)}
    tensors = {}
    for stem, (out, into, *ones) in shapes.items():
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = (
            torch.randn(2, into, *ones),
            torch.randn(out, 2, *ones),
        )
    save_file(tensors, tmp_path / "kohya.safetensors")
    import_checkpoint("lora", tmp_path / "kohya.safetensors", tmp_path / "l.safetensors", ImportSettings(base=other))
    generator = load_generator(tmp_path / "l.safetensors")
    assert generator.info.family == "sd15"
    merged = merged_part(generator, "unet", open_base(other).unet_state())
    assert {key.rsplit(".", 2)[1]: value.ndim for key, value in merged.items()} == {"proj_in": 4, "to_q": 2}


def test_the_key_styles_lead_to_the_same_module():
    module, out = f"{Q[:-5]}.to_q", f"{Q[:-5]}.to_out.0"
    styles = {
        f"base_model.model.{module}.lora_A.weight": (module, "down"),
        f"base_model.model.{module}.lora_B.default.weight": (module, "up"),
        f"unet.{module}.lora_A.weight": (module, "down"),
        f"unet.{module}.lora.up.weight": (module, "up"),
        f"{module}.lora_linear_layer.down.weight": (module, "down"),
        f"unet.{Q[:-5]}.processor.to_out_lora.up.weight": (out, "up"),
        f"unet.{Q[:-5]}.to_out.0.lora_B.weight": (out, "up"),
        f"{kohya_name(out)}.lora_down.weight": (out, "down"),
        f"{kohya_name(module)}.alpha": (module, "alpha"),
    }
    assert lora_keys(styles, [module, out]) == (styles, [])


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


K = kohya_name(Q)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename(f"{K}.lora_up.weight", f"{K}x.lora_up.weight"), f"the UNet has no layer for {K}x.lora_up.weight"),
        (lambda tensors: tensors.pop(f"{K}.lora_up.weight"), f"{Q} has no up matrix"),
        (lambda tensors: tensors.pop(f"{K}.lora_down.weight"), f"{Q} has no down matrix"),
        (lambda tensors: tensors.update({"lora_te_text_model_x.alpha": torch.ones(())}), "holds no text encoder"),
        (lambda tensors: tensors.update({f"{K}.lora_mid.weight": torch.ones(1)}), f"{K}.lora_mid.weight"),
        (lambda tensors: tensors.update({f"{K}.dora_scale": torch.ones(1)}), f"{K}.dora_scale"),
        (lambda tensors: tensors[f"{K}.lora_up.weight"].fill_(math.inf), f"infinite values in {K}.lora_up.weight"),
        (lambda tensors: tensors.update({f"{K}.alpha": torch.zeros(())}), f"alpha of {Q} must be one positive"),
        (lambda tensors: tensors.update({f"{K}.alpha": torch.ones(2)}), f"alpha of {Q} must be one positive"),
        (lambda tensors: tensors.update({f"unet.{Q}.lora_A.weight": torch.ones(4, 32)}), "are both the down matrix"),
        (lambda tensors: tensors.update({f"{K}.lora_up.weight": torch.ones(32, 3)}), "are not a LoRA pair"),
        (lambda tensors: tensors.update({f"{K}.lora_up.weight": torch.ones(31, 4)}), f"unet.{Q}.weight [31, 32]"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_a_damaged_lora_is_refused_by_name(base, tmp_path, damage, message):
    tensors = kohya_tensors(base)
    damage(tensors)
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(IcmsrError) as caught:
        import_checkpoint("lora", tmp_path / "kohya.safetensors", tmp_path / "l.safetensors", ImportSettings(base=base))
    assert message in str(caught.value)
    assert not (tmp_path / "l.safetensors").exists()


def test_a_truncated_lora_another_family_and_a_missing_family_are_refused(base, tmp_path, capsys):
    source, dest = tmp_path / "kohya.safetensors", tmp_path / "l.safetensors"
    save_file(kohya_tensors(base), source)
    with pytest.raises(IcmsrError, match="give --family"):
        import_checkpoint("lora", source, dest)
    assert main(["import", "lora", str(source), str(dest), "--family", "sd15"]) == 1
    assert "does not fit this base model: unet." in capsys.readouterr().err
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(IcmsrError, match=r"not a readable \.safetensors"):
        import_checkpoint("lora", source, dest, ImportSettings(base=base))
    with pytest.raises(IcmsrError, match="timestep"):
        import_checkpoint("lora", source, dest, ImportSettings(Told(timestep=1000), base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.use_dora": True}, "use_dora must be False, got True"),
        ({"unet.r": 8}, "its configuration says 8"),
        ({"unet.lora_alpha": None}, "r and lora_alpha must be positive"),
        ({"unet.alpha_pattern": {"conv_out": -1}}, "alpha of conv_out must be a positive"),
        ({"unet.alpha_pattern": {"(": 1}}, "is not a regular expression"),
    ],
)
def test_a_configuration_that_cannot_be_kept_is_refused(base, trained, tmp_path, change, message):
    path = write_diffusers(trained, tmp_path / "lora") / "pytorch_lora_weights.safetensors"
    tensors, metadata = read_tensors(path)
    config = {**json.loads(metadata["lora_adapter_metadata"]), **change}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(IcmsrError, match=message):
        import_checkpoint("lora", path, tmp_path / "l.safetensors", ImportSettings(base=base))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_in_eight_bits_is_read_as_its_values(base, tmp_path, dtype):
    eight = {key: value.to(dtype) for key, value in kohya_tensors(base).items()}
    save_file(eight, tmp_path / "eight.safetensors")
    save_file({key: value.float() for key, value in eight.items()}, tmp_path / "plain.safetensors")
    for name in ("eight", "plain"):
        source, made = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_made.safetensors"
        import_checkpoint("lora", source, made, ImportSettings(base=base))
    found, wanted = (read_tensors(tmp_path / f"{name}_made.safetensors")[0] for name in ("eight", "plain"))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key].float(), value), key


def test_a_lora_of_whole_numbers_is_refused(base, tmp_path):
    tensors = {key: value.to(torch.int8) for key, value in kohya_tensors(base).items()}
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(IcmsrError, match=r"int8\.safetensors: whole numbers \(torch\.int8\) in .* a quantised LoRA"):
        import_checkpoint("lora", tmp_path / "int8.safetensors", tmp_path / "x.safetensors", ImportSettings(base=base))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_none_are_refused(base, tmp_path, key):
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {f"base_model.model.{Q}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, key: 3}), "utf-8")
    with pytest.raises(IcmsrError, match=rf"adapter_config\.json: {key} must be a JSON object, got 3"):
        import_checkpoint("lora", folder, tmp_path / "l.safetensors", ImportSettings(base=base))
