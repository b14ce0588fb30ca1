"""Batches on their way to the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transfer import to_device
from ..tasks.task import Batch


class Transfer:
    """Copies what belongs to one batch to a device, every tensor once however often it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: Batch) -> Batch:
        """`batch` on the device, where some of it may be already."""
        return {name: self._moved(name, value) for name, value in batch.items()}

    def _moved(self, name: str, value: Tensor) -> Tensor:
        if value.device.type != "cpu" or self._device.type == "cpu":
            return value
        source, copy = self._copied.get(name, (None, value))
        if source is not value:
            copy = to_device(value, self._device)
            self._copied[name] = value, copy
        return copy
