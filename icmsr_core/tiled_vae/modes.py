"""The two kinds of `Stream`. They differ in where a GroupNorm's statistics, which are the whole map's, come from.

`ExactStream` holds the whole map and measures it; `BoundedStream` is given an `Estimate` before it starts.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.vae_steps import Attention, Norm, Residual, Sample, Step, TensorMap, VaeHalf
from ..steps import Portion, Steps
from ..transfer import to_device
from .held_map import HeldMap
from .stream import Flow, Stream


class Statistics(NamedTuple):
    """Mean and variance of each group of a `Norm` over one map: float64 [groups] each, on the CPU."""

    mean: Tensor
    variance: Tensor


class Estimate(NamedTuple):
    """What a `BoundedStream` has to know about the whole picture."""

    statistics: Mapping[Norm, Statistics]
    """The statistics of every norm."""
    samples: Mapping[Attention, Sample] = MappingProxyType({})
    """For each attention a sample of the map that it looks at. Without one, a window sees nothing beyond its margin."""


class ExactStream(Stream):
    """Gives the untiled result: it keeps every map before a GroupNorm whole, and attention is over the whole map."""

    def __init__(self, half: VaeHalf, axis: int, done: Portion | None = None) -> None:
        """`done` is told the share of the work that is done."""
        super().__init__(half, axis)
        self.statistics: dict[Norm, Statistics] = {}
        """The statistics of every norm that has run."""
        self._done = done or Steps().portion(0)
        self._stages, self._stage = count_norms(half.steps) + 1, 0

    @property
    def share_before_the_end(self) -> float:
        """Share of the work that is done when the first stripe of the result comes."""
        return 1 - 1 / self._stages

    def store(self, flow: Flow) -> HeldMap:
        """Runs `flow` to its end and holds its whole map."""
        if flow.held is not None:
            return flow.held
        held, position, place = HeldMap(self.axis), 0, None
        for chunk in flow.chunks:
            place = place or self._place(flow, chunk)
            if place != chunk.device:  # measured now, so that it need not come back for that
                held.moments.append(torch.stack(moments(chunk.shape[1], chunk)))
            held.keep(chunk.to(place), flow.length)
            position += chunk.shape[self.axis]
            del chunk
            self._done.reach(min(1.0, (self._stage + position / flow.length) / self._stages))
        self._stage += 1
        return held

    def _place(self, flow: Flow, chunk: Tensor) -> torch.device:
        """The device to keep the whole of `flow` on; `chunk` is one of its stripes."""
        size = chunk.numel() // chunk.shape[self.axis] * flow.length * chunk.element_size()
        # Twice its size, because what is computed from it needs room, too.
        return chunk.device if 2 * size <= self.half.room() else torch.device("cpu")

    def _normalised(self, step: Norm, flow: Flow) -> Flow:
        held = self.store(flow)
        known = self.statistics[step] = self.measure(step.groups, held)
        chunks = self._moved(held.take_all()) if flow.held is None else flow.chunks
        return Flow(map(normaliser(step, known), chunks), flow.length, flow.nominal)

    def measure(self, groups: int, held: HeldMap) -> Statistics:
        """The statistics of the map `held` [1, C, H, W] for a norm with `groups` groups of channels."""
        sizes = torch.tensor([float(chunk.shape[self.axis]) for chunk in held.read()], dtype=torch.float64)
        if held.moments:
            channels = combine(sizes / sizes.sum(), *torch.cat(held.moments, 1).cpu().double())
            means, variances = (value.unflatten(0, (groups, -1)).T for value in channels)
            each = means.shape[0]
            return combine(means.new_full((each,), 1 / each), means, variances)
        return combine(sizes / sizes.sum(), *self.moments_of(groups, held.read(), len(sizes)))

    def moments_of(self, groups: int, maps: Iterable[Tensor], number: int) -> tuple[Tensor, Tensor]:
        """`moments` of `number` maps, as parts [n, C, h, w] on any device: float64 [number, groups] each, on the CPU.

        Waits for the device once.
        """
        # One tensor for all of them. A small tensor kept from every stripe would split the free memory in glibc's heap
        # so that no next stripe fits into the gaps: more than half of a map's memory would be lost.
        found = torch.empty(2, number, groups, device=self.half.device)
        position = 0
        for part in self._moved(maps):
            found[:, position : position + part.shape[0]] = torch.stack(moments(groups, part))
            position += part.shape[0]
            del part
        means, variances = found.cpu().double()
        return means, variances

    def _before_fork(self, flow: Flow) -> Flow:
        held = self.store(flow)
        return Flow(held.take_all(), flow.length, flow.nominal, held=held)

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        return self._windows(step, flow, 2**62, 0)


class BoundedStream(Stream):
    """Needs memory for stripes only: statistics are given, and attention is over windows and a sample of the rest."""

    def __init__(self, half: VaeHalf, axis: int, estimate: Estimate, window: int, margin: int) -> None:
        """`window` and `margin` are those of `StripedAttention`, in samples of the attention's map."""
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
    maps = maps.float()
    if maps.device.type == "cpu":
        # Not by torch's GroupNorm. On a CPU in channels_last it computes the variance as mean square minus squared
        # mean, which is 7% off where the mean is a hundred deviations, as in flat pictures. This takes no longer.
        means = maps.mean((2, 3), keepdim=True)
        variances = (maps - means).square_().mean((2, 3)).unflatten(1, (groups, -1))
        means = means.flatten(1).unflatten(1, (groups, -1))
        mean = means.mean(2)
        return mean, variances.mean(2) + (means - mean[..., None]).square().mean(2)
    variance, mean = torch.var_mean(maps.unflatten(1, (groups, -1)), (2, 3, 4), correction=0)  # in one kernel
    return mean, variance


def combine(weights: Tensor, means: Tensor, variances: Tensor) -> Statistics:
    """Statistics of a whole from those of n parts: `means` and `variances` [n, groups], `weights` [n] with sum 1."""
    share = weights[:, None]
    mean = (share * means).sum(0)
    return Statistics(mean, (share * (variances + (means - mean).square())).sum(0))


def normaliser(step: Norm, known: Statistics) -> TensorMap:
    """The GroupNorm `step` of a map with statistics `known`, for its stripes: computes in float32, keeps their type."""
    weight, bias = (value.detach().unflatten(0, (step.groups, -1)) for value in step.affine())
    work = torch.float64 if weight.device.type == "cpu" else torch.float32  # MPS has no other
    given = torch.stack([known.mean, (known.variance + step.eps).sqrt()])
    mean, deviation = to_device(given.to(work), weight.device)[..., None]
    scale = weight.to(work) / deviation
    shift = bias.to(work) - mean * scale
    scale, shift = (value.float().view(1, -1, 1, 1) for value in (scale, shift))

    def run(chunk: Tensor) -> Tensor:
        return torch.addcmul(shift, chunk.float(), scale).to(chunk.dtype)

    return run


def count_norms(steps: Sequence[Step]) -> int:
    """Number of `Norm`s among `steps`, those inside residuals included."""
    return sum(count_norms(step.main) if isinstance(step, Residual) else isinstance(step, Norm) for step in steps)
