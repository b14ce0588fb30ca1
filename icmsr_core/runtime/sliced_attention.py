"""Self-attention of diffusers' networks in slices of queries, where torch has no fused kernel for it (MPS, some cards).

There diffusers' own processor would hold all scores: 8.6 GB in float32 for a UNet's tile of 1024 px, above the 4 GiB at
which macOS ends the process.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..backbone.attention import attend_in_slices, has_fused_kernel
from .fixed_step import PLAIN_PROCESSORS


class SlicedProcessor:
    """What diffusers' AttnProcessor2_0 computes for the self-attention of Stable Diffusion's UNet and VAE."""

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: None = None, **ignored: Any
    ) -> Tensor:
        """`hidden_states` is [N, L, C] (UNet) or [N, C, h, w] (VAE), and so is the result."""
        shape, hidden = hidden_states.shape, hidden_states
        if len(shape) == 4:
            hidden = rearrange(hidden, "n c h w -> n (h w) c")
        if attention.group_norm is not None:
            hidden = attention.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            rearrange(layer(hidden), "n places (heads d) -> n heads places d", heads=attention.heads)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        found = rearrange(attend_in_slices(query, key, value), "n heads places d -> n places (heads d)")
        found = attention.to_out[1](attention.to_out[0](found))
        if len(shape) == 4:
            found = found.transpose(1, 2).reshape(shape)
        if attention.residual_connection:
            found = found + hidden_states
        return found / attention.rescale_output_factor


def slice_attention(network: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Has every self-attention of `network` run in slices that torch has no fused kernel for on `device` in `dtype`."""
    for module in network.modules():
        plain = type(getattr(module, "processor", None)).__name__ in PLAIN_PROCESSORS
        if plain and not module.is_cross_attention:
            sample = torch.empty(1, module.heads, 8, module.inner_dim // module.heads, device=device, dtype=dtype)
            if not has_fused_kernel(sample, sample, sample, None):
                module.set_processor(SlicedProcessor())
