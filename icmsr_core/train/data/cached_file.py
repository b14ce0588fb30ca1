"""Samples that are read piece by piece from one file, which is written before training if it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...weights.tensor_files import open_tensors
from .samples import Samples


class CachedSamples(Samples):
    """Base of samples from a .safetensors file that stays open while they are drawn."""

    file: Path
    """The file. Its metadata entry ``description`` says what was asked for when it was written."""
    _open: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # each worker opens the file for itself

    def opened(self) -> Any:
        """The file as safetensors' `safe_open` gives it."""
        if self._open is None:
            self._open = safe_open(self.file, framework="pt")
        return self._open

    def holds(self, description: str) -> bool:
        """Whether the file is there and was written for `description`."""
        if not self.file.exists():
            return False
        with open_tensors(self.file) as opened:
            return bool(opened.metadata().get("description") == description)

    @staticmethod
    def marks(index: int) -> dict[str, Tensor]:
        """``index``, ``events`` and ``unreadable`` of a sample: photographs are read when the file is written."""
        none = torch.zeros(2, dtype=torch.int64)
        return {"index": torch.tensor(index), "events": none, "unreadable": none - 1}
