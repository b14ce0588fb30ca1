"""Ranges of pixel values: 8 bits, [0, 1] at the edge of the core, [-1, 1] inside the networks."""

from __future__ import annotations

from torch import Tensor


def to_signed(picture: Tensor) -> Tensor:
    """Pictures uint8 as float32 in [-1, 1]."""
    return picture.float() / 127.5 - 1
