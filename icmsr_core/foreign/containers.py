"""Foreign files of tensors in whichever container: .safetensors, or a pickle of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IcmsrError
from ..weights.pickles import read_pickle
from ..weights.tensor_files import first_names, read_tensors

SAFE = ".safetensors"
PICKLED = (".pkl", ".pth", ".pt", ".bin")
"""Endings of pickles, which are read as plain tensors and numbers; no code in them is run."""
CONTAINERS = (SAFE, *PICKLED)
"""Endings of the files that `read_container` reads."""
WRAPPER = "state_dict"
"""The one entry of a pickle that holds everything else, in files of some trainers."""


@dataclass(frozen=True)
class Container:
    """What a file holds."""

    path: Path
    values: Mapping[str, Any]
    """Tensors by name; in a pickle also lists and numbers."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of a .safetensors."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The values, which must be tensors of numbers; raises `IcmsrError` for the names of the others."""
        wrong = [
            key for key, value in self.values.items() if not isinstance(value, Tensor) or value.layout != torch.strided
        ]
        if wrong:
            raise IcmsrError(f"{self.path}: must hold tensors only, these are not: {first_names(wrong)}")
        return {key: value.detach() for key, value in self.values.items()}


def read_container(path: Path) -> Container:
    """The content of the file at `path`, on the CPU.

    Raises `IcmsrError` for another ending and for a file that is missing, damaged, or holds code.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in CONTAINERS:
        raise IcmsrError(f"{path}: foreign weights are a file that ends in {', '.join(CONTAINERS)}: choose the file")
    if suffix == SAFE:
        return Container(path, *read_tensors(path))
    values = read_pickle(path)
    if len(values) == 1 and isinstance(values.get(WRAPPER), dict):
        values = values[WRAPPER]
    return Container(path, {str(key): value for key, value in values.items()})
