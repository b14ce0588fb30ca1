"""Reads pickled checkpoints as plain tensors; code in them is never run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IcmsrError
from .tensor_files import first_names


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary of tensors and plain values in a file written by `torch.save`, on the CPU, in its own memory.

    Read with weights_only. Raises `IcmsrError` for a file that is missing, damaged or another kind, and for a pickle
    with anything else in it, which is refused without running it.
    """
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about newer pickle protocols: a file that cannot be read is refused below
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere inside torch's reader
        if type(error).__name__ != "UnpicklingError":  # by name: the pack imports no pickle, registries refuse it
            raise IcmsrError(f"{path}: truncated, damaged or not written by torch.save: download it again") from error
        # torch's own message advises to switch the protection off, so it is not shown.
        asked = re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", str(error))
        raise IcmsrError(
            f"{path}: refused, and no code in it was run: this pickle holds more than plain tensors"
            f"{f' ({asked[1]})' if asked else ''}: get the checkpoint from its authors"
        ) from error
    if not isinstance(values, dict):
        raise IcmsrError(f"{path}: expected a dictionary of tensors, got {type(values).__name__}: download it again")
    return values


def read_tensor_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a file from `torch.save`. Raises `IcmsrError` as `read_pickle`, and for other values."""
    values = read_pickle(path)
    others = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if others:
        raise IcmsrError(f"{path}: must hold tensors only, these entries are not: {first_names(others)}")
    return values
