"""Copies from main memory to a device that do not wait for it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def pins_memory(device: torch.device) -> bool:
    """Whether `device` copies from page-locked main memory by itself, while the program goes on: CUDA, ROCm, XPU.

    The CPU and MPS do not: their memory is the program's own.
    """
    if device.type in ("cpu", "mps", "meta"):
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except RuntimeError:
        return False


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From main memory, without waiting for what the device still has to do, where it can."""
    if tensor.device.type != "cpu" or not pins_memory(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
