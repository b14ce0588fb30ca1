"""T2I-Adapters of every public layout: what the files say, and their features in ComfyUI against diffusers."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import MultiAdapter, T2IAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.adapters import save_adapter
from icmsr_core.train.networks.bases import NetworkConfig
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import pad_to_multiple
from icmsr_core.weights.adapter_layouts import read_adapter
from icmsr_core.weights.base import open_base, write_base_info
from icmsr_core.weights.generator_file import save_generator
from tests.support.comfy_harness import run_script
from tests.support.hostile_pickle import HostileValue
from tests.support.model_files import random_generator, write_base, write_generator

TOLERANCE = 1e-5
WIDTHS = [32, 64, 128, 128]
"""Levels as in Stable Diffusion, at a tenth of its widths."""


def make(channels: int, kind: str = "full_adapter", factor: int = 8, widths: list[int] = WIDTHS) -> T2IAdapter:
    """A diffusers T2IAdapter with random weights; a light one names a level less than it has."""
    torch.manual_seed(channels + factor)
    named = widths[:-1] if kind == "light_adapter" else widths
    blocks = 4 if kind == "light_adapter" else 2
    return T2IAdapter(channels, named, blocks, factor, kind).requires_grad_(False)


def tencent_names(adapter: T2IAdapter) -> dict[str, Tensor]:
    """The weights under the names of TencentARC's code, where the blocks of a full adapter are one list."""
    renamed = {}
    for key, value in adapter.state_dict().items():
        new = key.removeprefix("adapter.")
        if adapter.config.adapter_type == "light_adapter":
            new = new.replace(".resnets.", ".body.")
        elif found := re.fullmatch(r"body\.(\d)\.resnets\.(\d)\.(.*)", new):
            new = f"body.{2 * int(found[1]) + int(found[2])}.{found[3]}"
        elif found := re.fullmatch(r"body\.(\d)\.in_conv\.(.*)", new):
            new = f"body.{2 * int(found[1])}.in_conv.{found[2]}"
        renamed[new] = value.clone()
    return renamed


def write_ours(path: Path, adapter: T2IAdapter) -> None:
    save_adapter(path.with_suffix(""), adapter, {"family": "nano"}, torch.float32)


def write_folder(path: Path, adapter: T2IAdapter) -> None:
    adapter.save_pretrained(path.parent, safe_serialization=path.suffix == ".safetensors")
    assert path.is_file()


def write_bare(path: Path, adapter: T2IAdapter) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapter.state_dict(), path)


def write_tencent(path: Path, adapter: T2IAdapter) -> None:
    if path.suffix == ".safetensors":
        save_file(tencent_names(adapter), path)
    else:
        torch.save(tencent_names(adapter), path)


class Case(NamedTuple):
    """One adapter file: its name, what writes it, and the adapter."""

    file: str
    write: Callable[[Path, T2IAdapter], None]
    adapter: T2IAdapter


def cases() -> dict[str, Case]:
    found = {
        "ours": Case("ours.safetensors", write_ours, make(4)),
        "ours at factor 4": Case("ours 4.safetensors", write_ours, make(4, factor=4, widths=[64, 128])),
        "edges at factor 4": Case("edges 4.safetensors", write_ours, make(1, factor=4, widths=[64, 128])),
        "light at factor 4": Case(
            "light 4/diffusion_pytorch_model.safetensors", write_folder, make(4, "light_adapter", 4, [64, 128])
        ),
        "tencent full": Case("canny_sd15.pth", write_tencent, make(1)),
        "tencent full converted": Case("canny_sd15.safetensors", write_tencent, make(1)),
        "tencent light": Case("color_sd14.pth", write_tencent, make(3, "light_adapter")),
        "pickled folder": Case("color/diffusion_pytorch_model.bin", write_folder, make(3, "light_adapter")),
        "colours at 4, bare": Case("colour 4.safetensors", write_bare, make(3, factor=4, widths=[64, 128])),
    }
    for kind in ("full_adapter", "light_adapter"):
        for channels in (1, 3, 4):
            adapter = make(channels, kind)
            folder = f"{kind} {channels}/diffusion_pytorch_model.safetensors"
            found[f"{kind}, {channels}, folder"] = Case(folder, write_folder, adapter)
            found[f"{kind}, {channels}, bare"] = Case(f"{kind} {channels}.safetensors", write_bare, adapter)
    return found


CASES = cases()
PAIRS = {
    "pair": ("tencent light", "tencent full"),
    "pair the other way round": ("full_adapter, 1, bare", "pickled folder"),
    "pair at factor 4": ("edges at factor 4", "colours at 4, bare"),
}
HINTS = {"hint of 3": "full_adapter, 3, bare", "edges as a picture": "tencent full"}


def write_damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that no loader may take, with words of the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = make(4)
    state = adapter.state_dict()

    def written(name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
        save_file({key: value.clone() for key, value in tensors.items()}, folder / name, metadata)
        return folder / name

    nan = {**state, "adapter.body.1.resnets.0.block1.bias": torch.full((64,), float("nan"))}
    truncated = written("truncated.safetensors", state)
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    torch.save(state, folder / "truncated.pth")
    (folder / "truncated.pth").write_bytes((folder / "truncated.pth").read_bytes()[:-1000])
    torch.save({**tencent_names(make(1)), "step": HostileValue(folder / "ran")}, folder / "code.pth")
    torch.save({"step": 3, "weights": [1, 2]}, folder / "no tensors.bin")
    vae = {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3), "decoder.conv_out.weight": torch.zeros(3, 8, 3, 3)}
    lora = {"unet.conv_in.lora_A.weight": torch.zeros(4, 4, 3, 3)}
    config = {"in_channels": 4, "downscale_factor": 4}
    contradicted = {"icmsr": json.dumps({"config": config})}
    xl = T2IAdapter(3, [32, 64, 128, 128], 2, 16, "full_adapter_xl")
    xl.save_pretrained(folder / "xl")
    missing = {key: value for key, value in state.items() if key != "adapter.body.2.in_conv.bias"}
    return {
        "nan": (written("nan.safetensors", nan), "NaN or infinite values in adapter.body.1.resnets.0.block1.bias"),
        "truncated": (truncated, "not a readable .safetensors file"),
        "truncated pickle": (folder / "truncated.pth", "truncated, damaged or not written by torch.save"),
        "code": (folder / "code.pth", "refused, and no code in it was run"),
        "no tensors": (folder / "no tensors.bin", "these are not: step, weights"),
        "vae": (written("vae.safetensors", vae), "not a T2I-Adapter, full or light: found "),
        "lora": (written("lora.safetensors", lora), "not a T2I-Adapter"),
        "contradiction": (
            written("contradiction.safetensors", state, contradicted),
            "says 4 channels at a downscale factor of 4",
        ),
        "xl": (folder / "xl" / "diffusion_pytorch_model.safetensors", "an adapter for SDXL"),
        "xl, bare": (written("xl.safetensors", xl.state_dict()), "an adapter for SDXL"),
        "first layer": (written("seven.safetensors", make(7).state_dict()), "takes 448 channels, known are 16, 48, 64"),
        "missing": (written("missing.safetensors", missing), 'Missing key(s) in state_dict: "body.4.in_conv.bias"'),
    }


@pytest.mark.parametrize("name", CASES)
def test_layout_is_read_off_the_file(tmp_path, name):
    case = CASES[name]
    case.write(tmp_path / case.file, case.adapter)
    layout, tensors = read_adapter(tmp_path / case.file)
    config = case.adapter.config
    light = config.adapter_type == "light_adapter"
    assert (layout.channels_in, layout.factor) == (config.in_channels, config.downscale_factor)
    assert list(layout.widths) == [*config.channels, *(config.channels[-1:] if light else [])]
    assert (layout.light, layout.blocks) == (light, config.num_res_blocks)
    expected = tencent_names(case.adapter)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_64_channels_are_what_the_description_says(tmp_path):
    """1 channel at factor 8 has as many as 4 at factor 4: another tool's file without a word is the former."""
    adapter = make(4, factor=4)
    write_bare(tmp_path / "bare.safetensors", adapter)
    write_ours(tmp_path / "ours.safetensors", adapter)
    write_folder(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", adapter)
    layouts = [
        read_adapter(tmp_path / name)[0]
        for name in ("bare.safetensors", "ours.safetensors", "folder/diffusion_pytorch_model.safetensors")
    ]
    assert [(layout.channels_in, layout.factor) for layout in layouts] == [(1, 8), (4, 4), (4, 4)]


def test_a_config_beside_other_weights_is_not_theirs(tmp_path):
    """models/controlnet may hold a stray config.json."""
    write_folder(tmp_path / "diffusion_pytorch_model.safetensors", make(4, factor=4))
    write_bare(tmp_path / "canny.safetensors", make(1))
    assert read_adapter(tmp_path / "canny.safetensors")[0].channels_in == 1


def test_damaged_files_are_refused_and_nothing_in_them_runs(tmp_path):
    damaged = write_damaged(tmp_path)
    torch.load(tmp_path / "code.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works
    (tmp_path / "ran").unlink()
    for path, words in damaged.values():
        if path.name == "missing.safetensors":
            continue  # only the network knows
        with pytest.raises(IcmsrError, match=re.escape(words)) as refused:
            read_adapter(path)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_other_kinds_of_file_are_named(tmp_path):
    (tmp_path / "a.onnx").touch()
    with pytest.raises(IcmsrError, match=r"must end in one of \.safetensors, \.bin"):
        read_adapter(tmp_path / "a.onnx")
    with pytest.raises(IcmsrError, match="no such file"):
        read_adapter(tmp_path / "missing.safetensors")


class Outcome(NamedTuple):
    job: Path
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def outcome(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    """One ComfyUI process that does everything the tests below look at."""
    job = tmp_path_factory.mktemp("adapters")
    folder = job / "models" / "controlnet"
    for case in CASES.values():
        case.write(folder / case.file, case.adapter)
    write_bare(folder / "other widths.safetensors", make(1, widths=[64, 128]))
    base = write_base(
        job / "base of factor 4", NetworkConfig(latent_channels=8, vae_channels=(32, 32, 64), unet_channels=(64, 128))
    )
    write_generator(job / "models" / "icmsr" / "generator.safetensors", base)
    # Context and latent as in Stable Diffusion 1.5, which is all that tells a checkpoint's family.
    like_sd15 = write_base(
        job / "base like sd15",
        NetworkConfig(latent_channels=4, vae_channels=(32, 32, 64, 64), context_width=768, context_tokens=77),
    )
    generator = random_generator(like_sd15, prediction="eps")
    info = replace(generator.info, family="sd15", base_hash="")
    save_generator(job / "models" / "icmsr" / "sd15.safetensors", replace(generator, info=info))
    for_v = replace(generator, info=replace(info, prediction="v"))
    save_generator(job / "models" / "icmsr" / "sd15 v.safetensors", for_v, torch.float32)
    damaged = write_damaged(folder / "damaged")

    def files(*names: str) -> list[str]:
        return [CASES[name].file for name in names]

    wanted = {
        "features": {
            **{name: {"files": [case.file], "hint": "hint"} for name, case in CASES.items()},
            **{name: {"files": files(*pair), "hint": "hint"} for name, pair in PAIRS.items()},
            **{name: {"files": files(case), "hint": name} for name, case in HINTS.items()},
        },
        "refused": {
            **{name: [path.relative_to(folder).as_posix()] for name, (path, _) in damaged.items()},
            "no pair": files("ours", "tencent full"),
            "twice the same": files("tencent full", "full_adapter, 1, bare"),
            "pair of two widths": [CASES["tencent light"].file, "other widths.safetensors"],
            "not there": ["nowhere.safetensors"],
        },
        "wrong hints": {
            "three channels for four": {"files": files("ours"), "hint": "hint of 3"},
            "three channels for a pair": {"files": files(*PAIRS["pair"]), "hint": "hint of 3"},
        },
        "upscale": {"upscale": files("ours at factor 4"), "upscale pair": files(*PAIRS["pair at factor 4"])},
        "upscale refused": {"factor 8 at 4": ["other widths.safetensors"]},
        "sampled": {"adapter": files("ours at factor 4"), "pair": files(*PAIRS["pair at factor 4"])},
    }
    hint = torch.rand(1, 4, 128, 192)
    inputs = {
        "hint": hint,
        "hint of 3": hint[:, :3].clone(),
        "edges as a picture": hint[:, 3:].expand(-1, 3, -1, -1).clone(),
        "picture": torch.rand(1, 30, 41, 3),
    }
    save_file(inputs, job / "inputs.safetensors")
    (job / "wanted.json").write_text(json.dumps(wanted))
    run_script(comfy_python, comfyui, "adapter_checks.py", job)
    report = json.loads((job / "report.json").read_text())
    return Outcome(job, inputs, load_file(job / "results.safetensors"), report)


def channels_for(adapter: T2IAdapter, hint: Tensor) -> Tensor:
    return {1: hint[:, 3:], 3: hint[:, :3], 4: hint}[adapter.config.in_channels]


def assert_features(outcome: Outcome, name: str, expected: list[Tensor]) -> None:
    worst = 0.0
    for number, level in enumerate(expected):
        got = outcome.results[f"{name}/{number}"]
        assert got.shape == level.shape
        assert float(level.abs().max()) > 0.01  # or there would be nothing to compare
        worst = max(worst, float((got - level).abs().max()))
    print(f"{name}: largest difference {worst:.1e}")
    assert worst <= TOLERANCE
    assert f"{name}/{len(expected)}" not in outcome.results


@pytest.mark.comfy
@pytest.mark.parametrize("name", CASES)
def test_features_are_those_of_diffusers(outcome, name):
    """Each adapter takes its channels out of ICM-SR's hint: the colours, the edges, or both."""
    adapter = CASES[name].adapter
    assert_features(outcome, name, adapter(channels_for(adapter, outcome.inputs["hint"])))
    assert outcome.report["loaded"][name] == ["T2IAdapter", adapter.config.downscale_factor]


@pytest.mark.comfy
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_the_sum_that_diffusers_makes(outcome, name):
    adapters = [CASES[one].adapter for one in PAIRS[name]]
    hints = [channels_for(adapter, outcome.inputs["hint"]) for adapter in adapters]
    assert_features(outcome, name, MultiAdapter(adapters)(hints, [1.0, 1.0]))


@pytest.mark.comfy
@pytest.mark.parametrize("name", HINTS)
def test_a_hint_may_be_a_picture(outcome, name):
    adapter = CASES[HINTS[name]].adapter
    assert_features(outcome, name, adapter(channels_for(adapter, outcome.inputs["hint"])))


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("name", "cases"), [("upscale", ("ours at factor 4",)), ("upscale pair", PAIRS["pair at factor 4"])]
)
def test_upscaling_at_factor_4_agrees_with_the_library(outcome, name, cases):
    large = torch.nn.functional.interpolate(outcome.inputs["hint"], (120, 164), mode="nearest-exact")
    large = pad_to_multiple(large, 8)

    def features(boxes):
        hint = torch.cat([large[:, :, box.slices(4)[0], box.slices(4)[1]] for box in boxes])
        adapters = [CASES[case].adapter for case in cases]
        found = [adapter(channels_for(adapter, hint)) for adapter in adapters]
        return [0.7 * sum(levels) for levels in zip(*found)]

    backbone = load_backbone(
        Recipe(outcome.job / "base of factor 4", outcome.job / "models/icmsr/generator.safetensors")
    )
    picture, settings = outcome.inputs["picture"].movedim(-1, 1), UpscaleSettings(tile=128, overlap=32)
    expected = upscale(backbone, picture, settings, features=features)
    got = outcome.results[name].movedim(-1, 1)
    assert float((got - expected).abs().max()) <= 1e-4
    assert float((upscale(backbone, picture, settings) - expected).abs().max()) > 0.01  # the condition does act


@pytest.mark.comfy
def test_core_s_own_nodes_take_the_control_net(outcome):
    sampled = {name: outcome.results[f"sampled {name}"] for name in ("no adapter", "adapter", "pair")}
    assert all(bool(latent.isfinite().all()) for latent in sampled.values())
    for one, other in (("no adapter", "adapter"), ("no adapter", "pair"), ("adapter", "pair")):
        assert float((sampled[one] - sampled[other]).abs().max()) > 0.01
    assert outcome.report["modules"] == []


def rooms(outcome: Outcome, moment: str) -> set[str]:
    """The folders of icmsr_core, and its single modules, that the pack has loaded at `moment`."""
    return {name.split(".")[1] for name in outcome.report[f"modules {moment}"] if name.startswith("icmsr_core.")}


@pytest.mark.comfy
def test_importing_the_pack_loads_no_module_that_needs_opencv(outcome):
    assert {"upscale", "weights", "tiled_vae"} <= rooms(outcome, "at import")
    opencv = {"icmsr_core.conditions", "icmsr_core.pictures.panels", "icmsr_core.pictures.files", "icmsr_core.measures"}
    assert not opencv & set(outcome.report["modules at import"])


@pytest.mark.comfy
def test_importing_the_pack_loads_no_package_that_core_has_not(outcome):
    """So it delays ComfyUI's start by its own few modules alone: torch, diffusers or OpenCV would take seconds."""
    assert outcome.report["new packages"] == []


@pytest.mark.comfy
def test_inspect_manifold_loads_nothing_of_the_command_line_or_of_training(outcome):
    loaded = rooms(outcome, "at the end")
    assert "measures" in loaded  # Inspect Manifold ran
    assert not {"cli", "runtime", "exchange", "train"} & loaded


@pytest.mark.comfy
def test_a_batch_is_looked_at_picture_by_picture(outcome):
    seen, alone = outcome.results["seen"], outcome.results["seen alone"]
    assert seen.shape[0] == 2
    assert torch.equal(seen[:1], alone)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.comfy
def test_a_large_picture_is_shrunk(outcome):
    """90 x 1024 pixels are looked at as 45 x 512, on two rows under their labels, with truth and latent at the left."""
    _, height, width, _ = outcome.report["seen large"]
    assert height == 2 * (45 + 32 + 8)
    assert 3 * 512 < width < 3 * 512 + 250


@pytest.mark.comfy
def test_a_checkpoint_predicts_what_its_sampling_says(outcome):
    """Core guesses eps or v from a weight's statistics; ModelSamplingDiscrete is how a user corrects it."""
    assert outcome.report["predictions"] == ["eps", "v"]
    assert float((outcome.results["seen eps"] - outcome.results["seen v"]).abs().max()) > 0.1
    assert outcome.report["errors"]["eps generator on eps"] is None


@pytest.mark.comfy
def test_a_v_prediction_model_takes_the_generator_that_was_trained_for_it(outcome):
    """Nothing attached, as core's loaders give it: the same picture as the library's of a base that says so."""
    folder = outcome.job / "base like sd15"
    write_base_info(folder, replace(open_base(folder).info, family="sd15", prediction="v"))
    picture, settings = outcome.inputs["picture"].movedim(-1, 1), UpscaleSettings(tile=128, overlap=32)
    expected = upscale(
        load_backbone(Recipe(folder, outcome.job / "models/icmsr/sd15 v.safetensors")), picture, settings
    )
    got = outcome.results["v generator on v"].movedim(-1, 1)
    difference = float((got - expected).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-4


REFUSALS = {
    "v generator on eps": "the generator is for a base that predicts v, this one predicts eps (the MODEL, sd15",
    "eps generator on v": "the generator is for a base that predicts eps, this one predicts v (the MODEL, sd15 "
    "checkpoint; if ComfyUI guessed its kind wrong, set it with ModelSamplingDiscrete before this node): choose the "
    "eps-prediction",
    "no prompt": "the sd15 checkpoint has no prompt of its own: connect CLIP Text Encode to conditioning",
    "hint alone": "hint is connected but control_net is not",
    "another base's adapter": "it works on 4 x 4 pixels with 2 levels, for sizes in multiples of 8",
    "no pair": "one adapter for colours (3 channels) and one for edges (1 channel), got 4 and 1 channels",
    "twice the same": "got 1 and 1 channels",
    "pair of two widths": "the two adapters are for different base models (widths [32, 64, 128, 128] at factor 8 and",
    "not there": "'nowhere.safetensors' is not in models/icmsr or models/controlnet",
    "three channels for four": "hint has 3 channels, this control_net takes 4: connect the output called hint",
    "three channels for a pair": "hint has 3 channels, this control_net takes 4",
    "factor 8 at 4": "it works on 8 x 8 pixels with 2 levels, for sizes in multiples of 16; this MODEL takes "
    "multiples of 8): choose an adapter made for this MODEL",
}


@pytest.mark.comfy
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_to_do(outcome, name):
    message = outcome.report["errors"][name]
    assert message is not None
    assert message.startswith("IcmsrError: ")
    assert REFUSALS[name] in message
    assert "\n" not in message


@pytest.mark.comfy
def test_the_node_refuses_damaged_files(outcome, tmp_path):
    for name, (_, words) in write_damaged(tmp_path).items():
        message = outcome.report["errors"][name]
        assert message is not None, name
        assert message.startswith("IcmsrError: "), name
        assert words in message
        assert "\n" not in message
    assert not (outcome.job / "models" / "controlnet" / "damaged" / "ran").exists()
