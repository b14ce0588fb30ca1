"""How near the truth the teacher's clean estimate is, with a condition and without: the paper's second figure.

Pictures are encoded and noised; the frozen teacher estimates the clean latent from each noise level, without a
condition and with the features of each adapter, from the very same noised latents. The differences are therefore
paired: their standard error is over pictures, each the mean of its draws of noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbone.protocol import Backbone
from ...conditions import colormap
from ...errors import IcmsrError
from ...measures.manifold import clean_estimates, decoded_pictures, latent_error, manifold_grid, seeded_noise
from ...measures.metrics import psnr_y
from ...pictures.files import FloatArray, find_pictures, from_tensor, read_picture, to_tensor
from ...pictures.ranges import unit_to_signed
from ...runtime.diffusers_backbone import DiffusersBackbone, build_networks
from ...runtime.prompts import check_prompts, constant_prompt
from ...steps import Steps
from ...weights.base import BaseFolder
from ..networks.conditioning import WITHOUT_ADAPTER, ConditionConfig, StructureFeatures
from ..tasks.building import latent_factor, level_widths

NONE = "none"
"""The arm without a condition, which is always there."""
COLOR_CELLS = 8
"""Cells along each side of the colormap by which colours are compared: the paper's."""
MEASURES = {
    "latent_mse": ("error of the latent, mean square", 4, "an estimate of zeros"),
    "coarse_mse": (f"the same of its {COLOR_CELLS}x{COLOR_CELLS} cells' means", 4, "an estimate of zeros"),
    "psnr_y": ("PSNR of Y, dB", 2, "the truth's own latent, decoded"),
    "color": (f"error of the {COLOR_CELLS}x{COLOR_CELLS} colormap, 1/255", 2, "the truth's own latent, decoded"),
}
"""By name: what tables and plots call a measure, its decimals, what it is compared with. Less is better, PSNR apart.

The first two need no decoder: what they say of tones and layout holds for a base whose decoder is weak in colours. An
estimate of zeros knows nothing of the picture; nothing in the latent does better than the truth's own one.
"""


@dataclass(frozen=True)
class ViewConfig:
    """What is looked at."""

    pictures: str
    """Folder of sharp pictures that neither the base nor the adapters were trained on."""
    arms: dict[str, ConditionConfig] = field(default_factory=dict)
    """Conditions by the name that table and plot call them; the arm "none" is always there."""
    base: str = ""
    """Base folder whose prior is the teacher; empty for the embedded nano."""
    count: int = 100
    """Most pictures, the first by name."""
    crop: int = 256
    """Side in pixels of the crop from the middle of each picture."""
    cells: int = 0
    """Cells along each side of the colormaps, where a crop has others than the arm's own: an adapter trained with 2 on
    128 px sees cells of the same size with 4 on 256. 0 for the arm's own."""
    timesteps: tuple[int, ...] = (50, 200, 400, 600, 800, 950)
    """Noise levels, ascending."""
    draws: int = 4
    """Draws of noise for each picture; the same ones in every arm and at every timestep."""
    seed: int = 0
    """Seed of the noise."""
    shown: int = 2
    """Pictures in the grid, with their first draw of noise."""

    def __post_init__(self) -> None:
        if not self.arms or NONE in self.arms:
            raise IcmsrError(
                f"arms must name one or more conditions other than {NONE!r}, got {list(self.arms)}: give "
                "one its adapter, as with --arms.icm.adapters=\"['FILE']\""
            )
        for name, arm in self.arms.items():
            if arm.kind in WITHOUT_ADAPTER:
                raise IcmsrError(f"arms.{name}: the condition {arm.kind} has no adapter: choose icm, colormap, ...")
            if arm.source != "truth" or arm.guidance != 1:
                raise IcmsrError(
                    f"arms.{name}: source must be truth and guidance 1 here, got {arm.source} and {arm.guidance:g}"
                )
        if not self.timesteps or any(a >= b for a, b in zip(self.timesteps, self.timesteps[1:])):
            raise IcmsrError(f"timesteps must be one or more and ascend, got {list(self.timesteps)}")
        for key, least in (("count", 2), ("draws", 1), ("shown", 1), ("crop", COLOR_CELLS), ("seed", 0)):
            if getattr(self, key) < least:
                raise IcmsrError(f"{key} must be at least {least}, got {getattr(self, key)}")
        if not 0 <= self.cells <= 64:
            raise IcmsrError(f"cells must be between 1 and 64, or 0 for each arm's own, got {self.cells}")


@dataclass(frozen=True)
class View:
    """What `measure_view` found."""

    timesteps: tuple[int, ...]
    """Noise levels."""
    pictures: tuple[str, ...]
    """File names."""
    values: Mapping[str, Mapping[str, list[list[float]]]]
    """By arm ("none" first) and measure: for each timestep the pictures' values, each the mean of its draws."""
    reference: Mapping[str, float]
    """By measure: the mean of what it is compared with."""
    grid: FloatArray
    """Picture [H, W, 3] in [0, 1]: truth, noised latents, estimates."""


Arms = Mapping[str, tuple[ConditionConfig, StructureFeatures]]


def check_view(config: ViewConfig, base: BaseFolder) -> None:
    """Raises `IcmsrError` where `config` and `base` do not go together or an adapter does not fit; reads no weights."""
    multiple = base.descriptor().multiple_of
    if config.crop % multiple:
        raise IcmsrError(f"crop must be a multiple of {multiple} for the base {base.info.name}, got {config.crop}")
    for t in config.timesteps:
        base.schedule.check_timestep(t)
    if base.prompt_embedding() is None:
        check_prompts(base)
    for name, arm in config.arms.items():
        try:
            arm.check_files(latent_factor(base), level_widths(base))
        except IcmsrError as error:
            raise IcmsrError(f"arms.{name}: {error}") from error


def read_crops(config: ViewConfig) -> tuple[tuple[str, ...], Tensor]:
    """File names, and the middle of each picture: [N, 3, crop, crop], float32 in [0, 1].

    Raises `IcmsrError` where fewer than two pictures are there, and for one that is smaller than the crop.
    """
    paths = find_pictures(config.pictures)[: config.count]
    if len(paths) < 2:
        raise IcmsrError(f"{config.pictures}: {len(paths)} pictures, a standard error needs 2: choose another folder")
    crops, side = [], config.crop
    for path in paths:
        picture = read_picture(path).rgb
        height, width = picture.shape[:2]
        if min(height, width) < side:
            raise IcmsrError(
                f"{path}: {width} x {height} is smaller than the crop of {side}: lower crop, or leave it out"
            )
        top, left = (height - side) // 2, (width - side) // 2
        crops.append(to_tensor(picture[top : top + side, left : left + side]))
    return tuple(path.name for path in paths), torch.cat(crops)


def open_teacher(base: BaseFolder, device: torch.device) -> DiffusersBackbone:
    """The bare prior of `base` in float32, with the context that it was trained with."""
    context = constant_prompt(base, None, device)
    return DiffusersBackbone(*build_networks(base), base.descriptor(), context, device, torch.float32)


def load_arms(config: ViewConfig, base: BaseFolder, device: torch.device) -> Arms:
    """Each arm's condition, with the cells of `config`, and its adapters."""
    factor, widths = latent_factor(base), level_widths(base)
    return {
        name: (
            dataclasses.replace(arm, cells=config.cells or arm.cells),
            StructureFeatures.load(arm, factor, widths).to(device),
        )
        for name, arm in config.arms.items()
    }


@torch.no_grad()
def measure_view(
    backbone: Backbone,
    arms: Arms,
    names: tuple[str, ...],
    crops: Tensor,
    config: ViewConfig,
    device: torch.device,
    steps: Steps | None = None,
) -> View:
    """The measures of `MEASURES` for `crops` [N, 3, H, W] in [0, 1] called `names`; a grid of the first ones.

    `steps` counts the pictures.
    """
    values: dict[str, dict[str, list[list[float]]]] = {
        name: {key: [[] for _ in config.timesteps] for key in MEASURES} for name in (NONE, *arms)
    }
    reference: dict[str, list[float]] = {key: [] for key in MEASURES}
    grids: list[FloatArray] = []
    steps = steps or Steps()
    steps.begin(len(crops))
    for number, crop in enumerate(crops.to(device).split(1)):
        truth = from_tensor(crop)
        latent = backbone.encode(unit_to_signed(crop))
        decoded = decoded_pictures(backbone, latent)
        for key, value in (_latent_errors(latent * 0, latent) | _picture_errors(decoded, truth)).items():
            reference[key].append(value)
        latent = latent.expand(config.draws, -1, -1, -1)
        # A million seeds apart, so that no picture of another seed's run has the same noise.
        noise = seeded_noise(latent, config.seed * 1_000_000 + number)
        rows: dict[str, list[FloatArray]] = {}
        maps: dict[str, dict[str, FloatArray]] = {}
        if number < config.shown:
            noised = [backbone.descriptor.schedule.add_noise(latent[:1], noise[:1], t) for t in config.timesteps]
            rows["noised"] = [decoded_pictures(backbone, one)[0] for one in noised]
            maps["noised"] = {"its latent, decoded": decoded[0]}
        for name in (NONE, *arms):
            features = None
            if name in arms:
                condition, adapters = arms[name]
                seen = condition.maps(crop)
                maps[name] = {key: from_tensor(one) for key, one in zip(condition.names, condition.shown(seen))}
                features = [level.expand(config.draws, -1, -1, -1) for level in adapters(seen)]
            rows[name] = []
            estimates = clean_estimates(backbone, latent, config.timesteps, noise, features)
            for level, estimate in enumerate(estimates):
                pictures = decoded_pictures(backbone, estimate)
                for key, value in (_latent_errors(estimate, latent) | _picture_errors(pictures, truth)).items():
                    values[name][key][level].append(value)
                rows[name].append(pictures[0])
        if number < config.shown:
            grids += [manifold_grid(truth, config.timesteps, rows, maps)]
        steps.advance()
    means = {key: sum(some) / len(some) for key, some in reference.items()}
    return View(config.timesteps, names, values, means, np.vstack(grids))


def _latent_errors(estimate: Tensor, latent: Tensor) -> dict[str, float]:
    """Mean squared errors of the latent, and of its means in coarse cells."""
    coarse = latent_error(*(F.adaptive_avg_pool2d(one, COLOR_CELLS) for one in (estimate, latent)))
    return {"latent_mse": float(latent_error(estimate, latent).mean()), "coarse_mse": float(coarse.mean())}


def _picture_errors(pictures: list[FloatArray], truth: FloatArray) -> dict[str, float]:
    """PSNR of Y in dB, and the mean absolute difference of the colormaps in 1/255: means over `pictures`."""
    # The cells' means, not the paper's cubic sampling: that looks at 16 pixels of a cell, whose noise is no colour.
    maps = [colormap(to_tensor(one), (COLOR_CELLS, COLOR_CELLS), "area") for one in (truth, *pictures)]
    return {
        "psnr_y": sum(psnr_y(picture, truth) for picture in pictures) / len(pictures),
        "color": 255 * float((torch.cat(maps[1:]) - maps[0]).abs().mean()),
    }
