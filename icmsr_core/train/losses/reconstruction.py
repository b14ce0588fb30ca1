"""Reconstruction losses between a result and the truth: pure functions of [N, 3, H, W] tensors in [-1, 1]."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def charbonnier(result: Tensor, truth: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Mean of ``sqrt(d^2 + epsilon^2)``: an L1 that is smooth at zero (Charbonnier et al. 1994)."""
    return (result - truth).square().add(epsilon**2).sqrt().mean()


def gradient_l1(result: Tensor, truth: Tensor) -> Tensor:
    """Mean L1 distance of horizontal and vertical differences: edges count, tone does not."""
    difference = result - truth
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


@torch.no_grad()
def psnr(result: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB over all pictures and channels together, with `result` clamped; for logs, so without a gradient."""
    mse = (result.clamp(-1, 1) - truth).square().mean() / 4  # the peak is 2
    return -10 * mse.log10()


def with_low_frequencies(result: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """`wavelet_color_fix` of `upscale/color.py` in a form that gradients pass through (a test holds the two equal)."""
    low = (reference - result).float()
    channels = low.shape[1]
    with torch.autocast(low.device.type, enabled=False):  # the convolutions would run in bfloat16
        for level in range(levels):
            step = 2**level
            for shape, padding in (((3, 1), (0, 0, step, step)), ((1, 3), (step, step, 0, 0))):
                kernel = _taps(low.device).view(1, 1, *shape).expand(channels, -1, -1, -1)
                low = F.conv2d(F.pad(low, padding, mode="replicate"), kernel, dilation=step, groups=channels)
    return result + low


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # or no gradient could pass it once it was made for a sample grid
def _taps(device: torch.device) -> Tensor:
    """The blur's kernel along one axis, float32 [3]."""
    return torch.tensor([0.25, 0.5, 0.25], device=device)
