"""Devices by name."""

from __future__ import annotations

import torch

from ..errors import IcmsrError


def pick_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is CUDA where there is one, else the CPU.

    Raises `IcmsrError` for a device that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise IcmsrError(f"device {name} cannot be used here ({reason}): try auto or cpu") from error
    return device
