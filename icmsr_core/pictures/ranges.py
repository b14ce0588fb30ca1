"""Ranges of pixel values: 8 bits in files and batches, [0, 1] at the core's edge, [-1, 1] inside the networks.

Every conversion between them is here. Each keeps shape and device and returns a new tensor; gradients pass through.
"""

from __future__ import annotations

from torch import Tensor


def bytes_to_unit(pixels: Tensor) -> Tensor:
    """`pixels` in 0..255 (uint8, or a float type) as float32 in [0, 1]."""
    return pixels.float() / 255


def bytes_to_signed(pixels: Tensor) -> Tensor:
    """`pixels` in 0..255 (uint8, or a float type) as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def unit_to_signed(image: Tensor) -> Tensor:
    """`image` in [0, 1] as [-1, 1], in its own floating type; values beyond the range are not clamped."""
    return image.mul(2).sub_(1)


def signed_to_unit(image: Tensor) -> Tensor:
    """`image` in [-1, 1] as [0, 1], in its own floating type; values beyond the range are not clamped."""
    return image.add(1).div_(2)
