"""The bounded VAE over parts of a picture, as if it had run over all of it. Source: ours.

The statistics of the encoder are estimated from fields all over the picture, as ever (`estimate`). Those of the decoder
would be estimated from the whole latent, of which only the parts are known. But the encoder's fields, once encoded, are
a sample of it: the decoder's statistics come from the same fields. What the UNet would have made of a field outside of
all parts is approximated by the affine map of each channel that takes the encoded parts to the mean and the deviation
of the clean ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..backbone.vae_steps import Pointwise, VaeHalf
from ..pictures.ranges import signed_to_unit, unit_to_signed
from ..steps import Portion
from .estimate import Fields, Frame, draw_fields, estimate_fields, field_windows
from .modes import BoundedStream, Estimate, count_norms
from .tiled import ATTENTION_MARGIN, ATTENTION_WINDOW, Stripes, again_when_widened


class Region(NamedTuple):
    """A part of a latent, in cells, and the stripes in which the VAE runs over it."""

    top: int
    left: int
    height: int
    width: int
    stripes: Stripes

    def slices(self, scale: int = 1) -> tuple[slice, slice]:
        """Its rows and columns in a map with `scale` samples per cell along each axis."""
        return (
            slice(self.top * scale, (self.top + self.height) * scale),
            slice(self.left * scale, (self.left + self.width) * scale),
        )


@dataclass(frozen=True, eq=False)
class EncodedRegions:
    """What `encode_regions` knows of a picture."""

    latents: list[Tensor]
    """Of each region its scaled latent [1, C, h, w], float32."""
    cells: tuple[int, int]
    """Height and width of the whole latent."""
    fields: Fields | None
    """The fields that stand for the picture; None for a VAE without GroupNorm."""
    windows: Tensor | None
    """Their windows in the latent, [N, C, h, w]."""


def encode_regions(
    backbone: Backbone, image: Tensor, regions: Sequence[Region], tile: int, done: Portion
) -> EncodedRegions:
    """The latents of `regions` of `image` [1, 3, H, W] in [0, 1]. `tile` is the side of a stripe's area in cells."""
    factor = backbone.descriptor.latent_factor
    cells = image.shape[2] // factor, image.shape[3] // factor

    def encode() -> EncodedRegions:
        half = backbone.vae_half("encoder", _pixels(regions, factor))
        half = replace(half, steps=(Pointwise(unit_to_signed), *half.steps))
        estimate, fields, windows = Estimate({}), None, None
        if count_norms(half.steps):
            fields = draw_fields(image, factor, factor)
            given = field_windows(image, fields, factor)
            estimate, windows = estimate_fields(half, Frame.at(fields, cells, factor), given, tile)
        run = _Run(half, estimate, factor, done, _stripes(regions))
        latents = [
            run.through(image[(..., *region.slices(factor))], region.stripes, lambda chunk: chunk) for region in regions
        ]
        return EncodedRegions(latents, cells, fields, windows)

    return again_when_widened(encode)


def decode_regions(
    backbone: Backbone,
    encoded: EncodedRegions,
    clean: Sequence[Tensor],
    regions: Sequence[Region],
    tile: int,
    done: Portion,
) -> list[Tensor]:
    """The pictures [1, 3, H, W] in [0, 1], not clamped, of the latents `clean` [1, C, h, w] of `regions`."""
    factor = backbone.descriptor.latent_factor

    def decode() -> list[Tensor]:
        half = backbone.vae_half("decoder", _pixels(regions, factor))
        estimate = Estimate({})
        if count_norms(half.steps):
            assert encoded.fields is not None  # an encoder with norms; decoders have them if encoders do
            frame = Frame.at(encoded.fields, encoded.cells, 1)
            estimate, _ = estimate_fields(half, frame, _clean_windows(frame, encoded, clean, regions), tile)
        run = _Run(half, estimate, 1, done, _stripes(regions))
        return [
            run.through(latent, region.stripes, lambda chunk: signed_to_unit(chunk.float()))
            for latent, region in zip(clean, regions)
        ]

    return again_when_widened(decode)


class _Run:
    """One half of a VAE over one region after another."""

    def __init__(self, half: VaeHalf, estimate: Estimate, unit: int, done: Portion, stripes: int) -> None:
        """`unit` is the number of samples of the source per cell, `stripes` the number of stripes of all regions."""
        self._half, self._estimate, self._unit = half, estimate, unit
        self._done, self._stripes, self._finished = done, stripes, 0

    def through(self, source: Tensor, stripes: Stripes, made: Callable[[Tensor], Tensor]) -> Tensor:
        """What the half makes of `source` [1, C, H, W], each stripe after `made`."""
        stream = BoundedStream(self._half, stripes.axis, self._estimate, ATTENTION_WINDOW, ATTENTION_MARGIN)
        flow = stream.through(self._half.steps, stream.source(source, stripes.cells * self._unit))
        parts, position = [], 0
        for chunk in flow.chunks:
            position += chunk.shape[stripes.axis]
            parts.append(made(chunk))
            del chunk
            self._done.reach((self._finished + stripes.number * position / flow.length) / self._stripes)
        self._finished += stripes.number
        return torch.cat(parts, stripes.axis)


def matched(latent: Tensor, encoded: Iterable[Tensor], clean: Iterable[Tensor]) -> Tensor:
    """`latent` [N, C, h, w], encoded, as the UNet would make it clean: with the change of mean and deviation from all
    of `encoded` to all of `clean` ([C, cells] each), channel by channel."""
    before, after = (torch.cat([part.float() for part in parts], 1) for parts in (list(encoded), list(clean)))
    gain = after.std(1, correction=0) / before.std(1, correction=0).clamp_min(1e-6)
    shift = after.mean(1) - gain * before.mean(1)
    return torch.addcmul(shift.view(1, -1, 1, 1), latent.float(), gain.view(1, -1, 1, 1))


def _clean_windows(frame: Frame, encoded: EncodedRegions, clean: Sequence[Tensor], regions: Sequence[Region]) -> Tensor:
    """The windows of the fields in the clean latent: known inside the regions, approximated outside."""
    assert encoded.windows is not None  # there are fields
    windows = matched(
        encoded.windows.to(clean[0].device),
        (latent[0].flatten(1).to(clean[0].device) for latent in encoded.latents),
        (latent[0].flatten(1) for latent in clean),
    )
    height, width = frame.window
    for window, (top, left) in zip(windows, map(frame.start, encoded.fields.corners if encoded.fields else [])):
        for latent, region in zip(clean, regions):
            first, last = max(top, region.top), min(top + height, region.top + region.height)
            begin, end = max(left, region.left), min(left + width, region.left + region.width)
            if first < last and begin < end:
                window[:, first - top : last - top, begin - left : end - left] = latent[
                    0, :, first - region.top : last - region.top, begin - region.left : end - region.left
                ]
    return windows


def _stripes(regions: Sequence[Region]) -> int:
    return sum(region.stripes.number for region in regions)


def _pixels(regions: Sequence[Region], factor: int) -> int:
    """Pixels of the largest stripe."""
    across = (region.stripes.cells * (region.width, region.height)[region.stripes.axis - 2] for region in regions)
    return max(across) * factor**2
