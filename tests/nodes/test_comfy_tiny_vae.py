"""Core's own TAESD, loaded by core's VAELoader, under ICMSR_Upscale: against the library over diffusers' class."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.generator_file import PartWeights, save_generator
from icmsr_core.weights.sd_families import SD_SCALING
from tests.support.comfy_harness import run_script
from tests.support.model_files import TINY, random_generator, write_base
from tests.support.tiny_vae_files import write_tiny_folder, write_tiny_pair

pytestmark = pytest.mark.comfy


class Outcome(NamedTuple):
    results: dict[str, torch.Tensor]
    errors: dict[str, str | None]
    picture: torch.Tensor
    library: DiffusersBackbone


@pytest.fixture(scope="module")
def outcome(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    """One ComfyUI process that does everything these tests look at."""
    job: Path = tmp_path_factory.mktemp("tiny")
    base, weights = write_base(job / "base", TINY), job / "models" / "icmsr"
    # Core divides TAESD's latents by Stable Diffusion's factor, so that the MODEL's own multiplies them by it again.
    vae_config = base / "vae" / "config.json"
    vae_config.write_text(json.dumps({**json.loads(vae_config.read_text()), "scaling_factor": SD_SCALING}))
    weights.mkdir(parents=True)
    changing = random_generator(base)
    save_generator(weights / "changing.safetensors", changing, torch.float32)
    save_generator(weights / "plain.safetensors", replace(changing, vae=PartWeights()), torch.float32)
    folder = write_tiny_folder(job / "taesd")
    write_tiny_pair(job / "models" / "vae_approx", folder)
    picture = torch.rand(1, 24, 36, 3, generator=torch.Generator().manual_seed(0))
    save_file({"picture": picture}, job / "inputs.safetensors")
    run_script(comfy_python, comfyui, "tiny_vae_checks.py", job)
    return Outcome(
        load_file(job / "results.safetensors"),
        json.loads((job / "errors.json").read_text()),
        picture,
        load_backbone(Recipe(base, weights / "plain.safetensors", tiny_vae=folder)),
    )


@pytest.mark.parametrize(("name", "tile"), [("untiled", 0), ("tiled", 64)])
def test_taesd_gives_the_librarys_picture(outcome, name: str, tile: int) -> None:
    settings = UpscaleSettings(tile=tile, overlap=16, color_fix="none")
    expected = upscale(outcome.library, outcome.picture.movedim(-1, 1), settings).movedim(1, -1)
    assert expected.std() > 0.02
    difference = float((outcome.results[name] - expected).abs().max())
    print(f"largest difference {difference:.2e}")
    assert difference <= 1e-4


def test_a_generator_that_changes_the_vae_refuses_it(outcome) -> None:
    apply, run = outcome.errors["apply"], outcome.errors["upscale"]
    assert apply is not None
    assert (
        "changing.safetensors: the generator changes the VAE, and this VAE is of a kind that it cannot change" in apply
    )
    assert "connect the VAE of the checkpoint" in apply
    assert run is not None
    assert "a tiny VAE cannot be used with this generator" in run
