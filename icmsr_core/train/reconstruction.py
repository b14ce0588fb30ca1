"""Reconstruction losses between a result and the truth: pure functions of [N, 3, H, W] tensors in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def charbonnier(result: Tensor, truth: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Mean of ``sqrt(d^2 + epsilon^2)``: an L1 that is smooth at zero (Charbonnier et al. 1994)."""
    return (result - truth).square().add(epsilon**2).sqrt().mean()


def gradient_l1(result: Tensor, truth: Tensor) -> Tensor:
    """Mean L1 distance of horizontal and vertical differences: edges count, tone does not."""
    difference = result - truth
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def fourier_l1(result: Tensor, truth: Tensor) -> Tensor:
    """Mean L1 distance of the magnitudes of the orthonormal 2-D spectrum.

    Blind to phase: it asks for the right amount of detail at each frequency, which the L1 alone averages away.
    """
    return (_magnitude(result) - _magnitude(truth)).abs().mean()


def _magnitude(image: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(image.float(), norm="ortho")
    return spectrum.real.square().add(spectrum.imag.square()).add(1e-8).sqrt()
