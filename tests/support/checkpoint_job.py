"""What a ComfyUI process makes of Stable Diffusion checkpoints: files, the run, and the library's side of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import pad_to_multiple
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import save_generator
from tests.support.comfy_harness import run_script
from tests.support.sd_files import complete_generator, core_configs, write_core_base

TOLERANCE = 1e-4
"""Largest difference that two correct implementations may show, over the scale of the output."""
STRENGTH = 0.7
"""Of the adapter."""


class Outcome(NamedTuple):
    job: Path
    full: bool
    results: dict[str, torch.Tensor]
    report: dict


def write_model(models: Path, folder: Path, family: str, full: bool = False) -> None:
    """Checkpoint and folder of a base, and a complete generator for it, where ComfyUI looks for them."""
    write_core_base(folder, models / "checkpoints" / f"{family}.safetensors", family, full)
    write_complete_generator(models, folder, family)


def write_complete_generator(models: Path, folder: Path, name: str, **options) -> None:
    path = models / "icmsr" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_generator(path, complete_generator(open_base(folder), **options), torch.float32)


def make_adapter(family: str, full: bool):
    """A diffusers full_adapter of 4 channels with the UNet's widths, random."""
    from diffusers import T2IAdapter

    torch.manual_seed(11)
    widths = core_configs(family, full)["unet"]["block_out_channels"]
    adapter = T2IAdapter(4, widths, 2, downscale_factor=8, adapter_type="full_adapter")
    return adapter.requires_grad_(False)


def run_job(
    job: Path, python: Path, comfyui: Path, families: Sequence[str], *, full: bool = False, memory: bool = False
) -> Outcome:
    """Writes the files of every family and lets checkpoint_checks.py run them in one ComfyUI process.

    With `memory`, what that script calls so instead of the parity: partial loading, precisions, release.
    """
    for family in families:
        write_model(job / "models", job / "folders" / family, family, full)
        adapter = make_adapter(family, full)
        save_file(adapter.state_dict(), job / "models" / "icmsr" / f"{family} adapter.safetensors")
    (job / "plan.json").write_text(json.dumps({"families": families, "full": full, "memory": memory}))
    random = torch.Generator().manual_seed(4)
    size = (32, 32) if full else (13, 16)  # padded to one tile of 64 x 64
    inputs = {"picture": torch.rand(1, *size, 3, generator=random), "hint": torch.rand(1, *size, 4, generator=random)}
    save_file(inputs, job / "inputs.safetensors")
    run_script(python, comfyui, "checkpoint_checks.py", job, timeout=3600 if full else 600)
    results = {**load_file(job / "results.safetensors"), **inputs}
    return Outcome(job, full, results, json.loads((job / "report.json").read_text()))


class NotingBackbone(DiffusersBackbone):
    """The library's backbone, which keeps what goes into the UNet and what comes out."""

    seen: tuple[torch.Tensor, torch.Tensor]

    def predict_noise(self, latent, timestep, features=None):
        output = super().predict_noise(latent, timestep, features)
        self.seen = latent, output
        return output


def library(outcome: Outcome, name: str, source: str, generator: str | None = None) -> NotingBackbone:
    """The base `name` in diffusers with its generator, or another's; `source` is "folder" or "checkpoint"."""
    places = {"folder": f"folders/{name}", "checkpoint": f"models/checkpoints/{name}.safetensors"}
    path = outcome.job / "models" / "icmsr" / f"{generator or name}.safetensors"
    backbone = load_backbone(Recipe(outcome.job / places[source], path))
    backbone.__class__ = NotingBackbone
    return backbone


def adapter_features(outcome: Outcome, family: str):
    """The diffusers adapter's residuals for the whole picture, as `TileFeatures`."""
    adapter = make_adapter(family, outcome.full)
    hint = outcome.results["hint"].movedim(-1, 1)
    hint = torch.nn.functional.interpolate(hint, tuple(4 * side for side in hint.shape[-2:]), mode="nearest-exact")
    hint = pad_to_multiple(hint, 64)

    def features(boxes):
        return [STRENGTH * level for level in adapter(hint)]

    return features


def scaled_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the scale of what is expected."""
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    return float((got - expected).abs().max()) / scale


def levels_apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two pictures, in levels of 255."""
    assert got.shape == expected.shape
    return 255 * float((got - expected).abs().max())


class LibraryRun(NamedTuple):
    backbone: NotingBackbone
    latent: torch.Tensor
    output: torch.Tensor
    picture: torch.Tensor


def upscale_noting(outcome: Outcome, backbone: NotingBackbone, features=None) -> LibraryRun:
    """The job's picture through the library, whole."""
    picture = upscale(backbone, outcome.results["picture"].movedim(-1, 1), UpscaleSettings(), features=features)
    assert float(picture.std()) > 0.02  # there is a picture
    return LibraryRun(backbone, *backbone.seen, picture)


def assert_parity(outcome: Outcome, name: str, expected: LibraryRun) -> None:
    """Latent, UNet output, clean latent and picture of the node's run `name` against the library's."""
    results, descriptor = outcome.results, expected.backbone.descriptor
    pairs = (expected.latent, expected.output), (results[f"{name} latent"], results[f"{name} output"])
    clean = [descriptor.schedule.x0_from_output(descriptor.prediction, *pair, descriptor.timestep) for pair in pairs]
    differences = {
        "latent": scaled_difference(pairs[1][0], pairs[0][0]),
        "output": scaled_difference(pairs[1][1], pairs[0][1]),
        "clean latent": scaled_difference(clean[1], clean[0]),
    }
    levels = levels_apart(results[f"{name} picture"].movedim(-1, 1), expected.picture)
    print(f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items()) + f", {levels:.4f}/255")
    assert max(differences.values()) <= TOLERANCE
    assert levels <= 1
