"""Losses on spectra: the right amount of detail, wherever it lies. Tensors [N, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def fourier_l1(result: Tensor, truth: Tensor) -> Tensor:
    """Mean L1 distance of the magnitudes of the orthonormal 2-D spectrum.

    Blind to phase: it asks for the right amount of detail at each frequency, which the L1 alone averages away.
    """
    return (_magnitude(result) - _magnitude(truth)).abs().mean()


def local_spectrum(result: Tensor, truth: Tensor, window: int = 8, floor: float = 0.02) -> Tensor:
    """Mean squared log ratio of local amplitudes: how much of each frequency and direction, place by place (ours).

    Windows of `window` pixels at half that step give the DCT of the luma (mean of the channels). The amplitude of a
    coefficient is its root mean square over 3 x 3 neighbouring windows, and the distance log^2 (a + floor)/(b + floor),
    over all coefficients but the mean's, weighted with 1 / (u^2 + v^2) so that every octave counts alike. `floor` is in
    units of the pictures: below it (2.5 grey levels of 255) nobody sees a texture. Blind to phase, unlike an L1, and
    local, unlike `fourier_l1`: it asks for the right amount of detail where a network of any size cannot know its
    place. Sides of at least ``2 * window``.
    """
    first, second = (_amplitudes(picture, window) for picture in (result, truth))
    weights = _octave_weights(window, first.device)
    return (((first + floor) / (second + floor)).log().square().mean(dim=(0, 2, 3)) * weights).sum()


def _amplitudes(picture: Tensor, window: int) -> Tensor:
    luma = picture.float().mean(dim=1, keepdim=True)
    with torch.autocast(luma.device.type, enabled=False):
        coefficients = F.conv2d(luma, _dct_filters(window, luma.device), stride=window // 2)
        # Divided by the window: a coefficient then has the unit of the pixels.
        energy = F.avg_pool2d((coefficients / window).square(), 3, stride=1)
    return (energy + 1e-8).sqrt()


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _dct_filters(window: int, device: torch.device) -> Tensor:
    """The orthonormal 2-D DCT-II without its constant, as filters [window^2 - 1, 1, window, window]."""
    place = torch.arange(window, dtype=torch.float64)
    basis = torch.cos(math.pi * (place[None] + 0.5) * place[:, None] / window) * math.sqrt(2 / window)
    basis[0] /= math.sqrt(2)
    filters = torch.einsum("ux,vy->uvxy", basis, basis).reshape(-1, 1, window, window)
    return filters[1:].float().to(device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _octave_weights(window: int, device: torch.device) -> Tensor:
    """1 / (u^2 + v^2) for the coefficients of `_dct_filters`, with a sum of one."""
    square = torch.arange(window, dtype=torch.float64).square()
    weights = 1 / (square[:, None] + square[None]).flatten()[1:]
    return (weights / weights.sum()).float().to(device)


def _magnitude(image: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(image.float(), norm="ortho")
    return spectrum.real.square().add(spectrum.imag.square()).add(1e-8).sqrt()
