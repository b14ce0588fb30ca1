"""Foreign checkpoints that are pickles, read as plain tensors: no code in them is ever run."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import IcmsrError


def read_pickle(path: Path) -> dict[str, Any]:
    """The plain values and tensors of a file that `torch.save` wrote, on the CPU and mapped where its format allows.

    Read with weights_only: an object that asks for code is refused, and nothing of it is run. Raises `IcmsrError`.
    """
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        raise IcmsrError(
            f"{path}: is a .safetensors file, this kind of checkpoint is a pickle: for a LoRA file use the kind lora"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a newer pickle protocol: what cannot be read is refused below
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file fails anywhere inside torch's reader
        if type(error).__name__ != "UnpicklingError":  # by name: the pack imports no pickle, registries refuse it
            raise IcmsrError(f"{path}: truncated, damaged or not written by torch.save: download it again") from error
        # torch's own text advises to switch the protection off, so it is not passed on.
        asked = re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", str(error))
        raise IcmsrError(
            f"{path}: refused, and no code in it was run: this pickle holds more than plain tensors"
            f"{f' ({asked[1]})' if asked else ''}: get the checkpoint from its authors"
        ) from error
    if not isinstance(values, dict):
        raise IcmsrError(f"{path}: expected a dictionary of tensors, got {type(values).__name__}: download it again")
    return values
