"""The steps of a VAE half over a picture that comes in stripes. Source: ours.

Stripes run along one axis; every convolution keeps the last rows that it saw until those below them arrive, so
nothing is computed twice, no row is ever at an edge that the picture does not have, and stripes need no blending. A
map between two steps exists only as far as the steps after it have not used it up. GroupNorm is the exception, it
needs the whole map first: `ExactStream` keeps the whole map there and reads it again, `BoundedStream` is told the
statistics beforehand.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tiled_vae_steps import Attention, Conv, Down, Norm, Pointwise, Residual, Sample, Step, TensorMap, VaeHalf


class Statistics(NamedTuple):
    """Of one `Norm` over one map, per group: float64 [groups] on the CPU."""

    mean: Tensor
    variance: Tensor


class Estimate(NamedTuple):
    """What a `BoundedStream` has to know of the whole picture."""

    statistics: Mapping[Norm, Statistics]
    """Of every norm."""
    samples: Mapping[Attention, Sample] = MappingProxyType({})
    """For an attention, the map that it looks at; without one it sees its windows only."""


class Flow(NamedTuple):
    """A map on its way: its stripes in order, each [N, C, h, w]; what has passed is no longer held."""

    chunks: Iterator[Tensor]
    length: int
    """Samples of the whole map along the axis of the stripes."""
    nominal: int
    """Samples of a usual stripe along that axis; the last ones may have more, by what the convolutions held back."""
    stored: Tensor | None = None
    """The whole map, where `chunks` only reads it."""
    spare: Tensor | None = None
    """A stored map that nobody reads behind the stripe that comes next, so that this one may be written over it."""


class Stream:
    """Runs steps over a `Flow`; how a map is normalised and how it is read twice is left to the two kinds."""

    def __init__(self, half: VaeHalf, axis: int) -> None:
        """`axis` is 2 for stripes of rows, 3 for stripes of columns."""
        self.half, self.axis, self.across = half, axis, 5 - axis

    def source(self, whole: Tensor, nominal: int, prepare: TensorMap | None = None) -> Flow:
        """`whole` [N, C, H, W] in stripes of `nominal` samples, each through `prepare`."""
        pieces: Iterator[Tensor] = iter(whole.split(nominal, self.axis))
        if prepare is not None:
            pieces = map(prepare, pieces)
        return Flow(self._moved(pieces), whole.shape[self.axis], nominal)

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

    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        raise NotImplementedError

    def _forked(self, flow: Flow) -> tuple[Flow, Callable[[int], Tensor], Tensor | None]:
        """`flow` to be used, a function that gives its next n samples a second time, and what may be written over."""
        raise NotImplementedError

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        raise NotImplementedError

    def _pointwise(self, step: Pointwise, flow: Flow) -> Flow:
        # Before a map grows, so that the stripe that brings what was held back is no larger than the others.
        chunks = _split(flow.chunks, flow.nominal, self.axis) if step.up > 1 else flow.chunks
        return Flow(
            map(step.run, chunks), flow.length * step.up // step.down, max(1, flow.nominal * step.up // step.down)
        )

    def _convolved(self, module: nn.Conv2d, stride: int, flow: Flow) -> Flow:
        """The 3 x 3 convolution `module`; `flow` without the rows that it holds until the next stripe."""
        axis, left = self.axis, flow.length
        # The same layer, weights included, that takes the rows which the padding would otherwise stand for.
        valid = copy.copy(module)
        padding = [int(amount) for amount in module.padding]
        padding[axis - 2] = 0
        valid.padding = (padding[0], padding[1])
        held: list[Tensor] = []

        def feed(chunk: Tensor) -> Tensor | None:
            nonlocal left
            edge = list(chunk.shape)
            edge[axis] = 1
            if stride == 1 and left == flow.length:
                held.append(chunk.new_zeros(edge))
            left -= chunk.shape[axis]
            parts = [*held, chunk, *([] if left else [chunk.new_zeros(edge)])]
            held.clear()
            rows = torch.cat(parts, axis)
            del chunk, parts
            made = (rows.shape[axis] - 3) // stride + 1 if rows.shape[axis] >= 3 else 0
            if left:
                begin = made * stride
                held.append(rows.narrow(axis, begin, rows.shape[axis] - begin).clone())
            if not made:
                return None
            if stride == 2:
                rows = F.pad(rows, (0, 1, 0, 0) if axis == 2 else (0, 0, 0, 1))
            return valid(rows)

        return Flow(
            _present(map(feed, flow.chunks)), flow.length // stride, max(1, flow.nominal // stride)
        )

    def _residual(self, step: Residual, flow: Flow) -> Flow:
        flow, again, spare = self._forked(flow)
        main = self.through(step.main, flow)

        def add(chunk: Tensor) -> Tensor:
            kept = again(chunk.shape[self.axis])
            return chunk.add_(kept if step.shortcut is None else step.shortcut(kept))

        return Flow(map(add, main.chunks), main.length, main.nominal, spare=spare)

    def _windows(
        self, step: Attention, flow: Flow, window: int, context: int, sample: Sample | None = None
    ) -> Flow:
        """Attention in windows of at most `window` x `window`, each of which sees `context` samples around it.

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
            while bounds and stop >= min(bounds[0][1] + context, length):
                begin, end = bounds.popleft()
                band = torch.cat(rows, axis) if len(rows) > 1 else rows[0]
                low, high = max(0, begin - context), min(length, end + context)
                asking = band.narrow(axis, begin - first, end - begin)
                asked = band.narrow(axis, low - first, high - low)
                width, parts = band.shape[across], []
                for left, right in _even(width, window):
                    near, far = max(0, left - context), min(width, right + context)
                    parts.append(step.run(
                        asking.narrow(across, left, right - left), asked.narrow(across, near, far - near), sample
                    ))
                found.append(torch.cat(parts, across) if len(parts) > 1 else parts[0])
                keep = max(0, end - context)
                rows[:] = [band.narrow(axis, keep - first, stop - keep).clone()] if bounds else []
                first = keep
            return torch.cat(found, axis) if len(found) > 1 else found[0] if found else None

        chunks = _split(_present(map(feed, flow.chunks)), flow.nominal, axis)
        return Flow(chunks, length, flow.nominal)


class ExactStream(Stream):
    """Every map before a GroupNorm is kept whole, attention is over the whole map: the untiled result."""

    def __init__(self, half: VaeHalf, axis: int, progress: Callable[[float], None] | None = None) -> None:
        """`progress` is called with the share of the work that is done."""
        super().__init__(half, axis)
        self.statistics: dict[Norm, Statistics] = {}
        """Of every norm that has run."""
        self._progress = progress or (lambda share: None)
        self._stages, self._stage = count_norms(half.steps) + 1, 0

    @property
    def share_before_the_end(self) -> float:
        """Share of the work that is done when the last steps begin to give stripes."""
        return 1 - 1 / self._stages

    def store(self, flow: Flow) -> Tensor:
        """The whole map of `flow` [N, C, H, W]."""
        if flow.stored is not None:
            return flow.stored
        whole, position = None, 0
        for chunk in flow.chunks:
            if whole is None:
                whole = self._place(flow, chunk)
            whole.narrow(self.axis, position, chunk.shape[self.axis]).copy_(chunk)
            position += chunk.shape[self.axis]
            del chunk
            self._progress(min(1.0, (self._stage + position / flow.length) / self._stages))
        assert whole is not None  # a map has at least one stripe
        self._stage += 1
        return whole

    def _place(self, flow: Flow, chunk: Tensor) -> Tensor:
        shape = list(chunk.shape)
        shape[self.axis] = flow.length
        if flow.spare is not None and list(flow.spare.shape) == shape and flow.spare.dtype == chunk.dtype:
            return flow.spare
        # Twice its size, because what it is computed from and what comes of it need a place too.
        fits = 2 * math.prod(shape) * chunk.element_size() <= self.half.room()
        return torch.empty(shape, dtype=chunk.dtype, device=chunk.device if fits else "cpu")

    def _read(self, whole: Tensor, nominal: int) -> Flow:
        chunks = self._moved(whole.split(nominal, self.axis))
        return Flow(chunks, whole.shape[self.axis], nominal, stored=whole)

    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        flow = self._read(self.store(flow), flow.nominal)
        assert flow.stored is not None
        known = self.statistics[step] = self.measure(step.groups, flow.stored, flow.nominal)
        return Flow(map(normaliser(step, known), flow.chunks), flow.length, flow.nominal)

    def measure(self, groups: int, whole: Tensor, nominal: int) -> Statistics:
        """Of every one of `groups` groups of the channels of `whole` [1, C, H, W], read in stripes of `nominal`."""
        parts = []
        for chunk in self._read(whole, nominal).chunks:
            variance, mean = torch.var_mean(chunk.float().reshape(groups, -1), dim=1, correction=0)
            parts.append((chunk.shape[self.axis], mean, variance))
            del chunk
        weights = torch.tensor([size for size, *_ in parts], dtype=torch.float64) / whole.shape[self.axis]
        # Only the few parts are left, in float64 and on the CPU, which every machine has.
        means, variances = (torch.stack(values).cpu().double() for values in zip(*(part[1:] for part in parts)))
        return combine(weights, means, variances)

    def _forked(self, flow: Flow) -> tuple[Flow, Callable[[int], Tensor], Tensor | None]:
        whole, position = self.store(flow), 0

        def again(count: int) -> Tensor:
            nonlocal position
            position += count
            return whole.narrow(self.axis, position - count, count).to(self.half.device)

        return self._read(whole, flow.nominal), again, whole

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        return self._windows(step, flow, 2**62, 0)


class BoundedStream(Stream):
    """Statistics are given, attention is to windows and a sample of the rest: memory is set by the stripes."""

    def __init__(self, half: VaeHalf, axis: int, estimate: Estimate, window: int, context: int) -> None:
        """`window` and `context` of the attention are in samples of its map."""
        super().__init__(half, axis)
        self._estimate, self._window, self._context = estimate, window, context

    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        return flow._replace(chunks=map(normaliser(step, self._estimate.statistics[step]), flow.chunks), spare=None)

    def _forked(self, flow: Flow) -> tuple[Flow, Callable[[int], Tensor], Tensor | None]:
        pending: deque[Tensor] = deque()

        def passing(chunk: Tensor) -> Tensor:
            pending.append(chunk)
            return chunk

        def again(count: int) -> Tensor:
            parts = []
            while count:
                oldest = pending.popleft()
                size = oldest.shape[self.axis]
                if size > count:
                    pending.appendleft(oldest.narrow(self.axis, count, size - count))
                    oldest = oldest.narrow(self.axis, 0, count)
                parts.append(oldest)
                count -= oldest.shape[self.axis]
            return torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]

        return flow._replace(chunks=map(passing, flow.chunks)), again, None

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        return self._windows(step, flow, self._window, self._context, self._estimate.samples.get(step))


def combine(weights: Tensor, means: Tensor, variances: Tensor) -> Statistics:
    """Statistics of a whole whose parts have `means` and `variances` [n, groups] and `weights` [n] that sum to 1."""
    share = weights[:, None]
    mean = (share * means).sum(0)
    return Statistics(mean, (share * (variances + (means - mean).square())).sum(0))


def normaliser(step: Norm, known: Statistics) -> TensorMap:
    """The GroupNorm `step` of a map whose statistics are `known`, in the map's type, computed in float32."""
    weight, bias = (value.detach().cpu().double() for value in step.affine())
    each = weight.shape[0] // step.groups
    scale = weight / (known.variance + step.eps).sqrt().repeat_interleave(each)
    shift = bias - known.mean.repeat_interleave(each) * scale
    scale, shift = (value.float()[None, :, None, None] for value in (scale, shift))

    def run(chunk: Tensor) -> Tensor:
        return torch.addcmul(shift.to(chunk.device), chunk.float(), scale.to(chunk.device)).to(chunk.dtype)

    return run


def count_norms(steps: Sequence[Step]) -> int:
    """How many `Norm`s are among `steps` and in their residuals."""
    return sum(
        count_norms(step.main) if isinstance(step, Residual) else isinstance(step, Norm) for step in steps
    )


def _present(chunks: Iterator[Tensor | None]) -> Iterator[Tensor]:
    # map and filter hold nothing that has passed; a generator's own variables would, one stripe for each step.
    return filter(lambda chunk: chunk is not None, chunks)  # type: ignore[arg-type]


def _split(chunks: Iterator[Tensor], most: int, axis: int) -> Iterator[Tensor]:
    for chunk in chunks:
        pieces = deque(chunk.split(most, axis))
        del chunk
        while pieces:
            yield pieces.popleft()


def _even(length: int, most: int) -> list[tuple[int, int]]:
    """[0, length) in as few parts of at most `most` as there can be, all nearly of one size."""
    count = -(-length // most)
    edges = [index * length // count for index in range(count + 1)]
    return list(pairwise(edges))
