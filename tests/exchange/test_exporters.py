"""Generators leave as LoRA files that others read, and come back exactly."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.exporters import export_generator
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.layouts import kohya_name
from icmsr_core.weights.generator_file import load_generator, save_generator
from icmsr_core.weights.tensor_files import read_tensors
from tests.support.foreign_files import PEFT_ALPHA, assert_merges_as, full_size_checkpoint, load_unet, write_diffusers
from tests.support.model_files import random_generator

# The peers' own use of PEFT, several adapters on one network, is what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@pytest.fixture(scope="module")
def generator_file(base, trained, tmp_path_factory) -> Path:
    """A generator with LoRA alone, of two ranks, alpha 6 everywhere."""
    folder = tmp_path_factory.mktemp("generator")
    path = folder / "generator.safetensors"
    import_checkpoint("lora", write_diffusers(trained, folder / "lora"), path, ImportSettings(base=base))
    return path


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_generator_comes_back_exactly(base, generator_file, tmp_path, form, dtype):
    first = tmp_path / "first.safetensors"
    save_generator(first, load_generator(generator_file), dtype)
    there = tmp_path / ("there" if form == "diffusers" else "there.safetensors")
    assert export_generator(form, first, there).modules == 258
    import_checkpoint("lora", there, tmp_path / "back.safetensors", ImportSettings(base=base))
    before, after = load_generator(first), load_generator(tmp_path / "back.safetensors")
    assert (after.info.rank, after.info.alpha) == (before.info.rank, before.info.alpha)
    assert after.unet.lora.keys() == before.unet.lora.keys()
    for module, pair in before.unet.lora.items():
        assert all(torch.equal(got, sent) for got, sent in zip(after.unet.lora[module], pair))
        assert after.unet.lora[module].up.dtype == dtype


def test_diffusers_loads_the_folder_with_its_alpha(base, generator_file, tmp_path):
    export_generator("diffusers", generator_file, tmp_path / "lora")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path / "lora", return_lora_metadata=True)
    unet = load_unet(base)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name="default", metadata=metadata)
    assert_merges_as(unet, base, generator_file)


def test_two_sets_are_exported_as_one_lora(tmp_path, capsys):
    from icmsr_core.weights.embedded import embedded_base

    generator = random_generator(embedded_base(), two_sets=True)
    save_generator(tmp_path / "g.safetensors", generator, torch.float32)
    arguments = ["export", "comfyui", str(tmp_path / "g.safetensors"), str(tmp_path / "l.safetensors")]
    assert main([*arguments, "--fidelity", "0.5"]) == 0
    out = capsys.readouterr().out
    for lost in ("timestep", "conv_in.weight", "VAE's LoRA", "prompt embedding"):
        assert lost in out.splitlines()[1]
    tensors = load_file(tmp_path / "l.safetensors")
    modules = dict.fromkeys([*generator.unet.lora, *generator.realistic["unet"].lora])
    assert len(tensors) == 3 * len(modules)
    for module in modules:
        expected = 0
        for pair, alpha in (
            (generator.unet.lora.get(module), generator.info.alpha),
            (generator.realistic["unet"].lora.get(module), 0.5 * generator.info.realistic_alpha),
        ):
            if pair is not None:
                expected = expected + alpha / pair.down.shape[0] * pair.up.flatten(1) @ pair.down.flatten(1)
        stem = kohya_name(module)
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        scale = tensors[f"{stem}.alpha"] / down.shape[0]
        torch.testing.assert_close(scale * up.flatten(1) @ down.flatten(1), expected, atol=1e-6, rtol=1e-5)
    assert main(arguments) == 0  # fidelity 1 unless told
    assert main([*arguments, "--fidelity", "0"]) == 0
    assert len(load_file(tmp_path / "l.safetensors")) == 3 * len(generator.unet.lora)


def test_what_cannot_be_exported_is_refused(generator_file, tmp_path):
    from icmsr_core.weights.embedded import embedded_base

    with pytest.raises(IcmsrError, match="fidelity needs a generator with"):
        export_generator("diffusers", generator_file, tmp_path / "lora", fidelity=0.5)
    with pytest.raises(IcmsrError, match="is a file, but diffusers stores a LoRA as a folder"):
        export_generator("diffusers", generator_file, generator_file)
    with pytest.raises(IcmsrError, match="format must be one of diffusers, comfyui"):
        export_generator("kohya", generator_file, tmp_path / "l.safetensors")
    generator = random_generator(embedded_base())
    whole = type(generator)(generator.info, type(generator.unet)({}, generator.unet.tensors), generator.vae)
    save_generator(tmp_path / "whole.safetensors", whole)
    with pytest.raises(IcmsrError, match="has no LoRA for the UNet"):
        export_generator("comfyui", tmp_path / "whole.safetensors", tmp_path / "l.safetensors")


def test_notes_stand_in_the_description_only_where_there_are_some(generator_file, tmp_path):
    assert "holds no prompt: bring one" in load_generator(generator_file).info.notes
    from icmsr_core.weights.embedded import embedded_generator

    save_generator(tmp_path / "g.safetensors", load_generator(embedded_generator()))
    assert "notes" not in json.loads(read_tensors(tmp_path / "g.safetensors")[1]["icmsr"])


CORE_SCRIPT = """
import sys, json, logging
sys.path.insert(0, sys.argv[1]); path = sys.argv[2]; sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.lora, comfy.model_base, comfy.supported_models, comfy.utils
config = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
          "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
          "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": True,
          "context_dim": 1024, "num_head_channels": 64, "adm_in_channels": None, "use_temporal_attention": False,
          "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}
known = comfy.supported_models.SD20(config)
known.set_inference_dtype(torch.float32, None)
model = comfy.model_base.BaseModel(known, device=torch.device("meta"))
lora = comfy.utils.load_torch_file(path, safe_load=True)
patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
state = model.state_dict()
rows = {}
for key, adapter in patches.items():
    up, down, alpha = adapter.weights[:3]
    assert up.shape[0] == state[key].shape[0] and down.shape[1:] == state[key].shape[1:], key
    rows[key] = alpha
values = {}
for key in ("input_blocks.0.0.weight", "output_blocks.3.1.proj_in.weight"):
    key = f"diffusion_model.{key}"
    start = torch.zeros(state[key].shape)
    values[key] = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], start, key).sum().item()
loaded = set().union(*(adapter.loaded_keys for adapter in patches.values()))
alphas = {key for key in lora if key.endswith(".alpha")}
print(json.dumps({"modules": len(patches), "alphas": sorted(set(rows.values())),
                  "left": sorted(set(lora) - loaded - alphas)[:5], "values": values}))
"""


@pytest.mark.comfy
def test_comfyui_cores_own_loader_takes_every_module(comfyui, comfy_python, tmp_path):
    checkpoint = full_size_checkpoint()
    state = checkpoint["state_dict_unet"]
    for module, adapter in (("conv_in", "default_encoder"), ("up_blocks.1.attentions.0.proj_in", "default_decoder")):
        state[f"{module}.lora_A.{adapter}.weight"].fill_(0.5)
        state[f"{module}.lora_B.{adapter}.weight"].fill_(0.25)
    torch.save(checkpoint, tmp_path / "osediff.pkl")
    import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors")
    exported = export_generator("comfyui", tmp_path / "o.safetensors", tmp_path / "l.safetensors")
    assert exported.modules == 258
    arguments = [comfy_python, "-c", CORE_SCRIPT, comfyui, exported.path]
    run = subprocess.run([str(entry) for entry in arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    sums = report.pop("values")
    assert report == {"modules": 258, "alphas": [8.0], "left": []}
    expected = [PEFT_ALPHA * 0.5 * 0.25 * 320 * 4 * 9, PEFT_ALPHA * 0.5 * 0.25 * 1280 * 1280]  # rank 1
    assert list(sums.values()) == pytest.approx(expected)
