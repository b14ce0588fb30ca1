"""HYPIR's published layout in ComfyUI, from the file alone: the same picture as the command line gives.

Random weights: a narrower UNet with the published names, the text encoders and the VAE in full, because core builds no
others.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from icmsr_core.cli.main import main
from icmsr_core.runtime.checkpoint_text import embed_empty_prompt
from icmsr_core.weights.base import open_base
from icmsr_core.weights.tensor_files import read_tensors
from tests.support.comfy_harness import run_script
from tests.support.foreign_files import Q, hypir_checkpoint
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.sd_files import clip_h_state, clip_l_state, write_core_base

pytestmark = [pytest.mark.comfy, pytest.mark.long]


class Outcome(NamedTuple):
    job: Path
    results: dict[str, torch.Tensor]
    report: dict


def write_files(job: Path, full: bool) -> None:
    models = job / "models"
    for family, text in (("sd15", clip_l_state()), ("sd21", clip_h_state())):
        path = models / "checkpoints" / f"{family}.safetensors"
        write_core_base(job / "folders" / family, path, family, full)
        tensors, metadata = read_tensors(path)
        save_file({**tensors, **text}, path, metadata=metadata)
    folder = models / "icmsr"
    folder.mkdir()
    state = hypir_checkpoint(open_base(models / "checkpoints" / "sd21.safetensors").shapes("unet"))
    torch.save({key: value.half() for key, value in state.items()}, folder / "HYPIR_sd2.pth")
    for suffix in ("pkl", "pth", "pt", "bin"):
        torch.save({**dict(list(state.items())[:2]), "x": HostileValue(job / "ran")}, folder / f"evil.{suffix}")
        assert_runs_code(folder / f"evil.{suffix}", job / "ran")
    lora = {f"unet.{Q}.lora_A.weight": torch.ones(4, 320), f"unet.{Q}.lora_B.weight": torch.ones(320, 4)}
    save_file(lora, folder / "lora.safetensors")


def run(job: Path, python: Path, comfyui: Path, full: bool = False) -> Outcome:
    """What foreign_checks.py makes of the files."""
    write_files(job, full)
    levels = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(levels).resize((16, 16), Image.Resampling.BICUBIC)
    picture.save(job / "picture.png")
    save_file({"picture": torch.from_numpy(np.asarray(picture)[None] / np.float32(255))}, job / "inputs.safetensors")
    run_script(python, comfyui, "foreign_checks.py", job, timeout=3600 if full else 1500)
    return Outcome(job, load_file(job / "results.safetensors"), json.loads((job / "report.json").read_text()))


@pytest.fixture(scope="module")
def outcome(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    return run(tmp_path_factory.mktemp("foreign"), comfy_python, comfyui)


@pytest.mark.slow
def test_the_command_line_gives_the_same_picture_at_the_published_size(comfyui, comfy_python, tmp_path):
    """12 GB of memory and of disk, some minutes."""
    assert_same_picture(run(tmp_path, comfy_python, comfyui, full=True), "picture", [])
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_the_empty_prompt_s_embedding_is_core_s(outcome, family):
    own = embed_empty_prompt(outcome.job / "models" / "checkpoints" / f"{family}.safetensors", family)
    core = outcome.results[f"{family} text"]
    difference, scale = float((own - core).abs().max()), float(core.abs().max())
    print(f"{family}: largest difference {difference:.1e} at scale {scale:.2f}")
    assert own.shape == core.shape
    assert difference <= 1e-4


@pytest.mark.parametrize(("name", "more"), [("picture", []), ("weaker", ["--coeff-t", "100"])])
def test_the_command_line_gives_the_same_picture_from_the_same_files(outcome, name, more):
    assert_same_picture(outcome, name, more)


def assert_same_picture(outcome: Outcome, name: str, more: list[str]) -> None:
    """`icmsr upscale` with the options `more` gives the picture `name` to 1/255."""
    job = outcome.job
    base, weights = job / "models/checkpoints/sd21.safetensors", job / "models/icmsr/HYPIR_sd2.pth"
    files = ["--base", str(base), "--model", str(weights), "--prompt", ""]
    settings = ["--smallest", "0", "--resize", "antialiased", "--overlap", "128", "--dtype", "fp32", "--device", "cpu"]
    result = job / f"{name} result.png"
    assert main(["upscale", str(job / "picture.png"), str(result), *files, *settings, *more]) == 0
    got = np.asarray(Image.open(result)).astype(float)
    difference = np.abs(got - np.round(outcome.results[name][0].numpy() * 255)).max()
    print(f"{name}: largest difference {difference:.0f}/255")
    assert got.std() > 5
    assert difference <= 1


def test_the_node_says_what_it_found_and_writes_the_converted_file_when_asked(outcome):
    said = outcome.report["said"]
    assert said.startswith("found HYPIR: rank 256 on 257 modules of the UNet; sd21, eps at timestep 200; licence: non-")
    assert "must not be passed on" in said
    assert {"HYPIR_sd2.pth", "evil.pkl", "evil.pt", "evil.bin", "lora.safetensors"} <= set(outcome.report["listed"])
    assert (outcome.results["weaker"] - outcome.results["picture"]).abs().max() > 0.01
    assert torch.equal(outcome.results["converted"], outcome.results["weaker"])


def test_errors_name_the_socket_or_the_reason_and_no_code_runs(outcome):
    errors = outcome.report["errors"]
    assert "connect CLIP of Load Checkpoint to clip of ICM-SR Apply Generator" in errors["no prompt"]
    assert "the prompt 'a cat' needs a text encoder: connect CLIP" in errors["no clip"]
    assert "the timestep of hypir is always 200, got 999" in errors["timestep"]
    assert "say what its authors trained: family, timestep, prediction" in errors["lora"]
    for suffix in ("pkl", "pth", "pt", "bin"):
        assert "refused, and no code in it was run" in errors[f"evil.{suffix}"]
    assert not (outcome.job / "ran").exists()
