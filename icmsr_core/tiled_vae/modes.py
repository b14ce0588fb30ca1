"""How a `Stream` gets past a GroupNorm, whose statistics are the whole map's: it waits, or it is told them beforehand.

`ExactStream` holds the whole map until they are known, `BoundedStream` takes an `Estimate`. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.vae_steps import Attention, Norm, Residual, Sample, Step, TensorMap, VaeHalf
from ..steps import Part, Steps
from .held_map import HeldMap
from .stream import Flow, Stream


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


class ExactStream(Stream):
    """Every map before a GroupNorm is kept whole, attention is over the whole map: the untiled result."""

    def __init__(self, half: VaeHalf, axis: int, done: Part | None = None) -> None:
        """`done` is told the share of the work that is done."""
        super().__init__(half, axis)
        self.statistics: dict[Norm, Statistics] = {}
        """Of every norm that has run."""
        self._done = done or Steps().part(0)
        self._stages, self._stage = count_norms(half.steps) + 1, 0

    @property
    def share_before_the_end(self) -> float:
        """Share of the work that is done when the last steps begin to give stripes."""
        return 1 - 1 / self._stages

    def store(self, flow: Flow) -> HeldMap:
        """The whole map of `flow`."""
        if flow.held is not None:
            return flow.held
        held, position, place = HeldMap(self.axis), 0, None
        for chunk in flow.chunks:
            place = place or self._place(flow, chunk)
            held.keep(chunk.to(place), flow.length)
            position += chunk.shape[self.axis]
            del chunk
            self._done.reach(min(1.0, (self._stage + position / flow.length) / self._stages))
        self._stage += 1
        return held

    def _place(self, flow: Flow, chunk: Tensor) -> torch.device:
        """Where the whole of `flow` is kept, of which `chunk` is a stripe."""
        size = chunk.numel() // chunk.shape[self.axis] * flow.length * chunk.element_size()
        # Twice its size, because what comes of it needs a place too.
        return chunk.device if 2 * size <= self.half.room() else torch.device("cpu")

    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        held = self.store(flow)
        known = self.statistics[step] = self.measure(step.groups, held)
        chunks = self._moved(held.take_all()) if flow.held is None else flow.chunks
        return Flow(map(normaliser(step, known), chunks), flow.length, flow.nominal)

    def measure(self, groups: int, held: HeldMap) -> Statistics:
        """Of every one of `groups` groups of the channels of the map `held`, [1, C, H, W]."""
        sizes = torch.tensor([float(chunk.shape[self.axis]) for chunk in held.read()], dtype=torch.float64)
        return combine(sizes / sizes.sum(), *self.moments_of(groups, held.read(), len(sizes)))

    def moments_of(self, groups: int, maps: Iterable[Tensor], number: int) -> tuple[Tensor, Tensor]:
        """`moments` of `number` maps [1, C, h, w] on any device: float64 [number, groups] on the CPU, as all have."""
        # One place for all of it. Small tensors that stay, one from every stripe, lie in glibc's heap between what is
        # free again, and none of that then serves for the next stripe: half of a map's memory and more is lost.
        found = torch.empty(2, number, groups, device=self.half.device)
        for index, part in enumerate(self._moved(maps)):
            found[:, index : index + 1] = torch.stack(moments(groups, part))
            del part
        means, variances = found.cpu().double()
        return means, variances

    def _before_fork(self, flow: Flow) -> Flow:
        held = self.store(flow)
        return Flow(held.take_all(), flow.length, flow.nominal, held=held)

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        return self._windows(step, flow, 2**62, 0)


class BoundedStream(Stream):
    """Statistics are given, attention is to windows and a sample of the rest: memory is set by the stripes."""

    def __init__(self, half: VaeHalf, axis: int, estimate: Estimate, window: int, margin: int) -> None:
        """`window` and `margin` of the attention are in samples of its map."""
        super().__init__(half, axis)
        self._estimate, self._window, self._margin = estimate, window, margin

    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        return flow._replace(chunks=map(normaliser(step, self._estimate.statistics[step]), flow.chunks))

    def _before_fork(self, flow: Flow) -> Flow:
        return flow

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        return self._windows(step, flow, self._window, self._margin, self._estimate.samples.get(step))


def moments(groups: int, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each map and group of the channels of `maps` [N, C, h, w]: float32 [N, groups]."""
    # Not by torch's GroupNorm: on a CPU in channels_last its variance is a mean square less a squared mean, 7% off
    # where the mean is a hundred deviations, as in flat pictures. This takes as long.
    maps = maps.float()
    means = maps.mean((2, 3), keepdim=True)
    variances = (maps - means).square_().mean((2, 3)).unflatten(1, (groups, -1))
    means = means.flatten(1).unflatten(1, (groups, -1))
    mean = means.mean(2)
    return mean, variances.mean(2) + (means - mean[..., None]).square().mean(2)


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
    return sum(count_norms(step.main) if isinstance(step, Residual) else isinstance(step, Norm) for step in steps)
