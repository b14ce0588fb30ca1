"""Plans that cut a picture into overlapping tiles and blend the results without a seam.

Along each axis the tiles are all of one size, spread evenly, and shrunk until nothing is computed that is not
needed; neighbours are blended with raised-cosine (Hann) ramps. A ramp and its neighbour's sum to one, so the
windows are a partition of unity by construction: no division by a sum of weights, no 0/0 at the corners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import IcmsrError


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in cells: it reads [start, stop) and fades in and out inside that interval."""

    start: int
    stop: int
    fade_in: tuple[int, int]
    """[from, to) of the ramp up; equal values (the tile's start) where the picture begins."""
    fade_out: tuple[int, int]
    """[from, to) of the ramp down; equal values (the tile's stop) where the picture ends."""

    def window(self, scale: int) -> Tensor:
        """Weights of this tile at `scale` samples per cell: float32 [scale * (stop - start)], each in [0, 1]."""
        position = torch.arange(self.start * scale, self.stop * scale, dtype=torch.float64) + 0.5
        up = _ramp(position, *(edge * scale for edge in self.fade_in))
        down = 1 - _ramp(position, *(edge * scale for edge in self.fade_out))
        return (up * down).float()


def _ramp(position: Tensor, begin: int, end: int) -> Tensor:
    """Raised cosine from 0 at `begin` to 1 at `end`; a step where both are equal."""
    phase = ((position - begin) / max(end - begin, 1)).clamp(0, 1) if end > begin else (position >= begin).double()
    return 0.5 - 0.5 * torch.cos(math.pi * phase)


def plan_axis(size: int, tile: int, overlap: int, multiple: int = 1) -> tuple[Span, ...]:
    """Spans that cover [0, size) with tiles of at most `tile` cells that overlap by at least `overlap`.

    `size`, `tile` and the tiles' starts are multiples of `multiple`. One span when `size <= tile`.
    Raises `IcmsrError` when a size is not such a multiple or the overlap leaves a tile no room of its own.
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
        raise IcmsrError(f"overlap {overlap} leaves a tile of {tile} no step in multiples of {multiple}")
    count = 1 + math.ceil((size - tile) / step_limit)
    # The smallest tile with which `count` tiles still overlap as asked: less work, same picture.
    units = size // multiple
    shrunk = min(tile, multiple * math.ceil((size + (count - 1) * overlap) / (count * multiple)))
    while True:
        last = units - shrunk // multiple
        starts = [multiple * ((i * last + (count - 1) // 2) // (count - 1)) for i in range(count)]
        widest_step = max(b - a for a, b in pairwise(starts))
        if shrunk - widest_step >= overlap or shrunk == tile:
            break
        shrunk += multiple
    # One ramp length for the axis, in the middle of each overlap (a tile's outermost cells, which see the networks'
    # zero padding, get no weight) and never so long that two ramps of one tile meet.
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

    def slices(self, scale: int) -> tuple[slice, slice]:
        """The tile's rows and columns at `scale` samples per cell."""
        return (
            slice(self.rows.start * scale, self.rows.stop * scale),
            slice(self.columns.start * scale, self.columns.stop * scale),
        )

    def window(self, scale: int) -> Tensor:
        """Blending weights [scale * rows, scale * columns], float32."""
        return self.rows.window(scale)[:, None] * self.columns.window(scale)[None, :]


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a picture of `height` x `width` cells, row by row."""

    height: int
    width: int
    boxes: tuple[Box, ...]

    def __len__(self) -> int:
        return len(self.boxes)


def plan_tiles(height: int, width: int, tile: int, overlap: int, multiple: int = 1) -> TilePlan:
    """Tiles of at most `tile` x `tile` cells for a picture of `height` x `width` cells (see `plan_axis`)."""
    rows = plan_axis(height, tile, overlap, multiple)
    columns = plan_axis(width, tile, overlap, multiple)
    return TilePlan(height, width, tuple(Box(row, column) for row in rows for column in columns))


TileFunction = Callable[[Tensor, tuple[Box, ...]], Tensor]
"""Maps a batch of tiles [B, C, h, w] and their boxes to [B, C', h', w']."""


def _batches(boxes: tuple[Box, ...], size: int) -> Iterator[tuple[Box, ...]]:
    for start in range(0, len(boxes), size):
        yield boxes[start : start + size]


def run_tiles(
    source: Tensor,
    plan: TilePlan,
    function: TileFunction,
    *,
    source_scale: int = 1,
    result_scale: int = 1,
    batch: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`function` over every tile of `source` [1, C, H, W], blended in float32 into [1, C', H', W'].

    A cell of the plan is `source_scale` samples wide in the source and `result_scale` in the result, so the same
    plan serves an encoder (8 to 1), a UNet (1 to 1) and a decoder (1 to 8). `progress` is called with the number of
    tiles just done, and may raise to stop. Raises `IcmsrError` when the source does not have the plan's size.
    """
    if source.shape[0] != 1 or source.shape[-2:] != (plan.height * source_scale, plan.width * source_scale):
        raise IcmsrError(
            f"the plan is for 1 picture of {plan.height * source_scale} x {plan.width * source_scale} samples, "
            f"got {tuple(source.shape)}"
        )
    result: Tensor | None = None
    for boxes in _batches(plan.boxes, batch):
        tiles = []
        for box in boxes:
            rows, columns = box.slices(source_scale)
            tiles.append(source[:, :, rows, columns])
        outputs = function(torch.cat(tiles), boxes).float()
        if result is None:
            shape = (1, outputs.shape[1], plan.height * result_scale, plan.width * result_scale)
            result = torch.zeros(shape, dtype=torch.float32, device=outputs.device)
        for output, box in zip(outputs, boxes):
            rows, columns = box.slices(result_scale)
            result[0, :, rows, columns].addcmul_(output, box.window(result_scale).to(output.device))
        if progress is not None:
            progress(len(boxes))
    assert result is not None  # a plan has at least one box
    return result
