"""Measures folders of results against folders of truths; pictures are paired by file name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import IcmsrError
from ..pictures.files import find_pictures, read_picture, stored_size
from ..steps import Steps
from .metrics import mean_color_difference, metric

DEFAULT_METRICS = ("psnr", "ssim", "hf")
COLOR = "color"
"""Name of the column with `mean_color_difference`, which compares a result with its input."""


@dataclass(frozen=True)
class Evaluation:
    """The values that `evaluate_folders` measured."""

    rows: dict[str, dict[str, float]]
    """Values by picture (file name without extension, sorted) and by metric."""
    means: dict[str, float]
    """The mean of each metric over the pictures for which it is defined; NaN if there are none."""

    def table(self) -> str:
        """The values as aligned text: a heading, a line for each picture, a line of means; `-` for NaN."""
        lines = [["picture", *self.means]]
        for name, values in [*self.rows.items(), (f"mean of {len(self.rows)}", self.means)]:
            lines.append([name, *("-" if math.isnan(value) else f"{value:.4f}" for value in values.values())])
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in lines
        )

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`: "pictures" (their number), "means" and "rows", with None for NaN."""

        def defined(values: dict[str, float]) -> dict[str, float | None]:
            return {name: None if math.isnan(value) else value for name, value in values.items()}

        return {
            "pictures": len(self.rows),
            "means": defined(self.means),
            "rows": {name: defined(values) for name, values in self.rows.items()},
        }


def evaluate_folders(
    sr: str | os.PathLike[str],
    hr: str | os.PathLike[str],
    lq: str | os.PathLike[str] | None = None,
    metrics: Iterable[str] = DEFAULT_METRICS,
    steps: Steps | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Measures every picture in the folder `sr` against the one of the same name (without extension) in `hr`.

    `metrics` are names in `METRICS`. With `lq`, the folder of the inputs, there is one more column, "color":
    `mean_color_difference` between the result and the input resized to its size (Pillow's bicubic). `steps`
    counts the pictures. `weights` is a folder of converted weights (see `metric`). Transparency is ignored.

    Raises IcmsrError before anything is measured for an unknown metric, a missing library or its weights, a folder
    that is missing or empty, pictures without a partner (it lists them), names that occur twice, and sizes that differ
    (it lists them); and later, with the file's name, for a picture that cannot be read or is too small for a metric.
    """
    chosen = [metric(name, None if weights is None else Path(weights)) for name in dict.fromkeys(metrics)]
    for entry in chosen:
        entry.prepare()
    results = _by_stem(sr)
    truths = _partners(results, sr, hr)
    inputs = None if lq is None else _partners(results, sr, lq)
    _check_sizes(results, truths)
    rows: dict[str, dict[str, float]] = {}
    steps = steps or Steps()
    steps.begin(len(results))
    for stem, path in results.items():
        result, truth = read_picture(path).rgb, read_picture(truths[stem]).rgb
        if result.shape != truth.shape:
            raise IcmsrError(_size_mismatch(path, result.shape[1::-1], truth.shape[1::-1]))
        try:
            rows[stem] = {entry.name: entry(result, truth) for entry in chosen}
        except IcmsrError as error:
            raise IcmsrError(f"{path}: {error}") from error
        if inputs is not None:
            height, width = result.shape[:2]
            small = np.rint(read_picture(inputs[stem]).rgb * 255).astype(np.uint8)
            resized = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            rows[stem][COLOR] = mean_color_difference(result, np.asarray(resized))
        steps.advance()
    means = {}
    for column in next(iter(rows.values())):
        values = [row[column] for row in rows.values() if not math.isnan(row[column])]
        means[column] = sum(values) / len(values) if values else math.nan
    return Evaluation(rows=rows, means=means)


def _by_stem(folder: str | os.PathLike[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in find_pictures(folder):
        if path.stem in found:
            raise IcmsrError(
                f"{folder}: {found[path.stem].name} and {path.name} differ in the extension only: keep one of them"
            )
        found[path.stem] = path
    if not found:
        raise IcmsrError(f"{folder}: no pictures in this folder")
    return dict(sorted(found.items()))


def _partners(results: dict[str, Path], sr: str | os.PathLike[str], other: str | os.PathLike[str]) -> dict[str, Path]:
    partners = _by_stem(other)
    problems = [
        f"{folder} has no {_some(missing)}"
        for folder, missing in ((other, results.keys() - partners.keys()), (sr, partners.keys() - results.keys()))
        if missing
    ]
    if problems:
        raise IcmsrError(f"both folders need the same names (extensions may differ): {'; '.join(problems)}")
    return partners


def _some(names: Iterable[str], at_most: int = 10) -> str:
    listed = sorted(names)
    rest = len(listed) - at_most
    return ", ".join(listed[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def _check_sizes(results: dict[str, Path], truths: dict[str, Path]) -> None:
    """Reads the headers only, so that a long run does not fail at its end."""
    wrong = []
    for stem, path in results.items():
        sizes = stored_size(path), stored_size(truths[stem])
        if None not in sizes and sizes[0] != sizes[1]:
            wrong.append(_size_mismatch(path, *sizes))
    if wrong:
        raise IcmsrError(_some(wrong))


def _size_mismatch(path: Path, result: Any, truth: Any) -> str:
    return f"{path.name} is {result[0]} x {result[1]} and its truth {truth[0]} x {truth[1]}"
