"""Pictures of a run, from its metrics.jsonl: losses, the regulariser's diagnostics, the health of the training.

matplotlib's objects alone are used, never pyplot: nothing global is touched, and no display is needed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ...whole_file import replace_file
from .logs import METRICS_FILE, read_metrics

Rows = Sequence[Mapping[str, Any]]
Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
PLOTS_FOLDER = "plots"
DPI = 110
COLLAPSE_RANGE = (0.2, 0.8)
"""Timesteps, in T, for which collapse means something: below, no network knows the noise; above, every one does."""
RED = "#c0392b"

DIAGNOSTIC_TITLES = {
    "rho": ("gradient's size over SDS's, ρ", r"mean|$ε_φ − ε_ψ$| / mean|$ε_φ − ε$|"),
    "cos": ("gradient's direction against SDS's", r"cos($ε_φ − ε_ψ$, $ε_φ − ε$)"),
    "mse_teacher": ("teacher's error", r"mse($ε_φ$, $ε$)"),
    "mse_auxiliary": ("auxiliary's error", r"mse($ε_ψ$, $ε$)"),
}
"""Title and vertical axis of each quantity ``icm/QUANTITY/BIN``, by quantity: φ is the teacher, ψ the auxiliary."""
COLLAPSE = {"rho": (0.9, 1.1), "cos": (0.9, 1.0), "mse_auxiliary": (0.0, 0.01)}
"""The band that is shaded as collapse: rho and cos go to 1, the auxiliary's error to 0. Its width is ours."""
COLLAPSE_NOTE = "collapse: solid lines in all three bands at once\n(dashed: timesteps at which the bands mean little)"


def plot_run(run: Path) -> list[Path]:
    """Draws what `run`/metrics.jsonl holds into PNGs in `run`/plots, each written atomically, and names them.

    losses.png, diagnostics.png and health.png; one without metrics in the log is skipped. Raises `IcmsrError`
    as `read_metrics` does.
    """
    rows = read_metrics(run / METRICS_FILE)
    builders: dict[str, Callable[[Rows], Figure | None]] = {
        "losses.png": losses_figure,
        "diagnostics.png": diagnostics_figure,
        "health.png": health_figure,
    }
    written = []
    for name, build in builders.items():
        figure = build(rows)
        if figure is not None:
            written.append(run / PLOTS_FOLDER / name)
            write_figure(figure, written[-1])
    return written


def write_figure(figure: Figure, path: Path) -> None:
    """`figure` as a PNG at `path`, which is replaced atomically; the folder is made."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    replace_file(path, buffer.getvalue())


def losses_figure(rows: Rows) -> Figure | None:
    """One panel for every ``loss/NAME``: each value, a smoothed line, a logarithmic axis where all are positive."""
    keys = _keys(rows, "loss/")
    if not keys:
        return None
    figure, panels = _panels(len(keys))
    for axes, key in zip(panels, keys):
        _draw(axes, series(rows, key), "C0")
        _finish(axes, _readable(key.removeprefix("loss/")), "loss", log="positive")
    return figure


def diagnostics_figure(rows: Rows) -> Figure | None:
    """One panel for every quantity of the regulariser, ``icm/QUANTITY/BIN``, and one line for every bin of timesteps.

    Where collapse lies is shaded. Bins outside `COLLAPSE_RANGE` are dashed: there the lines may enter it unharmed.
    """
    found = {name: _bins(rows, f"icm/{name}/") for name in DIAGNOSTIC_TITLES}
    found = {name: bins for name, bins in found.items() if bins}
    if not found:
        return None
    bins = sorted({bounds for those in found.values() for bounds in those})
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(bins)))  # not the yellow, faint on white
    figure, panels = _panels(len(found), columns=2)
    handles: dict[str, Any] = {}
    for axes, (name, keys) in zip(panels, found.items()):
        for bounds, colour in zip(bins, colours):
            if bounds in keys:
                inside = COLLAPSE_RANGE[0] <= bounds[0] and bounds[1] <= COLLAPSE_RANGE[1]
                label = f"{bounds[0]:g}–{bounds[1]:g}"
                handles[label] = _draw(axes, series(rows, keys[bounds]), colour, "-" if inside else (0, (4, 2)))
        title, unit = DIAGNOSTIC_TITLES[name]
        _finish(axes, title, unit, log="positive" if name.startswith("mse") else "never")
        band = _shade_collapse(axes, name)
        if band is not None:
            handles.setdefault("collapse", band)
    if "collapse" in handles:
        handles["collapse"] = handles.pop("collapse")  # last in the legend
    legend = figure.legend(
        list(handles.values()), list(handles), loc="outside right upper", title="timestep / T", frameon=False
    )
    legend.set_gid("bins")
    if "collapse" in handles:
        figure.supxlabel(COLLAPSE_NOTE, fontsize=8, color=RED)
    return figure


def health_figure(rows: Rows) -> Figure | None:
    """Panels for ``health/NAME``, one for all of ``health/GROUP/NAME`` together, and one for the ``lr/NAME``.

    Counts are drawn in steps; the axis is logarithmic where the values are positive and span a factor above 20.
    """
    groups: dict[str, dict[str, str]] = {}
    for key in _keys(rows, "health/"):
        group, _, name = key.removeprefix("health/").partition("/")
        groups.setdefault(group, {})[name] = key
    rates = {key.removeprefix("lr/"): key for key in _keys(rows, "lr/")}
    if rates:
        groups["learning rate"] = rates
    if not groups:
        return None
    figure, panels = _panels(len(groups))
    for axes, (group, members) in zip(panels, groups.items()):
        for index, (name, key) in enumerate(members.items()):
            points = series(rows, key)
            if is_count(points[1]):
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.plot(*points, color=f"C{index}", drawstyle="steps-post", label=_readable(name), gid="count")
            else:
                _draw(axes, points, f"C{index}", label=_readable(name), smooth=group != "learning rate")
        _finish(axes, _readable(group), "", log="never" if group == "learning rate" else "wide", room=any(members))
        if any(members):  # names above the panel cover no data
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 0.98),
                ncols=4,
                frameon=False,
                fontsize=8,
                handlelength=1.2,
                columnspacing=1.0,
            )
    return figure


def series(rows: Rows, key: str) -> Series:
    """Images seen and values of the rows that have `key`; NaN where the value was not finite."""
    pairs = [(row["images"], row[key]) for row in rows if key in row]
    images = np.array([pair[0] for pair in pairs], np.float64)
    return images, np.array([math.nan if pair[1] is None else pair[1] for pair in pairs], np.float64)


def is_count(values: npt.NDArray[np.float64]) -> bool:
    """Whether all values are whole numbers, such as those of skipped steps: drawn in steps and not smoothed."""
    return bool(np.isfinite(values).all() and (values % 1 == 0).all())


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centred running mean over a twentieth of the values, fewer at the ends; NaN values do not count."""
    half = len(values) // 40
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    position = np.arange(len(values))
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _draw(
    axes: Axes, points: Series, colour: Any, style: Any = "-", label: str | None = None, smooth: bool = True
) -> Any:
    """The raw values, faint, under their smoothed line, which is returned; few values are one line with dots.

    Values that were not finite are crosses at the foot of the panel.
    """
    images, values = points
    known, many = np.isfinite(values), len(values) >= 40
    if not known.all():
        foot = np.full(int((~known).sum()), 0.03)
        axes.plot(images[~known], foot, "x", color=RED, transform=axes.get_xaxis_transform(), gid="not finite")
        axes.set_title("× not finite", loc="right", color=RED, fontsize=8)
    if smooth and many:
        axes.plot(images, values, color=colour, alpha=0.25, linewidth=0.7, gid="raw")
        values = smoothed(values)
    marker = None if many else "."
    return axes.plot(images, values, color=colour, linestyle=style, linewidth=1.5, marker=marker, label=label)[0]


def _finish(axes: Axes, title: str, unit: str, log: str, room: bool = False) -> None:
    """Title, names of the axes, grid; a logarithmic axis "never", if all is "positive", or if it is also "wide"."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=20 if room else 6)
    axes.set_xlabel("images seen", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(True, alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = [line for line in axes.lines if line.get_gid() != "not finite"]
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in lines])
    values = values[np.isfinite(values)]
    spread = values.max() / values.min() if len(values) and values.min() > 0 else 0.0
    counts = any(line.get_gid() == "count" for line in lines)
    if spread and not counts and (log == "positive" or (log == "wide" and spread > 20)):
        axes.set_yscale("log")
        subs = (1, 1.5, 2, 3, 5, 7) if spread < 8 else (1, 2, 5) if spread < 500 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif counts and len(values):
        top = max(1.0, 1.05 * values.max())
        axes.set_ylim(min(0.0, values.min()) - 0.03 * top, top)  # a line at 0 stands clear of the axis
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))  # 0.05 and 5e-05, not 5 × 10⁻²


def _shade_collapse(axes: Axes, name: str) -> Any:
    """The band of `COLLAPSE` in a panel, whose limits are set so that both the lines and the band are seen."""
    if name not in COLLAPSE:
        return None
    low, high = COLLAPSE[name]
    bottom, top = axes.get_ylim()
    if name == "mse_auxiliary":
        logarithmic = axes.get_yscale() == "log"
        floor = min(bottom, high / 4) if logarithmic else 0.0
        axes.set_ylim(floor, max(top, high * 2))
        low = floor
    else:
        axes.set_ylim(min(bottom, 0.0), max(top, 1.05 if name == "cos" else 1.15))
        axes.axhline(1, color=RED, linewidth=1, linestyle="--", zorder=0.9)
    return axes.axhspan(low, high, color=RED, alpha=0.12, linewidth=0, zorder=0.5, gid="collapse")


def _panels(count: int, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns or (count if count <= 3 else 2 if count == 4 else 3))
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.1 * lines + 0.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg]
    return figure, [figure.add_subplot(lines, columns, index + 1) for index in range(count)]


def _keys(rows: Rows, prefix: str) -> list[str]:
    """The metrics that start so, each once, in the order in which they appear in the log."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))


def _bins(rows: Rows, prefix: str) -> dict[tuple[float, float], str]:
    """The metrics ``PREFIXlow-high`` by (low, high); others that start so are left alone."""
    bins = {}
    for key in _keys(rows, prefix):
        low, _, high = key.removeprefix(prefix).partition("-")
        try:
            bins[float(low), float(high)] = key
        except ValueError:
            continue
    return bins


def _readable(name: str) -> str:
    return name.replace("_", " ").replace("/", " ")
