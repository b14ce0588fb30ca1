"""Labelled panels: pictures side by side, and grids of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from einops import repeat

from ..errors import IcmsrError
from .files import FloatArray

MIN_CELL = 192
"""Least width of a grid's cells in pixels: the longest labels, such as ``t = 950   12.3 dB``, fit into it."""
_FONT = cv2.FONT_HERSHEY_SIMPLEX

Cell = tuple[str, FloatArray | None]
"""A label and a picture [H, W, 3] in [0, 1]; None leaves the cell white."""


def enlarged(picture: FloatArray, factor: int) -> FloatArray:
    """`picture` [H, W, 3] with every pixel as a square of `factor` x `factor`."""
    larger: FloatArray = repeat(picture, "h w c -> (h rows) (w columns) c", rows=factor, columns=factor)
    return larger


def side_by_side(panels: dict[str, FloatArray], gap: int = 8) -> FloatArray:
    """Pictures [H, W, 3] of one height next to each other, each under its label."""
    height = next(iter(panels.values())).shape[0]
    columns: list[FloatArray] = []
    for label, picture in panels.items():
        strip = np.full((32, picture.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, label, (6, 22), _FONT, 0.6, (25, 25, 25), 1, cv2.LINE_AA)
        labelled = np.vstack([strip.astype(np.float32) / 255, picture])
        columns += [np.ones((height + 32, gap, 3), np.float32), labelled]
    return np.ascontiguousarray(np.hstack(columns[1:]).astype(np.float32))


def labelled_grid(rows: Mapping[str, Sequence[Cell]], gap: int = 8) -> FloatArray:
    """One picture on white: rows of cells [H, W, 3] under their labels, with the name of each row on its left.

    Cells narrower than `MIN_CELL` are enlarged by a whole factor. Raises `IcmsrError` if the cells differ in size, the
    rows in length, or if there is no picture at all.
    """
    sizes = {picture.shape for cells in rows.values() for _, picture in cells if picture is not None}
    counts = {len(cells) for cells in rows.values()}
    if len(sizes) != 1 or len(counts) != 1:
        raise IcmsrError(
            "a grid needs pictures of one size and the same number of cells in every row, got sizes "
            f"{sorted(sizes)} and {sorted(counts)} cells"
        )
    shape = sizes.pop()
    factor = -(-MIN_CELL // shape[1])
    margin = 20 + max(cv2.getTextSize(name, _FONT, 0.7, 2)[0][0] for name in rows)
    lines: list[FloatArray] = []
    for name, cells in rows.items():
        panels = [
            side_by_side({label: enlarged(np.ones(shape, np.float32) if picture is None else picture, factor)})
            for label, picture in cells
        ]
        height = panels[0].shape[0]
        heading = np.full((height, margin, 3), 255, np.uint8)
        cv2.putText(heading, name, (10, height // 2), _FONT, 0.7, (25, 25, 25), 2, cv2.LINE_AA)
        line: list[FloatArray] = [heading.astype(np.float32) / np.float32(255)]
        for panel in panels:
            line += [panel, np.ones((height, gap, 3), np.float32)]
        lines.append(np.hstack(line))
        lines.append(np.ones((gap, *lines[-1].shape[1:]), np.float32))
    return np.ascontiguousarray(np.vstack(lines).astype(np.float32))
