"""How near the truth the teacher's clean estimate is, with a condition and without: the paper's second figure.

Pictures are encoded and noised; the frozen teacher estimates the clean latent from each noise level, without a
condition and with the features of each adapter, from the very same noised latents. The differences are therefore
paired: their standard error is over pictures, each the mean of its draws of noise.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ...backbone.protocol import Backbone
from ...conditions import colormap
from ...errors import IcmsrError
from ...measures.manifold import clean_estimates, decoded_pictures, latent_error, manifold_grid, seeded_noise
from ...measures.metrics import psnr_y
from ...pictures.files import FloatArray, Picture, find_pictures, from_tensor, read_picture, to_tensor, write_picture
from ...pictures.ranges import unit_to_signed
from ...runtime.diffusers_backbone import DiffusersBackbone, build_networks
from ...runtime.prompts import check_prompts, constant_prompt
from ...steps import Steps
from ...weights.base import BaseFolder
from ...whole_file import replace_file
from ..networks.conditioning import WITHOUT_ADAPTER, ConditionConfig, StructureFeatures
from ..run.plots import write_figure
from ..settings import shareable
from ..tasks.building import latent_factor, level_widths
from .collapse_report import spread

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
LATENT_MEASURES = ("latent_mse", "coarse_mse")


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


def summary(view: View) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By arm and measure a row for each timestep: ``t``, ``mean`` over pictures and its standard ``error``.

    Arms other than "none" also have the mean paired ``difference`` to it and that one's ``difference_error``.
    """
    table: dict[str, dict[str, list[dict[str, float]]]] = {}
    for arm, measures in view.values.items():
        table[arm] = {name: [] for name in measures}
        for name, levels in measures.items():
            for t, values, plain in zip(view.timesteps, levels, view.values[NONE][name]):
                row = {"t": float(t), **_mean_and_error("mean", "error", values)}
                if arm != NONE:
                    paired = [value - other for value, other in zip(values, plain)]
                    row |= _mean_and_error("difference", "difference_error", paired)
                table[arm][name].append(row)
    return table


def _mean_and_error(mean: str, error: str, values: Sequence[float]) -> dict[str, float]:
    centre, deviation = spread(values)
    return {mean: centre, error: deviation / math.sqrt(len(values))}


def markdown(view: View) -> str:
    """A table in Markdown for each measure: a row for each timestep, every arm and its paired difference to "none"."""
    table, parts = summary(view), []
    for name, (title, digits, compared) in MEASURES.items():
        head = ["t", NONE, *(words for arm in table if arm != NONE for words in (arm, f"{arm} − {NONE}"))]
        lines = [f"**{title}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for level, t in enumerate(view.timesteps):
            cells = [str(t)]
            for arm, measures in table.items():
                row = measures[name][level]
                cells.append(f"{row['mean']:.{digits}f}")
                if arm != NONE:
                    cells.append(f"{row['difference']:+.{digits}f} ± {row['difference_error']:.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"In comparison, {compared}: {view.reference[name]:.{digits}f}."]
        parts.append("\n".join(lines))
    note = f"{len(view.pictures)} pictures; ± is the standard error of the paired difference over them."
    return "\n\n".join([*parts, note])


def error_figure(view: View) -> Figure:
    """A column for each measure: above every arm's mean by timestep, below the paired differences to "none".

    The latent's errors span orders of magnitude: their axes are logarithmic, the differences per cent of "none".
    """
    table = summary(view)
    colours = dict(zip(table, itertools.cycle(("#777777", "#1b6ca8", "#d1495b", "#2a9d8f", "#e9a03b", "#6a4c93"))))
    figure = Figure(figsize=(16, 6.6), layout="constrained")
    panels: Any = figure.subplots(2, len(MEASURES), sharex=True)
    for (above, below), (name, (title, _, compared)) in zip(panels.T, MEASURES.items()):
        relative = name in LATENT_MEASURES
        for arm, measures in table.items():
            _line(above, measures[name], "mean", "error", colours[arm], arm)
            if arm != NONE:
                scale = [100 / row["mean"] if relative else 1.0 for row in table[NONE][name]]
                _line(below, measures[name], "difference", "difference_error", colours[arm], arm, scale)
        above.set_yscale("log" if relative else "linear")
        above.axhline(
            view.reference[name], color="#222222", linestyle="--" if relative else ":", linewidth=1.2, label=compared
        )
        above.set_title(title, fontsize=11)
        below.axhline(0, color=colours[NONE], linewidth=1.2)
        below.set_ylabel(f"difference to {NONE!r}" + (", per cent" if relative else ""))
        below.set_xlabel("timestep t")
    entries = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(list(entries.values()), list(entries), loc="outside upper right", ncols=8, frameon=False)
    figure.suptitle(
        f"Teacher's clean estimate, {len(view.pictures)} pictures, ± standard error", x=0.01, ha="left", fontsize=12
    )
    return figure


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, float]],
    key: str,
    error: str,
    colour: str,
    label: str,
    scale: Sequence[float] | None = None,
) -> None:
    factors = np.array(scale or [1.0] * len(rows))
    t, values, errors = (np.array([row[name] for row in rows]) for name in ("t", key, error))
    axes.errorbar(
        t,
        values * factors,
        yerr=errors * factors,
        color=colour,
        label=label,
        marker="o",
        markersize=4,
        linewidth=1.5,
        capsize=3,
    )
    axes.grid(visible=True, alpha=0.25)


def write_view(view: View, settings: Mapping[str, Any], folder: Path) -> list[Path]:
    """teacher_view.json (all values), teacher_view.md (the tables), error_by_noise.png and grid.png in `folder`.

    `settings` go into the JSON without paths.
    """
    names = ("teacher_view.json", "teacher_view.md", "error_by_noise.png", "grid.png")
    files = [folder / name for name in names]
    shared = shareable({key: value for key, value in settings.items() if key not in ("out", "pictures")})
    content = {
        "settings": shared,
        "pictures": view.pictures,
        "timesteps": view.timesteps,
        "summary": summary(view),
        "reference": view.reference,
        "values": view.values,
    }
    replace_file(files[0], (json.dumps(content, indent=1) + "\n").encode())
    replace_file(files[1], (markdown(view) + "\n").encode())
    write_figure(error_figure(view), files[2])
    write_picture(files[3], Picture(view.grid))
    return files
