"""The files that train/metric_weights.py makes from published weights: their names, and how they are read and written.

Each is a .safetensors. Its metadata entry ``format`` says what it is for, and ``icmsr`` is JSON: the version of the
format, the network if it holds one, and the SHA-256 of its sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import IcmsrError
from ..weights.descriptions import OWN_ENTRY, own_description
from ..weights.tensor_files import read_tensors, write_tensors

FORMAT_VERSION = 1


@dataclass(frozen=True)
class WeightFile:
    """One of the files."""

    name: str
    """Its name in the folder of converted weights."""
    format: str
    """The entry ``format`` of its metadata."""
    title: str
    """What it holds, for errors."""
    sources: str
    """The flags of train/metric_weights.py that name what it is made from."""

    @property
    def command(self) -> str:
        """The command that makes it."""
        return f"python train/metric_weights.py {self.sources} --out DIR"


LPIPS_ALEX = WeightFile("lpips_alex.safetensors", "icmsr-lpips", "LPIPS", "--alex alexnet-owt-7be5be79.pth")
LPIPS_VGG = WeightFile("lpips_vgg.safetensors", "icmsr-lpips", "LPIPS", "--vgg vgg16-397923af.pth")
DISTS = WeightFile("dists.safetensors", "icmsr-dists", "DISTS", "--vgg vgg16-397923af.pth --dists weights.pt")
NIQE = WeightFile("niqe.safetensors", "icmsr-niqe", "NIQE", "--niqe niqe_pris_params.npz")


def read_weight_file(path: Path, kind: WeightFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of the file at `path`, on the CPU.

    Raises `IcmsrError`, which says `kind.command`, for a file that is missing, damaged, another or of another version.
    """
    if not path.exists():
        raise IcmsrError(f"{path}: no such file: make it with {kind.command}")
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != kind.format:
        raise IcmsrError(
            f"{path}: not a converted {kind.title} file (its format is {metadata.get('format', 'not stated')!r}, "
            f"expected {kind.format!r}): make one with {kind.command}"
        )
    description = own_description(path, metadata)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise IcmsrError(
            f"{path}: format version {version}, this version of ICM-SR reads {FORMAT_VERSION}: convert it again with "
            f"{kind.command}"
        )
    return tensors, description


def write_weight_file(path: Path, kind: WeightFile, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes `tensors` with `about` as their description, atomically. Makes the folder."""
    description = json.dumps({"format_version": FORMAT_VERSION, **about}, sort_keys=True)
    # Clones: tensors of a pickle may share memory, which safetensors does not write.
    plain = {key: value.detach().clone() for key, value in tensors.items()}
    write_tensors(path, plain, {"format": kind.format, OWN_ENTRY: description})


def check_weights(name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `IcmsrError`, which says `name`, unless `tensors` have exactly these shapes, floating and finite."""
    check_names(name, tensors, shapes)
    for key, shape in shapes.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise IcmsrError(f"{name}: not the expected weights: {key} is {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise IcmsrError(f"{name}: {key} holds values that are not finite floating-point numbers")


def check_names(name: str, tensors: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raises `IcmsrError`, which says `name`, unless `tensors` have exactly these names."""
    expected = list(expected)
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise IcmsrError(f"{name}: not the expected weights: {len(missing)} tensors are missing, such as {missing[0]}")
    surplus = sorted(set(tensors) - set(expected))
    if surplus:
        raise IcmsrError(
            f"{name}: not the expected weights: {len(surplus)} tensors are unexpected, such as {surplus[0]}"
        )
