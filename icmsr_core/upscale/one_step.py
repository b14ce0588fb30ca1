"""One-step super-resolution: resize, pad, encode, one UNet pass, closed-form x0, decode, crop, colour.

The paper's generator (arXiv 2511.22048, section 3): the low-quality picture is resized to the size of the result and
encoded, its latent is treated as the noisy latent at one fixed timestep, and one UNet pass gives the clean latent in
closed form. The encoder gives the posterior's mode, so the result depends on picture, weights and settings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..backbone.vae_steps import UnknownLayer
from ..errors import IcmsrError
from ..steps import Steps
from ..tiled_vae.regions import Region, decode_regions, encode_regions
from ..tiled_vae.tiled import decode_tiled, encode_tiled
from ..transfer import to_device
from .color import apply_color_fix
from .masking import MaskPlan, filled, plan_mask
from .plan import UpscalePlan, plan_upscale
from .preview import Preview
from .settings import UpscaleSettings
from .sizes import at_work_size, fitted, pad_to_multiple
from .tiling import Box, run_tiles
from .turns import turn_on

ROOM_PER_PIXEL = 2 * 2 * 12
"""Bytes per pixel of the result that must be free for it and the enlarged picture to be kept with the VAE: twice what
the two take, for the VAE needs room, too."""


BLENDED_ROWS = 512
"""Rows that are blended at a time."""


class TileFeatures(Protocol):
    """Gives a T2I-Adapter's residuals for the tiles at `boxes` (latent cells), one tensor per UNet level."""

    def __call__(self, boxes: Sequence[Box]) -> Sequence[Tensor]: ...


def upscale(
    backbone: Backbone,
    image: Tensor,
    settings: UpscaleSettings | None = None,
    *,
    steps: Steps | None = None,
    features: TileFeatures | None = None,
) -> Tensor:
    """`run_plan` with the plan that `settings` (the defaults if None) give for pictures of this size."""
    _check_shape(image)
    plan = plan_upscale(backbone.descriptor, image.shape[2], image.shape[3], settings or UpscaleSettings())
    return run_plan(backbone, image, plan, steps=steps, features=features)


@torch.inference_mode()
def run_plan(
    backbone: Backbone,
    image: Tensor,
    plan: UpscalePlan,
    *,
    steps: Steps | None = None,
    features: TileFeatures | None = None,
    preview: Preview | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`image` [N, 3, H, W] in [0, 1] at the plan's target size, [N, 3, H', W'] in [0, 1], float32, on its own device.

    The pictures of a batch run one after another: memory grows with N only by the pictures themselves, and each result
    equals that of the picture alone. `steps` counts N times `plan.steps`, or fewer with `mask`, and may raise to stop,
    and so may `preview`, which is shown what is finished. `features` are a T2I-Adapter's. `mask` [1 or N, 1, h, w] in
    [0, 1] covers the pictures in any size of its own: 1 where to work, elsewhere the result is the enlarged picture
    (`masking`); all 0 is as if there were none. Threads may share a backbone: they take turns (`turns`). Raises
    `IcmsrError` for an input that is not such a tensor, or not of the plan's size.
    """
    _check_shape(image)
    if not bool(image.isfinite().all()):
        raise IcmsrError("expected finite pictures in [0, 1], got NaN or infinite values: fix the step that made them")
    if tuple(image.shape[2:]) != plan.source:
        planned, given = ("{} x {}".format(*size) for size in (plan.source, image.shape[2:]))
        raise IcmsrError(f"the plan is for pictures of {planned} (height x width), got {given}: make one for this size")
    count = image.shape[0]
    masks = [None if mask is None else plan_mask(backbone.descriptor, plan, one) for one in _maps(mask, count)]
    run = _Run(backbone, plan, steps or Steps(), features, preview)
    each = masks * (count // len(masks))
    run.steps.begin(sum(plan.steps if one is None else one.steps for one in each))
    result = torch.empty((count, 3, *plan.target), dtype=torch.float32, device=image.device)
    with turn_on(backbone):
        for index, masked in enumerate(each):
            one = slice(index, index + 1)
            run.upscale(image[one], result[one], masked)
    return result


def _maps(mask: Tensor | None, count: int) -> Sequence[Tensor]:
    """The maps [1, 1, h, w] of `mask`, one for all of `count` pictures or one for each."""
    if mask is None:
        return [torch.empty(0)]
    if mask.ndim != 4 or mask.shape[0] not in (1, count) or mask.shape[1] != 1 or not mask.numel():
        raise IcmsrError(f"expected a mask [1 or {count}, 1, height, width], got {tuple(mask.shape)}")
    maps: tuple[Tensor, ...] = mask.split(1)
    return maps


def _check_shape(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise IcmsrError(f"expected pictures [N, 3, H, W] of at least 1 x 1 pixel, got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise IcmsrError(f"expected floating-point pictures in [0, 1], got {image.dtype}: convert it, 8-bit by / 255")


@dataclass(frozen=True)
class _Run:
    """One plan with what it runs on and who watches it."""

    backbone: Backbone
    plan: UpscalePlan
    steps: Steps
    features: TileFeatures | None
    preview: Preview | None

    def upscale(self, image: Tensor, out: Tensor, mask: MaskPlan | None) -> None:
        """Writes the result of one picture [1, 3, H, W] into `out` [1, 3, H', W']."""
        plan, frame = self.plan, self.plan.frame
        height, width = frame.work
        place = _picture_device(self.backbone, plan, image.device)
        own = place != out.device or frame.work != frame.target
        result = out.new_empty((1, 3, height, width), device=place) if own else out
        multiple = self.backbone.descriptor.multiple_of
        padded = pad_to_multiple(at_work_size(to_device(image, place), frame, plan.settings.resize), multiple)
        if self.preview is not None:
            self.preview.start(padded, frame.work)
        if mask is not None and mask.regions:
            self._parts(padded, result, mask)
        else:
            self._whole(padded, result, mask)
        if own:
            out.copy_(fitted(result, frame))

    def _whole(self, padded: Tensor, result: Tensor, mask: MaskPlan | None) -> None:
        """Writes the result of the enlarged picture `padded` into `result`; the VAE runs over all of it."""
        plan, preview = self.plan, self.preview
        latent = encode_tiled(self.backbone, padded, plan.stripes, exact=plan.exact, steps=self.steps)
        if preview is not None:
            preview.encoded(latent, self.backbone.descriptor.latent_factor)
        tiles = plan.tiles if mask is None else mask.tiles
        clean = run_tiles(latent, tiles, self._clean, batch=plan.settings.batch, steps=self.steps)
        if mask is not None:
            clean = filled(clean, latent, tiles)
        del latent
        written = None if preview is None or mask is not None else preview.written
        decode_tiled(self.backbone, clean, result, plan.stripes, exact=plan.exact, steps=self.steps, written=written)
        reference = padded[:, :, : result.shape[2], : result.shape[3]]
        apply_color_fix(plan.settings.color_fix, result, reference, out=result).clamp_(0, 1)
        if mask is not None:
            _blend(result, reference, mask, 0, 0)
            if preview is not None:
                preview.written(result, 0, 0)

    def _parts(self, padded: Tensor, result: Tensor, mask: MaskPlan) -> None:
        """As `_whole`, but only the mask's regions run."""
        backbone, settings, preview = self.backbone, self.plan.settings, self.preview
        factor, tile = backbone.descriptor.latent_factor, self.plan.stripes.tile
        encoded = encode_regions(backbone, padded, mask.regions, tile, self.steps.portion(mask.stripes))
        clean = []
        for latent, region, tiles in zip(encoded.latents, mask.regions, mask.region_tiles):
            if preview is not None:
                preview.encoded(latent, factor, region.top * factor, region.left * factor)

            def run(given: Tensor, boxes: tuple[Box, ...], region: Region = region) -> Tensor:
                return self._clean(given, tuple(box.moved(region.top, region.left) for box in boxes))

            clean.append(run_tiles(latent, tiles, run, batch=settings.batch, steps=self.steps))
        portion = self.steps.portion(mask.stripes)
        pictures = decode_regions(backbone, encoded, clean, mask.regions, tile, portion)
        height, width = result.shape[2:]
        result.copy_(padded[:, :, :height, :width]).clamp_(0, 1)  # of some generators it overshoots
        for picture, region in zip(pictures, mask.regions):
            rows, columns = region.slices(factor)
            rows, columns = slice(rows.start, min(rows.stop, height)), slice(columns.start, min(columns.stop, width))
            reference = padded[:, :, rows, columns]
            part = picture[:, :, : reference.shape[2], : reference.shape[3]].to(result.device)
            part = apply_color_fix(settings.color_fix, part, reference, out=part).clamp_(0, 1)
            _blend(part, reference, mask, rows.start, columns.start)
            result[:, :, rows, columns] = part
            if preview is not None:
                preview.written(part, rows.start, columns.start)

    def _clean(self, tiles: Tensor, boxes: tuple[Box, ...]) -> Tensor:
        """The clean latents of `tiles` [B, C, h, w], which lie at `boxes`."""
        descriptor = self.backbone.descriptor
        residuals = None if self.features is None else self.features(boxes)
        clean = descriptor.clean(tiles, self.backbone.predict_noise(tiles, descriptor.timestep, residuals))
        if self.preview is not None:
            self.preview.tiles(clean, boxes, descriptor.latent_factor)
        return clean


def _blend(result: Tensor, reference: Tensor, mask: MaskPlan, top: int, left: int) -> None:
    """Puts `reference` [1, 3, h, w] in the place of `result`, as far as `mask` says; both begin at (`top`, `left`)."""
    height, width = result.shape[2:]
    for first in range(0, height, BLENDED_ROWS):  # so that no weights of the whole picture are held
        rows = slice(first, min(height, first + BLENDED_ROWS))
        weights = mask.weights(slice(top + rows.start, top + rows.stop), slice(left, left + width))
        part = result[:, :, rows]
        torch.lerp(reference[:, :, rows], part, to_device(weights, part.device), out=part).clamp_(0, 1)


def _picture_device(backbone: Backbone, plan: UpscalePlan, given: torch.device) -> torch.device:
    """Where the enlarged picture and the result are kept and worked on: with the VAE if they fit there, else `given`.

    So they cross the bus once, as a whole, and no processor of the main memory resizes or blurs them.
    """
    factor, across = backbone.descriptor.latent_factor, plan.padded[3 - plan.stripes.axis]
    try:
        half = backbone.vae_half("encoder", plan.stripes.cells * factor * across)
    except UnknownLayer:
        return given
    fits = ROOM_PER_PIXEL * plan.padded[0] * plan.padded[1] <= half.room()
    return half.device if half.device.type != "cpu" and fits else given
