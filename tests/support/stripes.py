"""The VAE in stripes of a given tile's area, planned for the picture at hand."""

import torch

from icmsr_core.backbone.protocol import Backbone
from icmsr_core.steps import Steps
from icmsr_core.tiled_vae.tiled import decode_tiled, encode_tiled, plan_stripes


def encode_in_stripes(
    backbone: Backbone, image: torch.Tensor, tile: int, exact: bool = True, steps: Steps | None = None
) -> torch.Tensor:
    """`encode_tiled` of `image` in stripes of the area of `tile` x `tile` cells."""
    factor = backbone.descriptor.latent_factor
    stripes = plan_stripes(image.shape[2] // factor, image.shape[3] // factor, tile)
    return encode_tiled(backbone, image, stripes, exact=exact, steps=steps)


def decode_in_stripes(
    backbone: Backbone,
    latent: torch.Tensor,
    out: torch.Tensor,
    tile: int,
    exact: bool = True,
    steps: Steps | None = None,
) -> None:
    """`decode_tiled` of `latent` in stripes of the area of `tile` x `tile` cells."""
    decode_tiled(backbone, latent, out, plan_stripes(*latent.shape[2:], tile), exact=exact, steps=steps)
