"""bfloat16 in training: autocast, and the memory layout in which an encoder is fast.

Matrix units (AMX of a CPU, tensor cores of a card) take convolutions in channels_last. In torch's usual layout every
convolution first converts its input. Measured on a CPU with AMX: nano's encoder runs twice as fast in channels_last, a
training step of its UNet a fifth slower, for group norm's backward pass is slow in that layout.
"""

from __future__ import annotations

import torch
from torch import nn


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The `precision` of a forward pass on `device`: bf16, or fp32 for everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def lay_out(network: nn.Module, precision: str) -> None:
    """Puts the weights of an encoder that does not train into channels_last for bf16; their values stay, and so does
    every result but for rounding. For fp32 nothing changes: torch's GroupNorm is less exact in that layout."""
    if precision == "bf16":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
