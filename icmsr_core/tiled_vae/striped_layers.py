"""Layers that need neighbouring rows, over a map that comes in stripes: convolution, attention, regrouping.

Each is fed one stripe after another along an axis (2: stripes of rows, 3: of columns; all names and texts say rows). It
keeps what the next stripe needs and gives the rows of its result that are complete. Source: ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.narrow_maps import widened
from ..backbone.vae_steps import Attention, Sample


class StripedConvolution:
    """A 3 x 3 convolution. It keeps the rows at the end of a stripe that the next stripe's first results need, too."""

    def __init__(self, module: nn.Conv2d, stride: int, axis: int, length: int, channels_last: bool) -> None:
        """`module` is the layer and `length` the number of rows of the whole map.

        `channels_last` brings the weights into that layout once; else every stripe that has it would pay for it.
        """
        self._stride, self._axis, self._length = stride, axis, length
        padding = [int(amount) for amount in module.padding]
        self._padded = bool(padding[axis - 2])
        """Whether there is a row of zeros above the map, or (Down, padding 0) none."""
        padding[axis - 2] = 0
        self._module = module
        # The rows of padding are put into the map here.
        self._changes: dict[str, Any] = {"padding": (padding[0], padding[1])}
        if channels_last and module.weight.element_size() > 1:
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            self._changes["_parameters"] = {**module._parameters, "weight": nn.Parameter(weight, False)}
        self._missing = length  # rows of the map that have not come yet
        self._kept: list[Tensor] = []

    def feed(self, stripe: Tensor) -> Tensor | None:
        """The rows of the result that `stripe` completes, None if it completes none."""
        axis = self._axis
        edge = stripe.narrow(axis, 0, 1)
        if self._padded and self._missing == self._length:
            self._kept.append(torch.zeros_like(edge))  # in the stripe's memory layout
        self._missing -= stripe.shape[axis]
        parts = [*self._kept, stripe, *([] if self._missing else [torch.zeros_like(edge)])]
        self._kept.clear()
        rows = torch.cat(parts, axis)
        del stripe, parts, edge
        complete = (rows.shape[axis] - 3) // self._stride + 1 if rows.shape[axis] >= 3 else 0
        if self._missing:
            begin = complete * self._stride
            self._kept.append(rows.narrow(axis, begin, rows.shape[axis] - begin).clone())
        if not complete:
            return None
        if not self._padded:  # a column of zeros at the right, or a row of them below
            rows = F.pad(rows, (0, 1, 0, 0) if axis == 2 else (0, 0, 0, 1))
        with changed(self._module, self._changes):
            wide = widened(self._module, rows)
            result: Tensor = self._module(rows if wide is None else wide)
        return result if wide is None else result[..., :1]


class StripedAttention:
    """Attention in windows, each of which sees some samples around it and a sample of the rest of the map."""

    def __init__(
        self, step: Attention, axis: int, length: int, window: int, margin: int, sample: Sample | None = None
    ) -> None:
        """`window` is the largest side of a window, `margin` what it sees on each side, `length` the rows of the map.

        Of the rest of the map every window sees `sample`.
        """
        self._step, self._axis, self._length = step, axis, length
        self._window, self._margin, self._sample = window, margin, sample
        self._bands = deque(even_parts(length, window))
        """First and last row of the windows that have not been computed."""
        self._rows: list[Tensor] = []
        self._first, self._stop = 0, 0
        """Which rows of the map `_rows` holds."""

    def feed(self, stripe: Tensor) -> Tensor | None:
        """The rows of the result that `stripe` completes, None if it completes none."""
        self._rows.append(stripe)
        self._stop += stripe.shape[self._axis]
        del stripe
        found = []
        while self._bands and self._stop >= min(self._bands[0][1] + self._margin, self._length):
            begin, end = self._bands.popleft()
            rows = torch.cat(self._rows, self._axis) if len(self._rows) > 1 else self._rows[0]
            found.append(self._band(rows, begin, end))
            keep = max(0, end - self._margin)
            kept = rows.narrow(self._axis, keep - self._first, self._stop - keep).clone() if self._bands else None
            self._rows[:] = [] if kept is None else [kept]
            self._first = keep
        return torch.cat(found, self._axis) if len(found) > 1 else found[0] if found else None

    def _band(self, rows: Tensor, begin: int, end: int) -> Tensor:
        """The result for the rows [begin, end) of the map, of which `rows` are those from `_first` on."""
        low, high = max(0, begin - self._margin), min(self._length, end + self._margin)
        asking = rows.narrow(self._axis, begin - self._first, end - begin)
        asked = rows.narrow(self._axis, low - self._first, high - low)
        across = 5 - self._axis
        width, parts = rows.shape[across], []
        for left, right in even_parts(width, self._window):
            near, far = max(0, left - self._margin), min(width, right + self._margin)
            window, seen = asking.narrow(across, left, right - left), asked.narrow(across, near, far - near)
            parts.append(self._step.run(window, seen, self._sample))
        return torch.cat(parts, across) if len(parts) > 1 else parts[0]


@contextmanager
def changed(module: nn.Module, attributes: dict[str, Any]) -> Iterator[None]:
    """`module` has other `attributes`, which it must have already, for the length of the block.

    A copy of the module will not do: ComfyUI notes on each module where its weights are (DynamicVRAM), so it would
    upload and pin those of every copy again.
    """
    own = vars(module)
    before = {name: own[name] for name in attributes}
    own.update(attributes)
    try:
        yield
    finally:
        own.update(before)


def fed(layer: Callable[[Tensor], Tensor | None], stripes: Iterator[Tensor]) -> Iterator[Tensor]:
    """What `layer` gives for each of `stripes`, without the times when it gives None."""
    # map and filter hold no stripe that has passed; a generator's own variables would hold one for each step.
    return filter(lambda rows: rows is not None, map(layer, stripes))  # type: ignore[arg-type]


def regrouped(stripes: Iterator[Tensor], axis: int, rows_of: Callable[[Tensor], int]) -> Iterator[Tensor]:
    """The same map in stripes of at most `rows_of(stripe)` rows: large ones are cut, small ones joined."""
    pending: deque[Tensor] = deque()
    gathered = 0
    for stripe in stripes:
        rows, size = rows_of(stripe), stripe.shape[axis]
        if pending and gathered + size > rows:
            yield _joined(pending, axis)
            gathered = 0
        pieces = deque(stripe.split(-(-size // -(-size // rows)), axis))
        del stripe
        while len(pieces) > 1:
            yield pieces.popleft()
        gathered += pieces[0].shape[axis]
        pending.append(pieces.popleft())
        if 2 * gathered > rows:  # more than half as many as allowed: not worth waiting for the next stripe
            yield _joined(pending, axis)
            gathered = 0
    if pending:
        yield _joined(pending, axis)


def _joined(pieces: deque[Tensor], axis: int) -> Tensor:
    """All of `pieces` as one; empties `pieces`."""
    whole = torch.cat(list(pieces), axis) if len(pieces) > 1 else pieces[0]
    pieces.clear()
    return whole


def even_parts(length: int, most: int) -> list[tuple[int, int]]:
    """[0, length) in the fewest parts of at most `most`, all of nearly the same size: (begin, end) of each."""
    count = -(-length // most)
    edges = [index * length // count for index in range(count + 1)]
    return list(pairwise(edges))
