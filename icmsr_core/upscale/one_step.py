"""One-step super-resolution: resize, pad, encode, one UNet pass, closed-form x0, decode, crop, colour.

The paper's generator (arXiv 2511.22048, section 3): the low-quality picture, already at the size of the result, is
encoded and taken for the latent at one fixed timestep; one UNet pass gives the clean latent in closed form. The
encoder gives the posterior's mode, so the result depends on nothing but picture, weights and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..errors import IcmsrError
from ..tiled_vae.tiled import decode_tiled, encode_tiled, is_exact, plan_stripes
from .color import apply_color_fix
from .settings import UpscaleSettings
from .sizes import pad_to_multiple, padded_size, resize
from .tiling import Box, TilePlan, plan_tiles, run_tiles


class TileFeatures(Protocol):
    """Gives a T2I-Adapter's residuals for the tiles at `boxes` (latent cells), one tensor per UNet level."""

    def __call__(self, boxes: Sequence[Box]) -> Sequence[Tensor]: ...


Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all); may raise to stop the run."""


def make_plan(backbone: Backbone, height: int, width: int, settings: UpscaleSettings) -> TilePlan:
    """The tiles, in latent cells, for a padded picture of `height` x `width` pixels.

    Raises `IcmsrError` when the overlap leaves this family's tiles no step.
    """
    descriptor = backbone.descriptor
    factor = descriptor.latent_factor
    multiple = descriptor.multiple_of // factor
    if max(height, width) > settings.tile > 0 and settings.overlap > settings.tile - descriptor.multiple_of:
        raise IcmsrError(
            f"with the family {descriptor.family} a tile of {settings.tile} takes an overlap of at most "
            f"{settings.tile - descriptor.multiple_of}, got {settings.overlap}: try a tile of {2 * settings.tile}"
        )
    if settings.tile == 0:
        return plan_tiles(height // factor, width // factor, max(height, width) // factor, 0, multiple)
    return plan_tiles(
        height // factor, width // factor, settings.tile // factor, -(-settings.overlap // factor), multiple
    )


def count_tiles(backbone: Backbone, height: int, width: int, settings: UpscaleSettings) -> int:
    """Steps that `upscale` reports for one input of `height` x `width`: the UNet's tiles, twice the VAE's stripes."""
    padded_height, padded_width = padded_size(*settings.target_size(height, width), backbone.descriptor)
    tiles = len(make_plan(backbone, padded_height, padded_width, settings))
    factor = backbone.descriptor.latent_factor
    return tiles + 2 * plan_stripes(padded_height // factor, padded_width // factor, settings.tile // factor).number


@torch.inference_mode()
def upscale(
    backbone: Backbone,
    image: Tensor,
    settings: UpscaleSettings | None = None,
    *,
    progress: Progress | None = None,
    features: TileFeatures | None = None,
) -> Tensor:
    """`image` [N, 3, H, W] in [0, 1], any size from 1 x 1, at its new size [N, 3, H', W'] in [0, 1], on its device.

    Pictures of a batch run one after another, so the memory does not grow with N beyond the pictures themselves, and
    each result equals that of the picture alone. `progress` is called after every batch of tiles.
    Raises `IcmsrError` for an input that is not such a tensor.
    """
    settings = settings or UpscaleSettings()
    if image.ndim != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise IcmsrError(f"expected pictures [N, 3, H, W] of at least 1 x 1 pixel, got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise IcmsrError(f"expected floating-point pictures in [0, 1], got {image.dtype}: convert it, 8-bit by / 255")
    if not bool(image.isfinite().all()):
        raise IcmsrError("expected finite pictures in [0, 1], got NaN or infinite values: mend the step that made them")
    height, width = settings.target_size(*image.shape[-2:])
    total = image.shape[0] * count_tiles(backbone, image.shape[-2], image.shape[-1], settings)
    done = 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        if progress is not None:
            progress(done, total)

    result = torch.empty((image.shape[0], 3, height, width), dtype=torch.float32, device=image.device)
    for index in range(image.shape[0]):
        one = slice(index, index + 1)
        _upscale_one(backbone, image[one], result[one], settings, advance, features)
    return result


def _upscale_one(
    backbone: Backbone,
    image: Tensor,
    out: Tensor,
    settings: UpscaleSettings,
    advance: Callable[[int], None],
    features: TileFeatures | None,
) -> None:
    descriptor = backbone.descriptor
    height, width = out.shape[2:]
    padded = pad_to_multiple(resize(image, height, width), descriptor.multiple_of)
    plan = make_plan(backbone, padded.shape[-2], padded.shape[-1], settings)
    tile = settings.tile // descriptor.latent_factor
    exact = is_exact(settings.vae, padded.shape[-2], padded.shape[-1])
    latent = encode_tiled(backbone, padded, tile=tile, exact=exact, progress=advance)

    def clean(tiles: Tensor, boxes: tuple[Box, ...]) -> Tensor:
        residuals = None if features is None else features(boxes)
        output = backbone.predict_noise(tiles, descriptor.timestep, residuals)
        return descriptor.schedule.x0_from_output(descriptor.prediction, tiles, output, descriptor.timestep)

    latent = run_tiles(latent, plan, clean, batch=settings.batch, progress=advance)
    decode_tiled(backbone, latent, out, tile=tile, exact=exact, progress=advance)
    apply_color_fix(settings.color_fix, out, padded[:, :, :height, :width], out=out).clamp_(0, 1)
