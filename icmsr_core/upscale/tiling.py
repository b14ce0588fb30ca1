"""Overlapping tiles: where they lie, and how their results are blended without a seam.

Along each axis all tiles have the same size and are spread evenly; the size is the smallest with which as many tiles
still overlap as asked. Neighbours are blended with raised-cosine (Hann) ramps. Two ramps that meet add up to one, so
the windows sum to one everywhere and nothing has to be divided by a sum of weights. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import IcmsrError
from ..steps import Steps
from ..transfer import to_device


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in cells: it covers [start, stop) and fades in and out inside that interval."""

    start: int
    stop: int
    fade_in: tuple[int, int]
    """[from, to) of the ramp up. Both are the tile's start where the picture begins: no ramp."""
    fade_out: tuple[int, int]
    """[from, to) of the ramp down. Both are the tile's stop where the picture ends: no ramp."""

    def window(self) -> Tensor:
        """Weight of every cell of this tile: float32 [stop - start], each in [0, 1]."""
        position = torch.arange(self.start, self.stop, dtype=torch.float64) + 0.5
        up = _ramp(position, *self.fade_in)
        down = 1 - _ramp(position, *self.fade_out)
        return (up * down).float()

    def moved(self, cells: int) -> Span:
        """The same tile `cells` further on."""
        (up, full), (down, gone) = self.fade_in, self.fade_out
        return Span(self.start + cells, self.stop + cells, (up + cells, full + cells), (down + cells, gone + cells))


def _ramp(position: Tensor, begin: int, end: int) -> Tensor:
    """Raised cosine from 0 at `begin` to 1 at `end`; a step where both are equal."""
    phase = ((position - begin) / max(end - begin, 1)).clamp(0, 1) if end > begin else (position >= begin).double()
    return 0.5 - 0.5 * torch.cos(math.pi * phase)


def plan_axis(size: int, tile: int, overlap: int, multiple: int = 1) -> tuple[Span, ...]:
    """Tiles of at most `tile` cells that cover [0, size), in order; neighbours overlap by at least `overlap` cells.

    `size`, `tile` and the tiles' starts are multiples of `multiple`. One tile when `size <= tile`.
    Raises `IcmsrError` when a size is not such a multiple, or the overlap is so large that tiles cannot advance.
    """
    if size < 1 or tile < 1 or overlap < 0:
        raise IcmsrError(f"size and tile must be at least 1 and overlap at least 0, got {size}, {tile}, {overlap}")
    if size % multiple or tile % multiple:
        raise IcmsrError(f"size {size} and tile {tile} must be multiples of {multiple}")
    if size <= tile:
        return (Span(0, size, (0, 0), (size, size)),)
    if 2 * overlap > tile:
        raise IcmsrError(f"overlap must be at most half of the tile ({tile // 2}), got {overlap}")
    step_limit = (tile - overlap) // multiple * multiple
    if step_limit < 1:
        raise IcmsrError(
            f"with an overlap of {overlap} tiles of {tile} cannot advance in multiples of {multiple}: try an overlap "
            f"of at most {tile - multiple}"
        )
    count = 1 + math.ceil((size - tile) / step_limit)
    # Shrink the tile as far as `count` tiles still overlap as asked: less work, same picture.
    units = size // multiple
    shrunk = min(tile, multiple * math.ceil((size + (count - 1) * overlap) / (count * multiple)))
    while True:
        last = units - shrunk // multiple
        starts = [multiple * ((i * last + (count - 1) // 2) // (count - 1)) for i in range(count)]
        widest_step = max(b - a for a, b in pairwise(starts))
        if shrunk - widest_step >= overlap or shrunk == tile:
            break
        shrunk += multiple
    # All ramps of the axis have one length, so short that the two of one tile do not meet. They lie in the middle of
    # the overlap: a tile's outermost cells, which the networks' zero padding falsifies, then have no weight.
    middles = [(right + left + shrunk) // 2 for left, right in pairwise(starts)]
    ramp = min(shrunk - widest_step, overlap, *(b - a for a, b in pairwise(middles)))
    fades = [(middle - ramp // 2, middle - ramp // 2 + ramp) for middle in middles]
    return tuple(
        Span(
            start,
            start + shrunk,
            fades[i - 1] if i else (start, start),
            fades[i] if i < count - 1 else (start + shrunk, start + shrunk),
        )
        for i, start in enumerate(starts)
    )


@dataclass(frozen=True)
class Box:
    """One tile of a plan, in cells."""

    rows: Span
    columns: Span

    def slices(self, scale: int = 1) -> tuple[slice, slice]:
        """The tile's rows and columns in a map with `scale` samples per cell along each axis."""
        return (
            slice(self.rows.start * scale, self.rows.stop * scale),
            slice(self.columns.start * scale, self.columns.stop * scale),
        )

    def moved(self, down: int, right: int) -> Box:
        """The same tile in a map that begins so many cells above and to the left."""
        return Box(self.rows.moved(down), self.columns.moved(right))


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a picture of `height` x `width` cells, row by row."""

    height: int
    width: int
    boxes: tuple[Box, ...]

    def __len__(self) -> int:
        return len(self.boxes)

    def windows(self, device: torch.device) -> Callable[[Box], Tensor]:
        """Returns the function from a box to its blending weights [rows, columns]: float32, on `device`, in [0, 1].

        Those of all tiles sum to 1 at every cell. Only their profiles along the axes are copied to the device, here.
        """
        rows = _profiles({box.rows for box in self.boxes}, device)
        columns = _profiles({box.columns for box in self.boxes}, device)
        return lambda box: rows[box.rows][:, None] * columns[box.columns][None, :]


def _profiles(spans: set[Span], device: torch.device) -> dict[Span, Tensor]:
    """The windows of `spans`, which are all of one length, on `device`."""
    return dict(zip(spans, to_device(torch.stack([span.window() for span in spans]), device)))


def plan_tiles(height: int, width: int, tile: int, overlap: int, multiple: int = 1) -> TilePlan:
    """Tiles of at most `tile` x `tile` cells for a picture of `height` x `width` cells.

    `overlap`, `multiple` and what it raises are those of `plan_axis`, for both axes.
    """
    rows = plan_axis(height, tile, overlap, multiple)
    columns = plan_axis(width, tile, overlap, multiple)
    return TilePlan(height, width, tuple(Box(row, column) for row in rows for column in columns))


TileFunction = Callable[[Tensor, tuple[Box, ...]], Tensor]
"""Maps a batch of tiles [B, C, h, w] and their places to [B, C', h, w]."""


def run_tiles(
    source: Tensor, plan: TilePlan, function: TileFunction, *, batch: int = 1, steps: Steps | None = None
) -> Tensor:
    """`function` over every tile of `source` [1, C, H, W], blended into [1, C', H, W], float32, on its results' device.

    `batch` tiles run together. `steps` advances by the tiles that are done after each batch, and may raise to stop.
    Raises `IcmsrError` when the source does not have the plan's size.
    """
    if source.shape[0] != 1 or source.shape[-2:] != (plan.height, plan.width):
        raise IcmsrError(f"the plan is for 1 picture of {plan.height} x {plan.width} cells, got {tuple(source.shape)}")
    steps = steps or Steps()
    result, window = None, None
    for start in range(0, len(plan), batch):
        boxes = plan.boxes[start : start + batch]
        outputs = function(torch.cat([source[(..., *box.slices())] for box in boxes]), boxes).float()
        if result is None or window is None:
            shape = (1, outputs.shape[1], plan.height, plan.width)
            result = torch.zeros(shape, dtype=torch.float32, device=outputs.device)
            window = plan.windows(outputs.device)
        for output, box in zip(outputs, boxes):
            result[(0, ..., *box.slices())].addcmul_(output, window(box))
        steps.advance(len(boxes))
    assert result is not None  # a plan has at least one box
    return result
