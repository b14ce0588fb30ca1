"""The VAE over pictures of any size: untiled where it fits and gains, else exact or bounded in stripes.

*Exact* is the untiled result: every GroupNorm waits for its whole map, attention is over the whole picture. *Bounded*
needs memory for stripes only: the statistics of every GroupNorm are estimated (`tiled_vae_statistics`), attention is
to a window and to a sample of the rest. Neither computes anything twice or has seams to hide (`tiled_vae_stream`).
A VAE without GroupNorm is exact with memory for stripes only, in either mode.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..backbone.vae_steps import Pointwise, UnknownLayer, VaeHalf, VaePart, Widened
from ..pictures.ranges import signed_to_unit, unit_to_signed
from .estimate import estimate_whole
from .modes import BoundedStream, Estimate, ExactStream, count_norms
from .stream import STRIPE_BYTES, Flow

LARGEST_EXACT = 2048 * 2048
"""Pixels up to which `auto` is exact: at 4096 x 4096 the middle's attention alone would cost as much as the rest."""
ATTENTION_WINDOW, ATTENTION_MARGIN = 64, 16
"""Side of the attention's windows in bounded mode, and what each sees around it, in latent cells: 512 and 128 pixels at
Stable Diffusion's factor of 8, about what its VAE was trained with."""

Result = TypeVar("Result")


class Stripes(NamedTuple):
    """How a latent is cut: `number` stripes of `cells` cells along `axis` (2: rows, 3: columns), the last of less."""

    axis: int
    cells: int
    number: int


def plan_stripes(height: int, width: int, tile: int) -> Stripes:
    """Stripes over `height` x `width` cells with the area of a tile of `tile` x `tile`, across the shorter side.

    One when the whole is no larger than a tile, or `tile` is 0. Never less than one cell wide, so the memory of a
    very small tile is that of one row of cells.
    """
    axis, length, across = (2, height, width) if height >= width else (3, width, height)
    cells = min(length, max(1, tile * tile // across)) if tile else length
    count = -(-length // cells)
    return Stripes(axis, -(-length // count), -(-length // -(-length // count)))


def is_exact(mode: str, height: int, width: int) -> bool:
    """Whether the VAE mode `mode` (auto, exact or bounded) is exact for a picture of `height` x `width` pixels."""
    return mode == "exact" or (mode == "auto" and height * width <= LARGEST_EXACT)


def encode_tiled(
    backbone: Backbone,
    image: Tensor,
    *,
    tile: int,
    exact: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Scaled latent [1, C, H/f, W/f] of `image` [1, 3, H, W] in [0, 1], float32, on the UNet's device.

    `tile` in latent cells sets the memory (`plan_stripes`), `exact` the mode. `progress` is called with the number of
    stripes just done, as many in all as the plan has, and may raise to stop. Raises `UnknownLayer` for a VAE whose
    layers are not known when there is more than one stripe.
    """
    factor = backbone.descriptor.latent_factor
    stripes = plan_stripes(image.shape[2] // factor, image.shape[3] // factor, tile)
    ticker, across = _Ticker(stripes.number, progress), image.shape[5 - stripes.axis]
    shape = [1, backbone.descriptor.latent_channels, image.shape[2] // factor, image.shape[3] // factor]

    def encode() -> Tensor:
        half = _half(backbone, "encoder", stripes.cells * factor * across, stripes)
        if half is None:
            whole = backbone.encode(unit_to_signed(image))
            ticker.reach(1)
            return whole
        latent: Tensor | None = None
        half = replace(half, steps=(Pointwise(unit_to_signed), *half.steps))
        for position, chunk in _run(half, image, factor, factor, tile, stripes, exact, ticker):
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
    *,
    tile: int,
    exact: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the picture of the scaled `latent` [1, C, h, w] into `out` [1, 3, H, W]: in [0, 1], not clamped.

    What of the picture lies beyond H <= h*f and W <= w*f is left out. The rest is as in `encode_tiled`.
    """
    factor = backbone.descriptor.latent_factor
    stripes = plan_stripes(latent.shape[2], latent.shape[3], tile)
    ticker = _Ticker(stripes.number, progress)
    height, width = out.shape[2:]

    def decode() -> None:
        half = _half(backbone, "decoder", stripes.cells * factor * factor * latent.shape[5 - stripes.axis], stripes)
        if half is None:
            out.copy_(signed_to_unit(backbone.decode(latent)[:, :, :height, :width]))
            ticker.reach(1)
            return
        for position, chunk in _run(half, latent, 1, factor, tile, stripes, exact, ticker):
            room = min(out.shape[stripes.axis] - position, chunk.shape[stripes.axis])
            if room > 0:
                part = chunk.narrow(stripes.axis, 0, room)[:, :, :height, :width]
                out.narrow(stripes.axis, position, room).copy_(signed_to_unit(part.float()))

    again_when_widened(decode)


def _half(backbone: Backbone, part: VaePart, pixels: int, stripes: Stripes) -> VaeHalf | None:
    """The half to run in `stripes` of `pixels`; None where that gains nothing: a single one, or layers without a step.

    On a CPU even a single one is cut, finer than that (`STRIPE_BYTES`), and takes half to two thirds of the untiled
    VAE's time (docs/performance.md). Raises `UnknownLayer` for such layers when there are more.
    """
    try:
        half = backbone.vae_half(part, pixels)
    except UnknownLayer:
        if stripes.number > 1:
            raise
        return None
    return half if stripes.number > 1 or half.device.type in STRIPE_BYTES else None


def _run(
    half: VaeHalf,
    source: Tensor,
    unit: int,
    factor: int,
    tile: int,
    stripes: Stripes,
    exact: bool,
    ticker: _Ticker,
) -> Iterator[tuple[int, Tensor]]:
    """The stripes of the result, each with its place along the axis; `unit` samples of `source` are one cell."""
    stream: ExactStream | BoundedStream
    if not count_norms(half.steps):  # nothing to wait for and nothing to estimate
        stream, before = BoundedStream(half, stripes.axis, Estimate({}), ATTENTION_WINDOW, ATTENTION_MARGIN), 0.0
    elif exact or stripes.number == 1:
        stream = ExactStream(half, stripes.axis, ticker.reach)
        before = stream.share_before_the_end
    else:
        estimate = estimate_whole(half, source, unit, factor, tile)
        stream = BoundedStream(half, stripes.axis, estimate, ATTENTION_WINDOW, ATTENTION_MARGIN)
        before = 0.0
    flow = stream.through(half.steps, stream.source(source, stripes.cells * unit))
    return _numbered(flow, stripes.axis, before, ticker)


def _numbered(flow: Flow, axis: int, before: float, ticker: _Ticker) -> Iterator[tuple[int, Tensor]]:
    position = 0
    for chunk in flow.chunks:
        size = chunk.shape[axis]
        yield position, chunk
        del chunk
        position += size
        ticker.reach(before + (1 - before) * position / flow.length)


class _Ticker:
    """Tells how far the work is in whole steps, each once."""

    def __init__(self, total: int, progress: Callable[[int], None] | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def reach(self, share: float) -> None:
        new = int(share * self._total + 1e-6) - self._done
        if new > 0 and self._progress is not None:
            self._done += new
            self._progress(new)


def again_when_widened(work: Callable[[], Result]) -> Result:
    """`work()`, and once more where it stopped with `Widened`: it must begin anew by itself."""
    try:
        return work()
    except Widened:
        pass
    # Out of the except block, where the error no longer holds the tensors of the first attempt.
    return work()
