"""Cards that compute in 16 bits: nano runs in float16, and a part that overflows goes on in float32."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.support.comfy_harness import run_script

pytestmark = pytest.mark.comfy

CHOSEN = ("chosen by core", "chosen by core, MPS", "chosen by core, DynamicVRAM")
FORCED = ("forced", "forced, DynamicVRAM", "forced, --novram")
EVERYTHING = ("chosen by core", "forced", "forced, DynamicVRAM")
"""Where the adapter and the grid run, too."""
ROUNDING = 0.05
"""Largest difference that rounding makes, of the VAE to bfloat16 included."""


class Outcome(NamedTuple):
    results: dict[str, Tensor]
    report: dict


@pytest.fixture(scope="module")
def outcome(comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One ComfyUI process that runs the nodes on the CPU in float32, and then in 16 bits on the device."""
    job = tmp_path_factory.mktemp("float16")
    run_script(comfy_python, comfyui, "float16_checks.py", job)
    return Outcome(load_file(job / "results.safetensors"), json.loads((job / "report.json").read_text()))


def upscales(way: str) -> list[str]:
    """The upscales of `way`, by what their names add to its name."""
    return ["", ", again", *([", adapter"] if way in EVERYTHING else [])]


def pictures(way: str) -> list[str]:
    """The pictures of `way` that differ, as `upscales`."""
    return ["", *([", adapter", ", grid"] if way in EVERYTHING else [])]


def off_by(outcome: Outcome, name: str, expected: str) -> float:
    difference = float((outcome.results[name] - outcome.results[expected]).abs().max())
    print(f"{name} differs from {expected} by {difference:.1e}")
    return difference


@pytest.mark.parametrize("way", CHOSEN)
def test_core_chooses_float16_for_nano(outcome: Outcome, way: str) -> None:
    assert outcome.report["precisions"][way] == ["torch.float16", "torch.bfloat16", "DynamicVRAM" in way]
    assert not any(outcome.report["warnings"][f"{way}{run}"] for run in upscales(way))
    for run in pictures(way):
        assert 0 < off_by(outcome, f"{way}{run}", f"CPU{run}") < ROUNDING


@pytest.mark.parametrize("way", FORCED)
def test_a_unet_that_overflows_goes_on_in_float32(outcome: Outcome, way: str) -> None:
    assert outcome.report["precisions"][way] == ["torch.float16", "torch.float16", "DynamicVRAM" in way]
    for run in upscales(way):
        warnings = outcome.report["warnings"][f"{way}{run}"]
        assert len(warnings) == 1, warnings
        assert warnings[0].startswith("the UNet gave NaN or infinite values in float16 and runs in float32")
    for run in pictures(way):
        assert 0 < off_by(outcome, f"{way}{run}", f"CPU, forced{run}") < ROUNDING


@pytest.mark.parametrize("way", [*CHOSEN, *FORCED])
def test_every_run_gives_the_same(outcome: Outcome, way: str) -> None:
    """Also after a run that changed the precision."""
    assert outcome.report["repeated"][way]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["whole", "exact", "bounded"])
def test_a_vae_that_overflows_goes_on_in_float32(outcome: Outcome, part: str, kind: str) -> None:
    warnings = outcome.report["warnings"][f"{part}, {kind}, forced"]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith(f"the VAE's {part} gave NaN or infinite values in float16 and runs in float32")
    assert outcome.report["warnings"][f"{part}, {kind}, float32"] == []
    assert off_by(outcome, f"{part}, {kind}, forced", f"{part}, {kind}, float32") < ROUNDING


def test_damaged_weights_are_an_error_in_float32_too(outcome: Outcome) -> None:
    assert outcome.report["errors"]["damaged"].startswith(
        "IcmsrError: the UNet gave NaN or infinite values in float32: the weights of the MODEL"
    )
