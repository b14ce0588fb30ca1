"""Tables, plot and picture of the teacher's view (`teacher_view`): means over pictures, with their standard errors."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...pictures.files import Picture, write_picture
from ...whole_file import replace_file
from ..run.plots import write_figure
from ..settings import shareable
from .spread import spread
from .teacher_view import MEASURES, NONE, View

LATENT_MEASURES = ("latent_mse", "coarse_mse")


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


def _mean_and_error(mean: str, error: str, values: Sequence[float]) -> dict[str, float]:
    centre, deviation = spread(values)
    return {mean: centre, error: deviation / math.sqrt(len(values))}
