"""Devices by name."""

from __future__ import annotations

import torch

from ..errors import IcmsrError


def pick_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is the machine's accelerator (CUDA, ROCm, MPS, XPU, ...), else the CPU.

    Raises `IcmsrError` for a device that cannot be used here.
    """
    if name == "auto":
        name = _accelerator() or "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise IcmsrError(f"device {name} cannot be used here ({reason}): try auto or cpu") from error
    return device


def _accelerator() -> str | None:
    """Name of the accelerator that torch finds here."""
    if hasattr(torch, "accelerator"):  # torch 2.6
        return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return next((name for name, available in found.items() if available), None)
