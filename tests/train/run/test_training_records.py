"""A run's records: metrics that survive a kill and read as if there had been none, and the plots drawn from them."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.logs import MetricsLog, read_metrics
from icmsr_core.train.run.plots import (
    COLLAPSE,
    diagnostics_figure,
    health_figure,
    is_count,
    losses_figure,
    plot_run,
    series,
    smoothed,
)
from tests.support.places import ROOT


def values_at(images: int) -> dict[str, float]:
    return {"loss/l2": 1 / (3 + images), "loss/icm": math.sin(images), "health/skipped": images // 32}


def write_lines(run: Path, positions: range, saved: int = 0, tensorboard: bool = False) -> None:
    with MetricsLog(run, tensorboard) as log:
        log.truncate_after(saved)
        for images in positions:
            log.write(images, values_at(images))


def test_logged_lines_are_read_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.write(8, {"loss/l2": 1 / 3, "count": 2, "tensor": torch.tensor(0.1), "tiny": 1.23456789e-12})
        log.write(8, {"eval/psnr": 25.5})
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"images": 8, "loss/l2": 0.3333333, "count": 2, "tensor": 0.1, "tiny": 1.234568e-12},
        {"images": 8, "eval/psnr": 25.5},
    ]
    with pytest.raises(IcmsrError, match="'images'"):
        MetricsLog(tmp_path).write(8, {"images": 3})


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    MetricsLog(tmp_path).write(8, {"a": math.nan, "b": math.inf, "c": float("-inf"), "d": torch.tensor(math.nan)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"images": 8, "a": None, "b": None, "c": None, "d": None}


@pytest.mark.parametrize("torn", [b"{", b'{"images": 24, "loss/l2": 0.03', b'{"images": 24, "x": "\xff', b"\0" * 9])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path, torn: bytes) -> None:
    write_lines(tmp_path, range(8, 24, 8))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["images"] for row in read_metrics(path)] == [8, 16]
    MetricsLog(tmp_path).write(24, values_at(24))
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]
    assert path.read_bytes().startswith(whole)


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    write_lines(tmp_path, range(8, 24, 8))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    MetricsLog(tmp_path).write(24, values_at(24))
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]


@pytest.mark.parametrize("line", ["nonsense", "[]", "3", '{"loss": 1}', '{"images": "many"}'])
def test_other_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"images": 8}}\n{line}\n{{"images": 16}}\n')
    with pytest.raises(IcmsrError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(IcmsrError, match="no such file"):
        read_metrics(tmp_path / "other.jsonl")


@pytest.mark.parametrize("saved", [0, 24, 40, 48])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, saved: int) -> None:
    """Killed at 48 with the last state at `saved`: nothing is in the log twice, nothing is missing."""
    write_lines(tmp_path / "whole", range(0, 96, 8))
    write_lines(tmp_path / "killed", range(0, 56, 8))
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"images": 56, "lo')
    write_lines(tmp_path / "killed", range(saved + 8 if saved else 0, 96, 8), saved)
    names = [path.name for path in (tmp_path / "killed").iterdir()]
    assert names == ["metrics.jsonl"]
    assert (tmp_path / "killed" / names[0]).read_bytes() == (tmp_path / "whole" / names[0]).read_bytes()


def test_truncating_keeps_all_lines_of_the_saved_position(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for images, name in ((8, "a"), (16, "a"), (16, "b"), (24, "a")):
        log.write(images, {name: 1})
    with pytest.raises(IcmsrError, match="before the first write"):
        log.truncate_after(8)
    MetricsLog(tmp_path).truncate_after(16)
    assert [row["images"] for row in read_metrics(log.path)] == [8, 16, 16]


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.long
def test_lines_outlive_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from icmsr_core.train.run.logs import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), tensorboard=True)\n"
        "for images in range(8, 168, 8): log.write(images, {f'loss/{index}': float(images) for index in range(40)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    expected = [(images, float(images)) for images in range(8, 168, 8)]
    assert [(row["images"], row["loss/39"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == expected
    assert scalars(tmp_path, "loss/39") == expected


def test_tensorboard_has_the_same_and_forgets_on_resuming(tmp_path: Path) -> None:
    killed = MetricsLog(tmp_path, tensorboard=True)  # never closed: what it wrote is on the disk all the same
    for images in range(8, 56, 8):
        killed.write(images, {"loss/l2": float(images), "bad": math.nan})
    assert scalars(tmp_path, "loss/l2") == [(images, float(images)) for images in range(8, 56, 8)]
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.truncate_after(24)
        for images in range(32, 64, 8):
            log.write(images, {"loss/l2": 1000.0 + images})
    expected = [(8, 8.0), (16, 16.0), (24, 24.0), *((images, 1000.0 + images) for images in range(32, 64, 8))]
    assert scalars(tmp_path, "loss/l2") == expected
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["images"], row["loss/l2"]) for row in rows] == expected
    killed.close()


def test_without_tensorboard_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # makes the import fail
    with caplog.at_level(logging.WARNING):
        write_lines(tmp_path, range(8, 40, 8), tensorboard=True)
    assert [record.message for record in caplog.records if "TensorBoard" in record.message] == [caplog.messages[0]]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert not (tmp_path / "tensorboard").exists()


def test_no_tensorboard_unless_asked_for(tmp_path: Path) -> None:
    write_lines(tmp_path, range(8, 24, 8))
    assert not (tmp_path / "tensorboard").exists()


BINS = ("0.02-0.2", "0.2-0.5", "0.5-0.8", "0.8-0.98")


def made_up_rows(count: int = 60) -> list[dict[str, float | None]]:
    rows: list[dict[str, float | None]] = []
    for index in range(1, count + 1):
        row: dict[str, float | None] = {"images": 400 * index, "loss/l2": 1 / index, "loss/signed": index - 5.5}
        for name in ("rho", "cos", "mse_teacher", "mse_auxiliary"):
            row |= {f"icm/{name}/{bounds}": 0.1 + 0.1 * place for place, bounds in enumerate(BINS)}
        row |= {"health/grad/generator": 0.5 + index, "health/grad/auxiliary": 0.01, "health/saturation": 0.125}
        row |= {"health/skipped": index // 30, "lr/generator": 5e-5, "lr/auxiliary": 1e-4, "other": 1.0}
        rows.append(row)
    return rows


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def gids(figure: Figure, panel: int) -> list[str | None]:
    return [line.get_gid() for line in figure.axes[panel].lines]


def test_losses_have_a_panel_each() -> None:
    figure = losses_figure(made_up_rows())
    assert figure is not None
    assert titles(figure) == ["l2", "signed"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    assert all(axes.get_xlabel() == "images seen" for axes in figure.axes)
    raw, smooth = figure.axes[0].lines
    assert raw.get_gid() == "raw"
    assert raw.get_xdata()[-1] == 400 * 60
    assert np.allclose(raw.get_ydata(), [1 / index for index in range(1, 61)])
    assert np.allclose(smooth.get_ydata(), smoothed(np.asarray(raw.get_ydata())))
    assert raw.get_alpha() < 0.5


def test_few_values_are_one_line_with_dots() -> None:
    figure = losses_figure(made_up_rows(10))
    assert figure is not None
    assert [line.get_marker() for line in figure.axes[0].lines] == ["."]


def test_diagnostics_have_a_line_for_every_bin_and_show_collapse() -> None:
    figure = diagnostics_figure(made_up_rows(10))
    assert figure is not None
    assert len(figure.axes) == 4
    units = [axes.get_ylabel() for axes in figure.axes]
    assert [unit[:4] for unit in units] == ["mean", "cos(", "mse(", "mse("]
    for panel, name in enumerate(("rho", "cos", "mse_teacher", "mse_auxiliary")):
        axes = figure.axes[panel]
        bands = [patch for patch in axes.patches if patch.get_gid() == "collapse"]
        assert len(bands) == (name in COLLAPSE)
        lines = axes.lines[:4]
        assert [line.get_ydata()[0] for line in lines] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert [line.is_dashed() for line in lines] == [True, False, False, True]
        bottom, top = axes.get_ylim()
        if name in COLLAPSE:
            low, high = bands[0].get_extents().transformed(axes.transData.inverted()).intervaly
            assert high == pytest.approx(COLLAPSE[name][1])
            assert bottom < high <= top
            assert low <= max(COLLAPSE[name][0], bottom) + 1e-9
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["0.02–0.2", "0.2–0.5", "0.5–0.8", "0.8–0.98", "collapse"]
    brightness = [sum(matplotlib_rgb(line.get_color())) for line in figure.axes[0].lines[:4]]
    assert brightness == sorted(brightness)  # sequential: from dark to light with the timestep


def matplotlib_rgb(colour: object) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)  # type: ignore[arg-type]


def test_bins_sort_as_numbers_and_other_keys_are_left_alone() -> None:
    names = ("icm/rho/100-200", "icm/rho/20-100", "icm/rho/all", "icm/rho/3", "icm/else/0-1")
    figure = diagnostics_figure([{"images": 8} | dict.fromkeys(names, 0.5)])
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["20–100", "100–200", "collapse"]


def test_the_health_plot_groups_its_lines_by_player() -> None:
    figure = health_figure(made_up_rows())
    assert figure is not None
    assert titles(figure) == ["grad", "saturation", "skipped", "learning rate"]
    names = [
        [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else [] for axes in figure.axes
    ]
    assert names == [["generator", "auxiliary"], [], [], ["generator", "auxiliary"]]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    assert gids(figure, 2) == ["count"]
    assert figure.axes[2].lines[0].get_drawstyle() == "steps-post"
    assert gids(figure, 3) == [None, None]  # learning rates are not smoothed


def test_no_text_or_legend_is_cut_off_or_covers_a_panel() -> None:
    for build in (losses_figure, diagnostics_figure, health_figure):
        figure = build(made_up_rows())
        assert figure is not None
        figure.canvas.draw()
        sheet = figure.bbox
        drawn = [axes.get_tightbbox() for axes in figure.axes]
        for box in drawn + [legend.get_window_extent() for legend in figure.legends]:
            assert box.x0 >= sheet.x0 - 1
            assert box.y0 >= sheet.y0 - 1
            assert box.x1 <= sheet.x1 + 1
            assert box.y1 <= sheet.y1 + 1
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
        for legend in legends:
            for axes in figure.axes:
                assert not legend.get_window_extent().shrunk(0.9, 0.9).overlaps(axes.bbox)


def test_values_that_are_not_finite_are_crosses() -> None:
    rows: list[Mapping[str, float | None]] = [{"images": i, "loss/l2": None if i in (3, 4) else 0.5} for i in range(9)]
    figure = losses_figure(rows)
    assert figure is not None
    crosses = [line for line in figure.axes[0].lines if line.get_gid() == "not finite"]
    assert [list(line.get_xdata()) for line in crosses] == [[3, 4]]
    assert losses_figure([{"images": 8, "loss/l2": None}]) is not None


def test_series_leaves_rows_without_the_key_out() -> None:
    images, values = series([{"images": 1, "a": 2.0}, {"images": 2}, {"images": 3, "a": None}], "a")
    assert images.tolist() == [1, 3]
    assert values[0] == 2
    assert math.isnan(values[1])


def test_smoothing_is_the_plain_mean_of_the_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=200)
    values[50:53] = np.nan
    expected = [np.nanmean(values[max(0, i - 5) : i + 6]) for i in range(200)]
    assert np.allclose(smoothed(values), expected)
    assert np.allclose(smoothed(np.full(77, 3.0)), 3.0)
    assert np.isnan(smoothed(np.full(60, np.nan))).all()
    assert smoothed(values).std() < 0.5 * np.nanstd(values)


def test_counts_are_whole_numbers() -> None:
    assert is_count(np.array([0.0, 2.0]))
    assert not is_count(np.array([0.0, 0.5]))
    assert not is_count(np.array([0.0, np.nan]))


def test_a_run_s_plots_are_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for row in made_up_rows(5):
            log.write(int(row["images"] or 0), {key: value for key, value in row.items() if key != "images"})
    with open(log.path, "ab") as file:
        file.write(b'{"images": 99')  # a run that writes meanwhile
    paths = plot_run(tmp_path)
    assert paths == [tmp_path / "plots" / name for name in ("losses.png", "diagnostics.png", "health.png")]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.shape[0] > 200
        assert (picture != 255).any(axis=2).mean() > 0.01


def test_absent_metrics_have_no_plot(tmp_path: Path) -> None:
    MetricsLog(tmp_path).write(8, {"loss/l2": 1.5, "psnr": 20.0})
    assert plot_run(tmp_path) == [tmp_path / "plots" / "losses.png"]
    assert losses_figure([{"images": 8, "loss": 1.0}]) is None
    assert diagnostics_figure([{"images": 8, "icm/other": 1.0}]) is None
    assert health_figure([]) is None
    with pytest.raises(IcmsrError, match="no such file"):
        plot_run(tmp_path / "nowhere")


@pytest.mark.long
def test_nothing_global_is_touched(tmp_path: Path) -> None:
    """In a fresh process without a display: no pyplot, and matplotlib's settings as they were."""
    MetricsLog(tmp_path).write(8, {"loss/l2": 1.5, "icm/rho/0.2-0.4": 0.3, "health/skipped": 0, "lr/generator": 1e-4})
    code = (
        "import sys; from pathlib import Path; from matplotlib import rcParams\n"
        "settings = lambda: {key: rcParams[key] for key in rcParams if key != 'backend'}; before = settings()\n"
        "from icmsr_core.train.run.plots import plot_run; assert len(plot_run(Path(sys.argv[1]))) == 3\n"
        "assert settings() == before; assert 'torch' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith(('matplotlib.pyplot', 'pylab', 'tkinter'))]"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=60)
