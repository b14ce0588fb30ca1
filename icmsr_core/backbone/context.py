"""The constant prompt embedding as the context of a UNet's cross-attention."""

from __future__ import annotations

from einops import repeat
from torch import Tensor


def repeated_context(embedding: Tensor, latent: Tensor) -> Tensor:
    """The context [N, tokens, width] for `latent` [N, C, h, w]: `embedding` [tokens, width] for every sample.

    In the latent's type and on its device. A view of `embedding` (or of its one cast copy), not N copies.
    """
    return repeat(embedding.to(latent), "tokens width -> n tokens width", n=latent.shape[0])
