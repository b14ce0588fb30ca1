"""Core's DynamicVRAM, the default on NVIDIA cards: its Linear layers have no weight until one is loaded."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.comfy_harness import run_script
from tests.support.model_files import write_base

pytestmark = pytest.mark.comfy

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
NATIVE = "middle_block.1.transformer_blocks.0.attn1.to_out.0"
WITHOUT_BIAS = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

DAMAGED = {
    "turned": f"{NATIVE}.weight is [64, 256], expected [128, 128]",
    "narrow bias": f"{NATIVE}.bias is [64], expected [128]",
    "no weight": f"{NATIVE}.weight is missing",
    "no bias": f"{NATIVE}.bias is missing",
    "a bias too many": f"(no native name) {WITHOUT_BIAS}.bias is surplus",
    "a layer too many": "(no native name) mid_block.attentions.0.extra.weight is surplus",
    "wrong convolution": "input_blocks.0.0.weight is [64, 3, 3, 3], expected [64, 12, 3, 3]",
}
"""Damaged bases, and what their error must say."""


def damage(state: dict[str, Tensor], kind: str) -> None:
    """Changes `state`, the tensors of a UNet under their diffusers names."""
    if kind == "turned":  # as many values, in another shape
        state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].reshape(64, 256)
    elif kind == "narrow bias":
        state[f"{LINEAR}.bias"] = state[f"{LINEAR}.bias"][:64].clone()
    elif kind == "no weight":
        del state[f"{LINEAR}.weight"]
    elif kind == "no bias":
        del state[f"{LINEAR}.bias"]
    elif kind == "a bias too many":
        state[f"{WITHOUT_BIAS}.bias"] = torch.zeros(128)
    elif kind == "a layer too many":
        state["mid_block.attentions.0.extra.weight"] = torch.zeros(128, 128)
    else:
        state["conv_in.weight"] = state["conv_in.weight"][:, :3].clone()


class Outcome(NamedTuple):
    results: dict[str, Tensor]
    report: dict


@pytest.fixture(scope="module")
def outcome(comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One ComfyUI process that loads the base and every damaged copy of it with lazy layers."""
    job = tmp_path_factory.mktemp("lazy")
    base = write_base(job / "base")
    for kind in DAMAGED:
        shutil.copytree(base, job / "damaged" / kind)
        file = job / "damaged" / kind / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        damage(state, kind)
        save_file(state, file)
    save_file({"latent": torch.randn(1, 12, 8, 12)}, job / "inputs.safetensors")
    run_script(comfy_python, comfyui, "lazy_layer_checks.py", job)
    return Outcome(load_file(job / "results.safetensors"), json.loads((job / "report.json").read_text()))


def test_lazy_layers_give_the_result_of_ordinary_layers(outcome: Outcome) -> None:
    without_weight, layers = outcome.report["lazy layers"]["lazy"]
    assert layers > 10
    assert without_weight == layers  # or dynamic loading was off
    assert outcome.report["lazy layers"]["ordinary"] == [0, layers]
    assert torch.equal(outcome.results["lazy"], outcome.results["ordinary"])


def test_the_embedded_model_loads_with_lazy_layers(outcome: Outcome) -> None:
    assert outcome.report["errors"]["embedded"] is None
    without_weight, layers = outcome.report["lazy layers"]["embedded"]
    assert without_weight == layers > 10


@pytest.mark.parametrize("kind", DAMAGED)
def test_weights_that_do_not_fit_are_refused_by_name(outcome: Outcome, kind: str) -> None:
    message = outcome.report["errors"][kind]
    assert message is not None
    assert message.startswith("IcmsrError: ")
    assert "the weights do not fit the configuration" in message
    assert DAMAGED[kind] in message


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(outcome: Outcome) -> None:
    """Core's lazy layers take any shape and fill what is missing with zeros: afterwards it is too late."""
    assert outcome.report["loaded"] == ["ordinary", "lazy", "embedded"]
