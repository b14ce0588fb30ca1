"""Runs the steps of a VAE half over a picture that comes in stripes. Source: ours.

Every convolution keeps the last rows of a stripe until the next stripe comes (`striped_layers`). So nothing is computed
twice, no stripe has an edge that the picture does not have, and there is nothing to blend. A map between two steps
exists only from where it was last used to where it was last computed. The exception is GroupNorm, which needs to know
the whole map first: `modes` has two ways to deal with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbone.vae_steps import Attention, Conv, Down, Norm, Pointwise, Residual, Sample, Step, VaeHalf
from .held_map import HeldMap
from .striped_layers import StripedAttention, StripedConvolution, fed, regrouped

STRIPE_BYTES = {"cpu": 4 * 2**20}
"""Most bytes of a stripe, by the kind of device. That much is still in a CPU's cache when the next step reads it, and
above 32 MiB glibc would ask the system for new memory for every map. On a device that is not listed, stripes keep the
height that the tile's area gives them (`Flow.nominal`)."""
FEWEST_ROWS = 4
"""Least rows of a stripe that is cut for its bytes: every convolution copies two rows more."""


class Flow(NamedTuple):
    """A map on its way through the steps. Its stripes are made when they are asked for, and not kept."""

    chunks: Iterator[Tensor]
    """The stripes in order, each [N, C, h, w]."""
    length: int
    """Samples of the whole map along the axis of the stripes."""
    nominal: int
    """Samples of a usual stripe along that axis. The last may have more, by the rows that the convolutions kept."""
    held: HeldMap | None = None
    """The whole map, where `chunks` reads from it."""


class Stream(ABC):
    """Runs steps over a `Flow`. Its two kinds differ in how they normalise a map and in how they read one twice."""

    def __init__(self, half: VaeHalf, axis: int) -> None:
        """`axis` is 2 for stripes of rows, 3 for stripes of columns."""
        self.half, self.axis, self.across = half, axis, 5 - axis

    def source(self, whole: Tensor, nominal: int) -> Flow:
        """`whole` [N, C, H, W], on any device, in stripes of `nominal` samples. All later maps have their layout."""
        pieces = self._moved(whole.split(nominal, self.axis))
        if self.half.device.type == "cpu":  # there convolutions take up to a third less time in this layout
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
        """`flow` so that it can be read twice; its stripes may then be on another device."""

    @abstractmethod
    def _attended(self, step: Attention, flow: Flow) -> Flow:
        """`flow` after the attention `step`."""

    def _sized(self, flow: Flow, growth: float) -> Iterator[Tensor]:
        """The stripes of `flow`, regrouped for a step whose result has `growth` times the size of its argument."""
        limit = STRIPE_BYTES.get(self.half.device.type)

        def rows(chunk: Tensor) -> int:
            if limit is None:  # a little more, or the last one would be cut for the rows that convolutions kept
                return flow.nominal + max(2, flow.nominal // 4)
            row = chunk.numel() // chunk.shape[self.axis] * chunk.element_size()
            return int(min(flow.nominal, max(FEWEST_ROWS, limit / max(1.0, growth) // row)))

        return regrouped(flow.chunks, self.axis, rows)

    def _pointwise(self, step: Pointwise, flow: Flow) -> Flow:
        chunks = self._sized(flow, step.up**2) if step.up > 1 else flow.chunks
        return Flow(
            map(step.run, chunks), flow.length * step.up // step.down, max(1, flow.nominal * step.up // step.down)
        )

    def _convolved(self, module: nn.Conv2d, stride: int, flow: Flow) -> Flow:
        """`flow` after the 3 x 3 convolution `module`."""
        stripes = self._sized(flow, module.out_channels / module.in_channels)
        layer = StripedConvolution(module, stride, self.axis, flow.length, self.half.device.type == "cpu")
        return Flow(fed(layer.feed, stripes), flow.length // stride, max(1, flow.nominal // stride))

    def _residual(self, step: Residual, flow: Flow) -> Flow:
        kept, shortcut = HeldMap(self.axis), step.shortcut
        flow = self._before_fork(flow)
        length = flow.length if flow.held is not None else 0  # a flow that is not held keeps only a few stripes

        def passing(piece: Tensor) -> Tensor:
            chunk = piece.to(self.half.device)
            if shortcut is None:
                kept.append(piece)
            else:  # now, so that the stripe itself need not be kept
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
        """`flow` after `step` in windows (`StripedAttention`)."""
        layer = StripedAttention(step, self.axis, flow.length, window, margin, sample)
        return flow._replace(chunks=fed(layer.feed, flow.chunks), held=None)
