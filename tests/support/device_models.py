"""Models for tests on the pretend device."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.embedded import embedded_generator

NANO = Recipe(generator=embedded_generator())


def load(recipe: Recipe, device: str) -> DiffusersBackbone:
    return load_backbone(replace(recipe, device=device))


def condition_well(folder: Path) -> None:
    """Gives the layers of the networks in `folder` a gain of about 1, no biases, each residual branch a twentieth.

    The usual small weights let the signal fade from layer to layer while biases stay. A GroupNorm then sees a mean of
    many deviations, and makes large errors of rounding errors, which trained networks do not.
    """
    branches = ("conv2", "to_out.0", "proj_out", "ff.net.2", "conv.4")
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        for key, value in tensors.items():
            if value.ndim > 1:
                value.mul_(value[0].numel() ** -0.5 / value.std())
            elif key.endswith(".bias"):
                value.zero_()
            if key.rpartition(".")[0].endswith(branches):
                value.mul_(0.05)
        save_file(tensors, path)
