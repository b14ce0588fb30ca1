"""The VAE in tiles, so that memory is set by the tile and not by the picture.

Every tile is normalised on its own here; neighbours are blended over the plan's ramps and what differs in tone
between tiles lies below the band that the wavelet colour correction takes from the input.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .backbone import Backbone
from .tiling import TilePlan, run_tiles


def encode_tiled(
    backbone: Backbone, image: Tensor, plan: TilePlan, *, batch: int = 1, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Latent [1, C, H/f, W/f] of `image` [1, 3, H, W] in [-1, 1]; `plan` is in latent cells."""
    factor = backbone.descriptor.latent_factor
    return run_tiles(
        image, plan, lambda tiles, _: backbone.encode(tiles), source_scale=factor, batch=batch, progress=progress
    )


def decode_tiled(
    backbone: Backbone, latent: Tensor, plan: TilePlan, *, batch: int = 1, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Image [1, 3, h*f, w*f], not clamped, of `latent` [1, C, h, w]; `plan` is in latent cells."""
    factor = backbone.descriptor.latent_factor
    return run_tiles(
        latent, plan, lambda tiles, _: backbone.decode(tiles), result_scale=factor, batch=batch, progress=progress
    )
