"""One-step super-resolution: resize, pad, encode, one UNet pass, closed-form x0, decode, crop, colour.

The paper's generator (arXiv 2511.22048, section 3): the low-quality picture is resized to the size of the result and
encoded, its latent is treated as the noisy latent at one fixed timestep, and one UNet pass gives the clean latent in
closed form. The encoder gives the posterior's mode, so the result depends on picture, weights and settings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..backbone.vae_steps import UnknownLayer
from ..errors import IcmsrError
from ..steps import Steps
from ..tiled_vae.tiled import decode_tiled, encode_tiled
from ..transfer import to_device
from .color import apply_color_fix
from .plan import UpscalePlan, plan_upscale
from .settings import UpscaleSettings
from .sizes import at_work_size, fitted, pad_to_multiple
from .tiling import Box, run_tiles

ROOM_PER_PIXEL = 2 * 2 * 12
"""Bytes per pixel of the result that must be free for it and the enlarged picture to be kept with the VAE: twice what
the two take, for the VAE needs room, too."""


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
) -> Tensor:
    """`image` [N, 3, H, W] in [0, 1] at the plan's target size, [N, 3, H', W'] in [0, 1], float32, on its own device.

    The pictures of a batch run one after another: memory grows with N only by the pictures themselves, and each result
    equals that of the picture alone. `steps` counts N times `plan.steps` and may raise to stop; `features` are a
    T2I-Adapter's. Raises `IcmsrError` for an input that is not such a tensor, or not of the plan's size.
    """
    _check_shape(image)
    if not bool(image.isfinite().all()):
        raise IcmsrError("expected finite pictures in [0, 1], got NaN or infinite values: fix the step that made them")
    if tuple(image.shape[2:]) != plan.source:
        planned, given = ("{} x {}".format(*size) for size in (plan.source, image.shape[2:]))
        raise IcmsrError(f"the plan is for pictures of {planned} (height x width), got {given}: make one for this size")
    steps = steps or Steps()
    steps.begin(image.shape[0] * plan.steps)
    result = torch.empty((image.shape[0], 3, *plan.target), dtype=torch.float32, device=image.device)
    for index in range(image.shape[0]):
        one = slice(index, index + 1)
        _upscale_one(backbone, image[one], result[one], plan, steps, features)
    return result


def _check_shape(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise IcmsrError(f"expected pictures [N, 3, H, W] of at least 1 x 1 pixel, got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise IcmsrError(f"expected floating-point pictures in [0, 1], got {image.dtype}: convert it, 8-bit by / 255")


def _upscale_one(
    backbone: Backbone, image: Tensor, out: Tensor, plan: UpscalePlan, steps: Steps, features: TileFeatures | None
) -> None:
    """Writes the result of one picture [1, 3, H, W] into `out` [1, 3, H', W']."""
    descriptor, frame = backbone.descriptor, plan.frame
    height, width = frame.work
    place = _picture_device(backbone, plan, image.device)
    own = place != out.device or frame.work != frame.target
    result = out.new_empty((1, 3, height, width), device=place) if own else out
    padded = pad_to_multiple(at_work_size(to_device(image, place), frame, plan.settings.resize), descriptor.multiple_of)
    latent = encode_tiled(backbone, padded, plan.stripes, exact=plan.exact, steps=steps)

    def clean(tiles: Tensor, boxes: tuple[Box, ...]) -> Tensor:
        residuals = None if features is None else features(boxes)
        return descriptor.clean(tiles, backbone.predict_noise(tiles, descriptor.timestep, residuals))

    latent = run_tiles(latent, plan.tiles, clean, batch=plan.settings.batch, steps=steps)
    decode_tiled(backbone, latent, result, plan.stripes, exact=plan.exact, steps=steps)
    apply_color_fix(plan.settings.color_fix, result, padded[:, :, :height, :width], out=result).clamp_(0, 1)
    if own:
        out.copy_(fitted(result, frame))


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
