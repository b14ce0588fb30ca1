"""Attention that never holds the scores of all queries: one fused kernel, or slices of queries. Source: ours.

The scores of a VAE's attention are L x L for L latent cells: 17 GB in float32 for 2048 x 2048 pixels of Stable
Diffusion. torch computes them piece by piece in fused kernels, but not on every device and not for every width of a
head (the VAE has one head of 512), and otherwise holds all of them without a word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 2**27
"""Most bytes of scores in a slice, which exist twice for a moment. Far below the 4 GiB above which macOS aborts."""


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, fused: bool = True) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value: [N, heads, L, d].

    `query` is [N, heads, L, d], `key` and `value` are [N, heads, L', d], `bias` is [1, 1, 1, L']. Runs in one fused
    kernel if torch has one for these tensors (their last stride must be 1) and `fused` allows it, else in slices.
    """
    if fused and has_fused_kernel(query, key, value, bias):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attend_in_slices(query, key, value, bias)


def has_fused_kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's attention runs on these tensors without holding their scores."""
    try:
        return torch._fused_sdp_choice(query, key, value, bias) > 0  # 0: by plain operations
    except (AttributeError, NotImplementedError):  # MPS has no such choice: there it is always plain operations
        return False


def attend_in_slices(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend` in plain operations, for as many queries at a time as `SCORE_BYTES` allows. Computes in float32."""
    keys, values = key.float().transpose(-1, -2), value.float()
    rows = max(1, SCORE_BYTES // (4 * query.shape[:-2].numel() * keys.shape[-1]))
    found = torch.empty_like(query)
    for part, result in zip(query.split(rows, -2), found.split(rows, -2)):
        scores = (part.float() * part.shape[-1] ** -0.5) @ keys
        if bias is not None:
            scores += bias
        result.copy_(scores.softmax(-1) @ values)
    return found
