"""Opens, reads and writes .safetensors files, with one set of errors.

The library safetensors maps an open file into memory, and its tensors on the CPU are views of it. Under Windows a
mapped file can be neither replaced nor deleted; elsewhere the tensors change with it. What is read here has memory of
its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import IcmsrError
from ..whole_file import replacing
from .file_kinds import unreadable


class TensorFile:
    """An open .safetensors file; `open_tensors` opens and closes it."""

    def __init__(self, opened: Any) -> None:
        """`opened` is what `safe_open` gives."""
        self._opened = opened

    def keys(self) -> list[str]:
        """Names of the tensors, in the order of the file."""
        return list(self._opened.keys())

    def metadata(self) -> dict[str, str]:
        """The file's own entries."""
        return dict(self._opened.metadata() or {})

    def shape(self, key: str) -> list[int]:
        """The shape of the tensor `key`, whose values are not read."""
        return list(self._opened.get_slice(key).get_shape())

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `key` in memory of its own, on the CPU; a floating-point one in `dtype`, if that is given."""
        mapped: Tensor = self._opened.get_tensor(key)
        return mapped.to(dtype if dtype is not None and mapped.is_floating_point() else mapped.dtype, copy=True)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """The .safetensors file at `path`, open for reading; raises `IcmsrError` when it is missing or damaged."""
    if path.is_dir():
        raise IcmsrError(f"{path}: is a folder: name the .safetensors file")
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield TensorFile(file)
    except (SafetensorError, OSError) as error:
        raise IcmsrError(unreadable(path, str(error))) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file; errors as in `open_tensors`."""
    with open_tensors(path) as file:
        return {key: file.tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def read_head(path: Path) -> tuple[list[str], dict[str, str]]:
    """Keys and metadata of a .safetensors file, without its tensors; errors as in `open_tensors`."""
    with open_tensors(path) as file:
        return file.keys(), file.metadata()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors to `path`, which appears complete or not at all. Makes the folder.

    Raises `IcmsrError` where it cannot be written, with the bytes that are needed and free.
    """
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata=dict(metadata))
    except (SafetensorError, OSError) as error:
        raise IcmsrError(f"{path}: cannot be written ({error}): {_space(path.parent, size)}") from error


def _space(folder: Path, size: int) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"
    except OSError:
        free = "how much is free is unknown"
    return f"it needs {size / 1e6:.1f} MB, {free}"


def check_finite(name: object, tensors: Mapping[str, Tensor], way_out: str = "") -> None:
    """Raises `IcmsrError` for NaN or infinite values; the message begins with `name` and ends with `way_out`."""
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]
    if bad:
        raise IcmsrError(f"{name}: NaN or infinite values in {first_names(bad)}{way_out and f': {way_out}'}")


def _is_finite(tensor: Tensor) -> bool:
    eight_bits = tensor.element_size() == 1  # torch has no isfinite for these types
    return bool((tensor.float() if eight_bits else tensor).isfinite().all())


def first_names(items: Iterable[str], most: int = 4) -> str:
    """The first few of `items` and the number of the others, for an error."""
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
