"""Tables, plots and crops of the ablation (`ablation`): means over seeds, spread as standard deviation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ...pictures.files import FloatArray, read_picture
from ...whole_file import replace_file
from ..run.plots import DPI, write_figure
from .ablation import ARMS, PAIRS, PHOTOGRAPHS, REFERENCES, START, AblationConfig
from .collapse_report import DIAGNOSTIC_LABELS
from .spread import spread

AblationResults = Mapping[str, Any]
"""What `load_results` returns."""
Table = dict[str, dict[str, dict[str, tuple[float, float]]]]
"""By set of pictures, arm and measure: mean and deviation over the seeds."""
COLUMNS = {
    "psnr": ("PSNR-Y", 3),
    "ssim": ("SSIM-Y", 4),
    "fsim": ("FSIM", 4),
    "dss": ("DSS", 4),
    "srsim": ("SR-SIM", 4),
    "hf": ("high frequencies", 3),
    "color": ("colour shift", 2),
}
"""Heading and digits of each measure; others go by their own name, with four."""
TITLES = {PAIRS: "Real pairs", PHOTOGRAPHS: "Held-out photographs"}
ARM_COLOURS = dict(zip(ARMS, ("#444444", "#1b6ca8", "#2a9d8f", "#e9a03b", "#d1495b", "#6a4c93")))
BASELINE = "reconstruction"
UNCONDITIONED = "none"
DETAILS = ("dss", "hf", "fsim")
"""Measures of detail that are plotted against PSNR."""
CROP, CROPS = 112, 3
"""Side and number of the crops shown."""


def load_results(config: AblationConfig) -> dict[str, Any]:
    """``budget`` (what every run had), ``references`` by name, ``arms`` by name and seed (as text, as in JSON)."""

    def read(arm: str, seed: int) -> Any:
        return json.loads(config.result_file(arm, seed).read_text(encoding="utf-8"))

    losses = config.generator.losses
    budget = {
        "images": config.loop.images,
        "images of the start": config.start.images,
        "batch": config.loop.batch,
        "crop": config.data.crop,
        "learning rate": config.loop.learning_rate,
        "losses": losses.terms(),
        "warmup": losses.warmup,
        "perceptual": asdict(config.generator.perceptual),
        "auxiliary rank": config.generator.networks.auxiliary_rank,
        "auxiliary learning rate": config.generator.auxiliary_learning_rate * config.loop.learning_rate,
    }
    return {
        "budget": budget,
        "references": {name: read(name, 0) for name in REFERENCES},
        "arms": {arm: {str(seed): read(arm, seed) for seed in config.seeds} for arm in config.arms},
    }


def run_means(values: Mapping[str, Any], pictures: str) -> dict[str, float]:
    """The mean of each measure over the pictures of one run for which it is defined."""
    rows = values[pictures].values()
    found = {name: [row[name] for row in rows if row[name] is not None] for name in next(iter(rows))}
    return {name: sum(numbers) / len(numbers) for name, numbers in found.items() if numbers}


def summary(results: AblationResults) -> Table:
    """Every arm's measures; of `REFERENCES` too, which are one run each."""
    runs = {name: [values] for name, values in results["references"].items()}
    runs |= {arm: list(seeds.values()) for arm, seeds in results["arms"].items()}
    return {
        pictures: {name: _spreads([run_means(values, pictures) for values in some]) for name, some in runs.items()}
        for pictures in picture_sets(results)
    }


def differences(results: AblationResults, baseline: str = BASELINE) -> Table:
    """Every arm's measures less those of `baseline` with the same seed; empty without that arm.

    Those of `BASELINE` itself stand against no other arm.
    """
    table: Table = {}
    for pictures in picture_sets(results) if baseline in results["arms"] else ():
        base = {seed: run_means(values, pictures) for seed, values in results["arms"][baseline].items()}
        table[pictures] = {
            arm: _spreads(
                [
                    {name: value - base[seed][name] for name, value in run_means(values, pictures).items()}
                    for seed, values in seeds.items()
                ]
            )
            for arm, seeds in results["arms"].items()
            if arm not in (BASELINE, baseline)
        }
    return table


def diagnostics_table(results: AblationResults) -> dict[str, dict[str, tuple[float, float]]]:
    """By arm that has a regulariser: its diagnostics at the end of training."""
    found = {arm: [values["diagnostics"] for values in seeds.values()] for arm, seeds in results["arms"].items()}
    return {arm: _spreads(rows) for arm, rows in found.items() if rows[0]}


def picture_sets(results: AblationResults) -> list[str]:
    """The sets of pictures that were measured, the real pairs first."""
    return [name for name in (PAIRS, PHOTOGRAPHS) if name in results["references"][START]]


def markdown(results: AblationResults) -> str:
    """The tables in Markdown: for each set of pictures values and differences, then the diagnostics."""
    lines, apart = [], {arm: differences(results, arm) for arm in (BASELINE, UNCONDITIONED)}
    for pictures, rows in summary(results).items():
        count = len(results["references"][START][pictures])
        names = list(rows[START])
        heads = [COLUMNS.get(name, (name, 4))[0] for name in names]
        lines += [f"{TITLES[pictures]}, {count} pictures:", "", *_table("arm", heads, names, rows, "")]
        for baseline, table in apart.items():
            if table.get(pictures):
                lines += [f"Difference to {baseline}, seed by seed:", ""]
                lines += _table("arm", heads, names, table[pictures], "+")
    diagnostics = diagnostics_table(results)
    if diagnostics:
        names = list(DIAGNOSTIC_LABELS)
        heads = [name.replace("_", " ") for name in names]
        lines += ["Diagnostics, t in [0.2, 0.8] T, last quarter of the run:", ""]
        lines += _table("arm", heads, names, diagnostics, "")
    return "\n".join(lines).rstrip()


def _details(results: AblationResults) -> list[str]:
    """The measures of detail that were taken; none where there is no PSNR to set against them."""
    taken = summary(results)[picture_sets(results)[0]][START]
    return [name for name in DETAILS if name in taken and "psnr" in taken]


def tradeoff_figure(results: AblationResults) -> Figure:
    """Detail against fidelity: a row for each set of pictures; small marks are runs, large ones the arms' means."""
    sets, shown, table = picture_sets(results), _details(results), summary(results)
    figure = Figure(
        figsize=(4.8 * len(shown) + 0.6, 3.9 * len(sets)), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12)
    )
    grid = figure.subplots(len(sets), len(shown), squeeze=False)
    for line, pictures in zip(grid, sets):
        for axes, name in zip(line, shown):
            for arm, seeds in results["arms"].items():
                runs, colour = [run_means(values, pictures) for values in seeds.values()], ARM_COLOURS[arm]
                axes.scatter(
                    [run["psnr"] for run in runs],
                    [run[name] for run in runs],
                    s=22,
                    color=colour,
                    alpha=0.5,
                    linewidths=0,
                )
                means = table[pictures][arm]
                axes.scatter(
                    means["psnr"][0],
                    means[name][0],
                    s=95,
                    color=colour,
                    marker="D",
                    label=arm,
                    edgecolors="white",
                    linewidths=1,
                )
            start = table[pictures][START]
            axes.scatter(start["psnr"][0], start[name][0], s=70, color="#999999", marker="X", label="common start")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel("PSNR-Y, dB")
            axes.set_ylabel(COLUMNS[name][0])
            axes.set_title(TITLES[pictures], fontsize=11)
            axes.grid(alpha=0.25)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def curves_figure(results: AblationResults) -> Figure:
    """What the training logs say: fidelity in training, the auxiliary's loss, the diagnostics; bands are the seeds."""
    panels = {
        "psnr": "PSNR on the training crops, dB",
        "perceptual": "perceptual distance",
        "auxiliary": "auxiliary's loss, all t",
        "rho": DIAGNOSTIC_LABELS["rho"],
        "cos": DIAGNOSTIC_LABELS["cos"],
        "mse_auxiliary": DIAGNOSTIC_LABELS["mse_auxiliary"],
    }
    figure = Figure(figsize=(13.5, 7), dpi=DPI, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, panels.items()):
        for arm, seeds in results["arms"].items():
            curves = [
                [(point["images"], point[name]) for point in values["curve"] if name in point]
                for values in seeds.values()
            ]
            length = min(map(len, curves))
            if length:
                images = [images for images, _ in curves[0][:length]]
                values = np.array([[value for _, value in curve[:length]] for curve in curves])
                smooth = np.array([_smoothed(row) for row in values])
                axes.plot(images, smooth.mean(0), color=ARM_COLOURS[arm], linewidth=1.6, label=arm)
                axes.fill_between(images, smooth.min(0), smooth.max(0), color=ARM_COLOURS[arm], alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("images")
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def crops_figure(config: AblationConfig) -> Figure:
    """A crop of each of three held-out photographs: input, each arm's first seed, truth."""
    folder = config.folder(PHOTOGRAPHS)
    names = sorted(path.stem for path in (folder / "hr").glob("*.png"))
    chosen = [names[number * len(names) // CROPS] for number in range(min(CROPS, len(names)))]
    columns = {"bicubic": config.folder("pictures", "bicubic")}
    columns |= {arm: config.folder("pictures", arm) for arm in config.arms} | {"truth": folder / "hr"}
    figure = Figure(figsize=(2.15 * len(columns), 2.25 * len(chosen)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(chosen), len(columns), squeeze=False)
    for row, name in enumerate(chosen):
        top, left, side = detailed_crop(read_picture(folder / "hr" / f"{name}.png").rgb)
        for axes, (title, place) in zip(grid[row], columns.items()):
            picture = read_picture(place / f"{name}.png").rgb[top : top + side, left : left + side]
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=12)
    return figure


def detailed_crop(picture: FloatArray) -> tuple[int, int, int]:
    """Top, left and side of a square crop of `picture` [H, W, 3] that is richer in gradients than four in five.

    Not the richest: what is finest is beyond every method at this scale.
    """
    side = min(CROP, *picture.shape[:2])
    grey = picture.mean(axis=2)
    slopes = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1]).astype(np.float64)
    sums = cv2.boxFilter(slopes, cv2.CV_64F, (side - 1, side - 1), anchor=(0, 0), normalize=False)
    places = np.asarray(sums)[: picture.shape[0] - side + 1 : 8, : picture.shape[1] - side + 1 : 8]
    chosen = np.argsort(places, axis=None)[round(0.8 * (places.size - 1))]
    top, left = np.unravel_index(int(chosen), places.shape)
    return int(top) * 8, int(left) * 8, side


def write_report(results: AblationResults, config: AblationConfig) -> list[Path]:
    """``ablation.md`` (the tables), ``ablation.json`` (every value), the plots and the crops, in RUN/report.

    Without PSNR, or without a measure of detail (`DETAILS`), there is no plot of one against the other.
    """
    folder = config.folder("report")
    files = [folder / "ablation.md", folder / "ablation.json"]
    replace_file(files[0], (markdown(results) + "\n").encode())
    replace_file(files[1], (json.dumps(results, allow_nan=False) + "\n").encode())
    figures = {"curves": curves_figure(results), "crops": crops_figure(config)}
    if _details(results):
        figures["tradeoff"] = tradeoff_figure(results)
    for name, figure in figures.items():
        files.append(folder / f"ablation_{name}.png")
        write_figure(figure, files[-1])
    return files


def _table(
    first: str,
    heads: Sequence[str],
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, tuple[float, float]]],
    sign: str,
) -> list[str]:
    lines = [f"| {' | '.join([first, *heads])} |", f"|{'---|' * (len(heads) + 1)}"]
    for row, values in rows.items():
        cells = []
        for name in names:
            digits = COLUMNS.get(name, (name, 4))[1]
            mean, deviation = values[name]
            text = f"{mean:{sign}.{digits}f}"
            # One run has no spread: neither a reference nor an arm with one seed.
            cells.append(text if row in REFERENCES or not deviation else f"{text} ± {deviation:.{digits}f}")
        lines.append(f"| {' | '.join([row, *cells])} |")
    return [*lines, ""]


def _spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    return {name: spread([row[name] for row in rows]) for name in rows[0]}


def _smoothed(values: Any, half: int = 2) -> Any:
    """Centred running mean, shorter at the ends."""
    return np.array([values[max(0, at - half) : at + half + 1].mean() for at in range(len(values))])
