"""Table and plots of the collapse experiment (`collapse`): means over seeds, spread as standard deviation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...whole_file import replace_file
from ..run.plots import DPI, write_figure
from .spread import spread

CollapseResults = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""By condition and seed: what `Bench.run` returned."""
DIAGNOSTIC_LABELS = {
    "rho": r"$\rho$ = mean$|\epsilon_\phi-\epsilon_\psi|$ / mean$|\epsilon_\phi-\epsilon|$",
    "cos": r"cosine of $g$ and the SDS direction",
    "mse_auxiliary": r"auxiliary's error, mse($\epsilon_\psi$, $\epsilon$)",
    "mse_teacher": r"teacher's error, mse($\epsilon_\phi$, $\epsilon$)",
}
"""What plots call each diagnostic of `diagnostics`."""
COLLAPSED = {"rho": 1.0, "cos": 1.0, "mse_auxiliary": 0.0}
"""The value of each sign of collapse when the regulariser has collapsed."""
PHASES = {"frozen": "frozen generator", "joint": "after joint training"}
PHASE_COLOURS = {"frozen": "#1b6ca8", "joint": "#d1495b"}


def over_levels(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of a measure over the noise levels."""
    return sum(row[name] for row in rows) / len(rows)


def summary(results: CollapseResults) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """By condition, phase and measure: mean and deviation over the seeds of the mean over noise levels."""
    table: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for condition, seeds in results.items():
        table[condition] = {
            phase: {
                name: spread([over_levels(run[phase], name) for run in seeds.values()]) for name in DIAGNOSTIC_LABELS
            }
            for phase in PHASES
        }
        health = [run["health"] for run in seeds.values()]
        table[condition]["health"] = {
            name: spread([rows[1][name] / (rows[0][name] if name == "mse" else 1) for rows in health])
            for name in ("mse", "detail", "variety")
        }
    return table


def markdown(results: CollapseResults) -> str:
    """The table of `summary` in Markdown."""
    lines = [
        "| condition | rho | cos | mse auxiliary | mse teacher | rho, joint | cos, joint | mse auxiliary, joint "
        "| latent error after / before | detail / truth |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for condition, phases in summary(results).items():
        cells = [phases["frozen"][name] for name in DIAGNOSTIC_LABELS]
        cells += [phases["joint"][name] for name in ("rho", "cos", "mse_auxiliary")]
        cells += [phases["health"][name] for name in ("mse", "detail")]
        text = " | ".join(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in cells)
        lines.append(f"| {condition} | {text} |")
    return "\n".join(lines)


def conditions_figure(results: CollapseResults) -> Figure:
    """Every measure against the condition, from sparse to dense, for both phases."""
    table, names = summary(results), list(results)
    figure = Figure(figsize=(11, 7.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for panel, (name, label) in zip(axes.flat, DIAGNOSTIC_LABELS.items()):
        for offset, (phase, words) in zip((-0.08, 0.08), PHASES.items()):
            means, deviations = zip(*(table[condition][phase][name] for condition in names))
            places = [index + offset for index in range(len(names))]
            panel.errorbar(
                places,
                means,
                yerr=deviations,
                marker="o",
                markersize=5,
                linewidth=1.4,
                capsize=3,
                color=PHASE_COLOURS[phase],
                label=words,
            )
        collapsed = COLLAPSED.get(name)
        if collapsed is not None:
            panel.axhline(collapsed, color="#777777", linestyle="--", linewidth=1)
            panel.annotate(
                f"full collapse: {collapsed:g}",
                (0.02, collapsed),
                xycoords=("axes fraction", "data"),
                fontsize=9,
                xytext=(0, 3 if collapsed == 0 else -11),
                textcoords="offset points",
                color="#555555",
            )
        panel.set_title(label, fontsize=11)
        panel.grid(alpha=0.25)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    for panel in axes[1]:
        panel.set_xticks(range(len(names)), names, rotation=40, ha="right")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle("Held-out crops, t in [0.2, 0.8] T, mean and standard deviation over seeds", x=0.01, ha="left")
    return figure


def levels_figure(results: CollapseResults, shown: Sequence[str]) -> Figure:
    """Every measure against the noise level, frozen generator, for a few conditions; one thin line a seed."""
    figure = Figure(figsize=(11, 7.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    palette = ("#777777", "#2a9d8f", "#e9a03b", "#d1495b", "#6a4c93")
    for panel, (name, label) in zip(axes.flat, DIAGNOSTIC_LABELS.items()):
        for colour, condition in zip(palette, shown):
            for number, run in enumerate(results[condition].values()):
                rows = run["frozen"]
                panel.plot(
                    [row["t"] for row in rows],
                    [row[name] for row in rows],
                    color=colour,
                    linewidth=1.5,
                    alpha=0.8,
                    marker="o",
                    markersize=3,
                    label=condition if number == 0 else None,
                )
        collapsed = COLLAPSED.get(name)
        if collapsed is not None:
            panel.axhline(collapsed, color="#777777", linestyle="--", linewidth=1)
        panel.set_title(label, fontsize=11)
        panel.grid(alpha=0.25)
    for panel in axes[1]:
        panel.set_xlabel("noise level t / T")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(shown), frameon=False)
    figure.suptitle("Frozen generator, by noise level", x=0.01, ha="left")
    return figure


def write_report(results: CollapseResults, folder: Path) -> list[Path]:
    """``collapse.md`` (the table), ``collapse.json`` (every value) and two plots in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "collapse.md", folder / "collapse.json"]
    replace_file(files[0], (markdown(results) + "\n").encode())
    replace_file(files[1], (json.dumps(results, indent=1) + "\n").encode())
    shown = [name for name in ("none", "colormap 8", "icm", "image", "image of input") if name in results]
    for name, figure in (("conditions", conditions_figure(results)), ("levels", levels_figure(results, shown))):
        files.append(folder / f"collapse_{name}.png")
        write_figure(figure, files[-1])
    return files
