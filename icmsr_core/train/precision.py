"""bfloat16 in training: autocast, and the memory layout that its instructions read.

Matrix units (AMX of a CPU, tensor cores of a card) take convolutions in channels_last. In torch's usual layout every
convolution first converts its input, which costs as much as the layer itself.
"""

from __future__ import annotations

import torch
from torch import nn


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The `precision` of a forward pass on `device`: bf16, or fp32 for everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def lay_out(network: nn.Module, precision: str) -> None:
    """Puts the weights of `network` into channels_last for bf16; their values stay, and so does every result but for
    rounding. For fp32 nothing changes: torch's GroupNorm is less exact in that layout."""
    if precision == "bf16":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
