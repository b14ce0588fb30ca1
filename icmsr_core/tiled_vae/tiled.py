"""The VAE over pictures of any size: untiled, or in stripes and then exact or bounded.

*Exact* gives the untiled result: every GroupNorm waits for its whole map, and attention is over the whole picture.
*Bounded* needs memory for stripes only: the statistics of every GroupNorm are estimated from a part of the picture
(`estimate`), and attention is over a window and a sample of the rest. In neither mode is anything computed twice, and
there are no seams to hide (`stream`). A VAE without GroupNorm is exact in both, with memory for stripes only.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..backbone.vae_steps import Pointwise, UnknownLayer, VaeHalf, VaePart, Widened
from ..pictures.ranges import signed_to_unit, unit_to_signed
from ..steps import Portion, Steps
from .estimate import estimate_whole
from .modes import BoundedStream, Estimate, ExactStream, count_norms
from .stream import STRIPE_BYTES, Flow

LARGEST_EXACT = 2048 * 2048
"""Pixels up to which `auto` is exact. At 4096 x 4096 the middle's attention alone would cost as much as the rest."""
ATTENTION_WINDOW, ATTENTION_MARGIN = 64, 16
"""Attention in bounded mode, in latent cells: side of its windows, and how much each sees around itself. 512 and 128
pixels at Stable Diffusion's factor of 8, about what its VAE was trained with."""

Written = Callable[[Tensor, int, int], None]
"""Called with a finished part of a picture [1, 3, h, w], and the row and the column of pixels where it begins."""

Result = TypeVar("Result")


class Stripes(NamedTuple):
    """How a latent is cut into stripes, the same for encoder and decoder."""

    axis: int
    """The axis that is cut: 2 for stripes of rows, 3 for stripes of columns."""
    cells: int
    """Cells of a stripe along the axis; the last stripe may have fewer."""
    number: int
    """How many stripes there are."""
    tile: int
    """Side in cells of the square whose area a stripe has; 0 where the whole latent is one stripe."""


def plan_stripes(height: int, width: int, tile: int) -> Stripes:
    """Stripes for `height` x `width` cells, each with the area of a tile of `tile` x `tile` cells.

    They run across the shorter side. There is one where the whole is no larger than a tile, or `tile` is 0. A stripe is
    at least one cell wide, so a very small tile needs the memory of one row of cells.
    """
    axis, length, across = (2, height, width) if height >= width else (3, width, height)
    most = min(length, max(1, tile * tile // across)) if tile else length
    cells = -(-length // -(-length // most))
    return Stripes(axis, cells, -(-length // cells), tile)


def is_exact(mode: str, height: int, width: int) -> bool:
    """Whether the VAE mode `mode` (auto, exact or bounded) is exact for a picture of `height` x `width` pixels."""
    return mode == "exact" or (mode == "auto" and height * width <= LARGEST_EXACT)


def encode_tiled(
    backbone: Backbone, image: Tensor, stripes: Stripes, *, exact: bool = True, steps: Steps | None = None
) -> Tensor:
    """Scaled latent [1, C, H/f, W/f] of `image` [1, 3, H, W] in [0, 1], float32, on the UNet's device.

    `stripes` is the plan for H/f x W/f cells, `exact` the mode. `steps` advances by as many steps as there are stripes,
    and may raise to stop. Raises `UnknownLayer` for a VAE whose layers are not known when there is more than one
    stripe.
    """
    descriptor = backbone.descriptor
    run = _Run(backbone, "encoder", image, stripes, exact, (steps or Steps()).portion(stripes.number))
    shape = (1, descriptor.latent_channels, *(side // descriptor.latent_factor for side in image.shape[2:]))

    def encode() -> Tensor:
        half = run.half()
        if half is None:
            whole = backbone.encode(unit_to_signed(image))
            run.done.reach(1)
            return whole
        latent: Tensor | None = None
        half = replace(half, steps=(Pointwise(unit_to_signed), *half.steps))
        for position, chunk in run.chunks(half):
            if latent is None:
                latent = torch.empty(shape, dtype=torch.float32, device=chunk.device)
            latent.narrow(stripes.axis, position, chunk.shape[stripes.axis]).copy_(chunk)
        assert latent is not None  # a picture has at least one stripe
        return latent

    return again_when_widened(encode)


def decode_tiled(
    backbone: Backbone,
    latent: Tensor,
    out: Tensor,
    stripes: Stripes,
    *,
    exact: bool = True,
    steps: Steps | None = None,
    written: Written | None = None,
) -> None:
    """Writes the picture of the scaled `latent` [1, C, h, w] into `out` [1, 3, H, W]: in [0, 1], not clamped.

    H <= h*f and W <= w*f: the rest of the picture is padding and is dropped. `stripes` is the plan for h x w cells; all
    else is as in `encode_tiled`. `written` is told of every part of `out` that has come.
    """
    run = _Run(backbone, "decoder", latent, stripes, exact, (steps or Steps()).portion(stripes.number))
    height, width = out.shape[2:]

    def decode() -> None:
        half = run.half()
        if half is None:
            out.copy_(signed_to_unit(backbone.decode(latent)[:, :, :height, :width]))
            run.done.reach(1)
            if written is not None:
                written(out, 0, 0)
            return
        for position, chunk in run.chunks(half):
            room = min(out.shape[stripes.axis] - position, chunk.shape[stripes.axis])
            if room > 0:
                part = chunk.narrow(stripes.axis, 0, room)[:, :, :height, :width]
                place = out.narrow(stripes.axis, position, room).copy_(signed_to_unit(part.float()))
                if written is not None:
                    written(place, *((position, 0) if stripes.axis == 2 else (0, position)))

    again_when_widened(decode)


@dataclass(frozen=True)
class _Run:
    """One half of a VAE over one picture or latent."""

    backbone: Backbone
    part: VaePart
    source: Tensor
    """The picture or the latent, [1, C, H, W]."""
    stripes: Stripes
    exact: bool
    done: Portion
    """The steps of this half."""

    @property
    def unit(self) -> int:
        """Samples of the source per latent cell, along each axis."""
        return self.backbone.descriptor.latent_factor if self.part == "encoder" else 1

    def half(self) -> VaeHalf | None:
        """The half to run in stripes. None where the backbone is to run it untiled: a single stripe gains nothing.

        Except on a CPU, where a single stripe is cut again (`STRIPE_BYTES`) and takes half to two thirds of the untiled
        VAE's time (docs/performance.md). Layers that are not known run untiled, too; raises `UnknownLayer` for them
        when there are several stripes.
        """
        several = self.stripes.number > 1
        across = self.source.shape[5 - self.stripes.axis] // self.unit
        try:
            pixels = self.stripes.cells * across * self.backbone.descriptor.latent_factor**2
            half = self.backbone.vae_half(self.part, pixels)
        except UnknownLayer:
            if several:
                raise
            return None
        return half if several or half.device.type in STRIPE_BYTES else None

    def chunks(self, half: VaeHalf) -> Iterator[tuple[int, Tensor]]:
        """The result of `half` in parts, each with the place along the axis where it begins."""
        axis = self.stripes.axis
        stream: ExactStream | BoundedStream
        before = 0.0  # the share of the work that is done when the first part comes
        if not count_norms(half.steps):  # nothing to wait for and nothing to estimate
            stream = BoundedStream(half, axis, Estimate({}), ATTENTION_WINDOW, ATTENTION_MARGIN)
        elif self.exact or self.stripes.number == 1:
            stream = ExactStream(half, axis, self.done)
            before = stream.share_before_the_end
        else:
            factor = self.backbone.descriptor.latent_factor
            estimate = estimate_whole(half, self.source, self.unit, factor, self.stripes.tile)
            stream = BoundedStream(half, axis, estimate, ATTENTION_WINDOW, ATTENTION_MARGIN)
        flow = stream.through(half.steps, stream.source(self.source, self.stripes.cells * self.unit))
        return self._placed(flow, before)

    def _placed(self, flow: Flow, before: float) -> Iterator[tuple[int, Tensor]]:
        position = 0
        for chunk in flow.chunks:
            size = chunk.shape[self.stripes.axis]
            yield position, chunk
            del chunk
            position += size
            self.done.reach(before + (1 - before) * position / flow.length)


def again_when_widened(work: Callable[[], Result]) -> Result:
    """`work()`; if it stops with `Widened`, once more from its beginning."""
    try:
        return work()
    except Widened:
        pass
    # Out of the except block, where the error no longer holds the tensors of the first attempt.
    return work()
