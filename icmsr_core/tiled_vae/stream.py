"""The steps of a VAE half over a picture that comes in stripes. Source: ours.

Stripes run along one axis; every convolution keeps the last rows that it saw until those below them arrive, so
nothing is computed twice, no row is ever at an edge that the picture does not have, and stripes need no blending. A
map between two steps exists only as far as the steps after it have not used it up. GroupNorm is the exception, it
needs to know the whole map first: `tiled_vae_modes`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.vae_steps import Attention, Conv, Down, Norm, Pointwise, Residual, Sample, Step, VaeHalf
from .held_map import HeldMap

STRIPE_BYTES = {"cpu": 4 * 2**20}
"""Most bytes of a stripe of a map, by the kind of device. A CPU still has that much in its cache when the next step
reads it; and glibc would ask the system for each map above 32 MiB. On a device that is not listed, stripes
keep the height that the tile's area gives them (`Flow.nominal`)."""
FEWEST_ROWS = 4
"""Least height of a stripe that is cut for its bytes: every convolution copies two rows more."""


class Flow(NamedTuple):
    """A map on its way: its stripes in order, each [N, C, h, w]; what has passed is no longer held."""

    chunks: Iterator[Tensor]
    length: int
    """Samples of the whole map along the axis of the stripes."""
    nominal: int
    """Samples of a usual stripe along that axis; the last ones may have more, by what the convolutions held back."""
    held: HeldMap | None = None
    """The whole map, where `chunks` takes it from there."""


class Stream(ABC):
    """Runs steps over a `Flow`; how a map is normalised and how it is read twice is left to the two kinds."""

    def __init__(self, half: VaeHalf, axis: int) -> None:
        """`axis` is 2 for stripes of rows, 3 for stripes of columns."""
        self.half, self.axis, self.across = half, axis, 5 - axis

    def source(self, whole: Tensor, nominal: int) -> Flow:
        """`whole` [N, C, H, W], on any device, in stripes of `nominal` samples; all maps have their memory layout."""
        pieces = self._moved(whole.split(nominal, self.axis))
        if self.half.device.type == "cpu":  # convolutions take up to a third less time than in torch's usual layout
            pieces = (piece.contiguous(memory_format=torch.channels_last) for piece in pieces)
        return Flow(pieces, whole.shape[self.axis], nominal)

    def _moved(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        return (piece.to(self.half.device) for piece in pieces)

    def through(self, steps: Sequence[Step], flow: Flow) -> Flow:
        """`flow` after all of `steps`."""
        for step in steps:
            if isinstance(step, Pointwise):
                flow = self._pointwise(step, flow)
            elif isinstance(step, Conv):
                flow = self._convolved(step.module, 1, flow)
            elif isinstance(step, Down):
                flow = self._convolved(step.module, 2, flow)
            elif isinstance(step, Norm):
                flow = self._normalised(step, flow)
            elif isinstance(step, Attention):
                flow = self._attended(step, flow)
            else:
                flow = self._residual(step, flow)
        return flow

    @abstractmethod
    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        """`flow` after the GroupNorm `step`."""

    @abstractmethod
    def _before_fork(self, flow: Flow) -> Flow:
        """`flow` with what its readers have to know of the whole; its stripes may be on any device."""

    @abstractmethod
    def _attended(self, step: Attention, flow: Flow) -> Flow:
        """`flow` after the attention `step`."""

    def _sized(self, flow: Flow, growth: float) -> Iterator[Tensor]:
        """The stripes of `flow` regrouped before something that makes maps of `growth` times their size of them."""
        limit = STRIPE_BYTES.get(self.half.device.type)

        def rows(chunk: Tensor) -> int:
            if limit is None:
                return flow.nominal
            row = chunk.numel() // chunk.shape[self.axis] * chunk.element_size()
            return int(min(flow.nominal, max(FEWEST_ROWS, limit / max(1.0, growth) // row)))

        return _regrouped(flow.chunks, self.axis, rows)

    def _pointwise(self, step: Pointwise, flow: Flow) -> Flow:
        chunks = self._sized(flow, step.up**2) if step.up > 1 else flow.chunks
        return Flow(
            map(step.run, chunks), flow.length * step.up // step.down, max(1, flow.nominal * step.up // step.down)
        )

    def _convolved(self, module: nn.Conv2d, stride: int, flow: Flow) -> Flow:
        """The 3 x 3 convolution `module`; `flow` without the rows that it holds until the next stripe."""
        axis, left = self.axis, flow.length
        chunks = self._sized(flow, module.out_channels / module.in_channels)
        # The same layer, weights included, that takes the rows which the padding would otherwise stand for.
        valid = copy.copy(module)
        if self.half.device.type == "cpu" and module.weight.element_size() > 1:
            # In the maps' layout, or every stripe pays for bringing them into it.
            weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last), False)
            valid._parameters = {**module._parameters, "weight": weight}
        padding = [int(amount) for amount in module.padding]
        before = padding[axis - 2]
        padding[axis - 2] = 0
        valid.padding = (padding[0], padding[1])
        held: list[Tensor] = []

        def feed(chunk: Tensor) -> Tensor | None:
            nonlocal left
            edge = torch.zeros_like(chunk.narrow(axis, 0, 1))  # in its memory layout
            if before and left == flow.length:
                held.append(edge)
            left -= chunk.shape[axis]
            parts = [*held, chunk, *([] if left else [edge])]
            held.clear()
            rows = torch.cat(parts, axis)
            del chunk, parts
            made = (rows.shape[axis] - 3) // stride + 1 if rows.shape[axis] >= 3 else 0
            if left:
                begin = made * stride
                held.append(rows.narrow(axis, begin, rows.shape[axis] - begin).clone())
            if not made:
                return None
            if not before:
                rows = F.pad(rows, (0, 1, 0, 0) if axis == 2 else (0, 0, 0, 1))
            return valid(rows)

        return Flow(_present(map(feed, chunks)), flow.length // stride, max(1, flow.nominal // stride))

    def _residual(self, step: Residual, flow: Flow) -> Flow:
        kept, shortcut = HeldMap(self.axis), step.shortcut
        flow = self._before_fork(flow)
        length = flow.length if flow.held is not None else 0  # where it passes by, only a few stripes are kept

        def passing(piece: Tensor) -> Tensor:
            chunk = piece.to(self.half.device)
            if shortcut is None:
                kept.append(piece)
            else:  # at once, so that what it is computed from can go
                kept.keep(shortcut(chunk).to(piece.device), length)
            return chunk

        def add(chunk: Tensor) -> Tensor:
            position = 0
            for part in kept.take(chunk.shape[self.axis]):
                chunk.narrow(self.axis, position, part.shape[self.axis]).add_(part.to(chunk.device))
                position += part.shape[self.axis]
            return chunk

        main = self.through(step.main, flow._replace(chunks=map(passing, flow.chunks)))
        return Flow(map(add, main.chunks), main.length, main.nominal)

    def _windows(self, step: Attention, flow: Flow, window: int, margin: int, sample: Sample | None = None) -> Flow:
        """Attention in windows of at most `window` x `window`, each of which sees `margin` samples around it.

        Of the rest of the map it sees `sample`.
        """
        axis, across, length = self.axis, self.across, flow.length
        bounds = deque(_even(length, window))
        rows: list[Tensor] = []
        first, stop = 0, 0  # what `rows` holds

        def feed(chunk: Tensor) -> Tensor | None:
            nonlocal first, stop
            rows.append(chunk)
            stop += chunk.shape[axis]
            del chunk
            found = []
            while bounds and stop >= min(bounds[0][1] + margin, length):
                begin, end = bounds.popleft()
                band = torch.cat(rows, axis) if len(rows) > 1 else rows[0]
                low, high = max(0, begin - margin), min(length, end + margin)
                asking = band.narrow(axis, begin - first, end - begin)
                asked = band.narrow(axis, low - first, high - low)
                width, parts = band.shape[across], []
                for left, right in _even(width, window):
                    near, far = max(0, left - margin), min(width, right + margin)
                    parts.append(
                        step.run(
                            asking.narrow(across, left, right - left), asked.narrow(across, near, far - near), sample
                        )
                    )
                found.append(torch.cat(parts, across) if len(parts) > 1 else parts[0])
                keep = max(0, end - margin)
                rows[:] = [band.narrow(axis, keep - first, stop - keep).clone()] if bounds else []
                first = keep
            return torch.cat(found, axis) if len(found) > 1 else found[0] if found else None

        return Flow(_present(map(feed, flow.chunks)), length, flow.nominal)


def _present(chunks: Iterator[Tensor | None]) -> Iterator[Tensor]:
    # map and filter hold nothing that has passed; a generator's own variables would, one stripe for each step.
    return filter(lambda chunk: chunk is not None, chunks)  # type: ignore[arg-type]


def _regrouped(chunks: Iterator[Tensor], axis: int, rows_of: Callable[[Tensor], int]) -> Iterator[Tensor]:
    """The same map in pieces of at most `rows_of` (a piece) samples along `axis`: cut, and small ones joined."""
    pending: deque[Tensor] = deque()
    gathered = 0
    for chunk in chunks:
        rows, size = rows_of(chunk), chunk.shape[axis]
        if pending and gathered + size > rows:
            yield _joined(pending, axis)
            gathered = 0
        pieces = deque(chunk.split(-(-size // -(-size // rows)), axis))
        del chunk
        while len(pieces) > 1:
            yield pieces.popleft()
        gathered += pieces[0].shape[axis]
        pending.append(pieces.popleft())
        if 2 * gathered > rows:  # nothing that is large enough waits for more
            yield _joined(pending, axis)
            gathered = 0
    if pending:
        yield _joined(pending, axis)


def _joined(pieces: deque[Tensor], axis: int) -> Tensor:
    """All of `pieces`, which are left empty."""
    whole = torch.cat(list(pieces), axis) if len(pieces) > 1 else pieces[0]
    pieces.clear()
    return whole


def _even(length: int, most: int) -> list[tuple[int, int]]:
    """[0, length) in as few parts of at most `most` as there can be, all nearly of one size."""
    count = -(-length // most)
    edges = [index * length // count for index in range(count + 1)]
    return list(pairwise(edges))
