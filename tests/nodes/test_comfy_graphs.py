"""Core's nodes that change a MODEL, before and after ICM-SR Apply Generator: what works, and what is refused."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.support.comfy_harness import run_script

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5
CHANGES = (
    "FreeU",
    "FreeU_V2",
    "attention multiply",
    "deep shrink",
    "LoraLoaderModelOnly",
    "LoraLoader",
    "compute type",
)
REFUSED = {
    "RescaleCFG": "that only a sampler applies (sampler_cfg_function)",
    "Perturbed-Attention Guidance": "that only a sampler applies (sampler_post_cfg_function)",
    "Self-Attention Guidance": "that only a sampler applies (sampler_post_cfg_function)",
    "EasyCache": "that only a sampler applies (outer_sample, ",
    "HyperTile": "of self-attention, which this model does not have",
}
"""Changes that cannot work, and what the error says of them."""


class Outcome(NamedTuple):
    results: dict[str, Tensor]
    report: dict

    def off_by(self, name: str, expected: str) -> float:
        difference = float((self.results[name] - self.results[expected]).abs().max())
        print(f"{name} differs from {expected} by {difference:.1e}")
        return difference


@pytest.fixture(scope="module")
def outcome(comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One ComfyUI process that runs nano through core's nodes."""
    job = tmp_path_factory.mktemp("graphs")
    run_script(comfy_python, comfyui, "graph_checks.py", job)
    return Outcome(load_file(job / "results.safetensors"), json.loads((job / "report.json").read_text()))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_unet_acts_at_both_places(outcome: Outcome, change: str) -> None:
    assert outcome.off_by(f"{change}, before", f"{change}, after") <= TOLERANCE
    assert outcome.off_by(f"{change}, after", "plain") > 10 * TOLERANCE


def test_no_change_is_left_behind(outcome: Outcome) -> None:
    """The networks are shared by all the MODELs."""
    assert outcome.off_by("plain, again", "plain") == 0


def test_a_compiled_model_is_used(outcome: Outcome) -> None:
    for place in ("before", "after"):
        assert outcome.off_by(f"TorchCompileModel, {place}", "plain") <= TOLERANCE
    assert outcome.report["compiled"]["calls"] >= 2


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_that_cannot_work_is_refused(outcome: Outcome, change: str) -> None:
    for place in ("", ", before", ", grid"):
        message = outcome.report["errors"][f"{change}{place}"]
        assert message is not None
        assert message.startswith(f"IcmsrError: this MODEL carries a change {REFUSED[change]}")


def test_models_can_be_copied_for_other_cards(outcome: Outcome) -> None:
    report = outcome.report
    assert report["own networks"] == [True, True]
    assert report["deep copy"] <= TOLERANCE
    assert report["with a copy"] == 0
    assert not report["copy loaded"]  # one step without guidance has nothing for it to do


def test_a_model_of_dynamic_loading_has_a_plain_copy(outcome: Outcome) -> None:
    assert outcome.report["dynamic"] == [True, False]
    for name in ("dynamic", "dynamic, plain copy", "dynamic, again"):
        assert outcome.off_by(name, "plain") <= TOLERANCE


def test_weights_in_8_bits_give_a_rough_result(outcome: Outcome) -> None:
    assert outcome.report["kept"] == "torch.float8_e4m3fn"
    assert 10 * TOLERANCE < outcome.off_by("8 bits", "plain") < 0.03
    assert outcome.off_by("8 bits, again", "8 bits") == 0
