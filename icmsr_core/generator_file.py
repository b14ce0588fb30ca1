"""The generator file: one .safetensors that turns a base model into a one-step generator.

Keys, with the diffusers names of the base's modules and parameters:

    unet.<module>.lora_A.weight, unet.<module>.lora_B.weight     low-rank update of the UNet
    unet.<parameter>                                             tensor of the UNet replaced whole
    vae.<...>                                                    the same two forms for the VAE
    prompt_embedding                                             constant context [tokens, width]

The metadata entry ``icmsr`` is JSON (see `GeneratorInfo`); ``format`` is ``icmsr-generator``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import IcmsrError
from .noise_schedule import Prediction, check_prediction

FORMAT = "icmsr-generator"
ADAPTER_FORMAT = "icmsr-adapter"
"""What a T2I-Adapter's file says of itself in its metadata (`train/adapter_file.py`)."""
FORMAT_VERSION = 1
PARTS = ("unet", "vae")
Info = TypeVar("Info")


class LoraPair(NamedTuple):
    """``down`` (A) [rank, in, ...] and ``up`` (B) [out, rank, ...] of one module."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class PartWeights:
    """What a generator changes in one network: low-rank updates by module, whole tensors by parameter."""

    lora: Mapping[str, LoraPair] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lora or self.tensors)


@dataclass(frozen=True)
class GeneratorInfo:
    """What a generator file says of itself."""

    family: str
    """Family of the base it belongs to: ``nano``, ``sd21``, ``sd15``."""
    timestep: int
    """The one input timestep."""
    prediction: Prediction
    """What the UNet's output means: eps, v or residual."""
    base: str = ""
    """Name of the base model it was trained on."""
    base_hash: str = ""
    """SHA-256 of the base's UNet weights file; empty when unknown."""
    rank: int = 0
    """LoRA rank; 0 when the file holds whole tensors only."""
    alpha: float = 0.0
    """LoRA alpha: the update is ``alpha / rank * B @ A``."""
    licence: str = ""
    """Licence of the weights (SPDX)."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the run that made it."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""


@dataclass(frozen=True)
class Generator:
    """A generator file in memory."""

    info: GeneratorInfo
    unet: PartWeights
    vae: PartWeights
    prompt_embedding: Tensor | None = None
    """Constant context [tokens, width], or None when the caller must bring one."""


def write_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A .safetensors at `path`: written beside it, flushed, then renamed, so that no half file is ever seen there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, name, metadata=dict(metadata))
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_generator(path: Path, generator: Generator, dtype: torch.dtype = torch.float16) -> None:
    """Writes `generator` to `path` atomically, its tensors in `dtype` on the CPU.

    Raises `IcmsrError` when a value is not finite, or leaves the range of `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        weights: PartWeights = getattr(generator, part)
        for module, pair in weights.lora.items():
            tensors[f"{part}.{module}.lora_A.weight"] = pair.down
            tensors[f"{part}.{module}.lora_B.weight"] = pair.up
        for name, tensor in weights.tensors.items():
            tensors[f"{part}.{name}"] = tensor
    if generator.prompt_embedding is not None:
        tensors["prompt_embedding"] = generator.prompt_embedding
    tensors = {key: value.detach().to("cpu", dtype) for key, value in tensors.items()}
    _check_finite(str(path), tensors)
    write_atomically(path, tensors, {"format": FORMAT, "icmsr": json.dumps(asdict(generator.info), sort_keys=True)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file; an `IcmsrError` when there is none or it is damaged."""
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IcmsrError(
            f"{path}: not a readable .safetensors file ({error}): download or export it again"
        ) from error


def load_generator(path: Path) -> Generator:
    """The generator in `path`, checked: format, version, metadata, pairs of LoRA matrices, finite values.

    Whether its keys fit a base is checked where it is applied (`merged_tensors`). Raises `IcmsrError`.
    """
    tensors, metadata = read_tensors(path)
    info = parse_info(str(path), metadata)
    _check_finite(str(path), tensors)
    embedding = tensors.pop("prompt_embedding", None)
    if embedding is not None and embedding.ndim != 2:
        raise IcmsrError(f"{path}: prompt_embedding must be [tokens, width], got {tuple(embedding.shape)}")
    strange = sorted(key for key in tensors if not key.startswith(tuple(f"{part}." for part in PARTS)))
    if strange:
        raise IcmsrError(f"{path}: surplus tensors {_names(strange)}: keys begin with unet. or vae.")
    parts = {part: _split_part(str(path), part, tensors) for part in PARTS}
    if not any(parts.values()):
        raise IcmsrError(f"{path}: the file holds no weights")
    if any(weights.lora for weights in parts.values()) and info.rank < 1:
        raise IcmsrError(f"{path}: the file holds LoRA matrices but its rank is {info.rank}")
    return Generator(info, parts["unet"], parts["vae"], embedding)


def parse_info(name: str, metadata: Mapping[str, str]) -> GeneratorInfo:
    """`GeneratorInfo` from a file's safetensors metadata; `name` names the file in errors."""
    if metadata.get("format") != FORMAT:
        raise IcmsrError(
            f"{name}: not an ICM-SR generator file (its format is {metadata.get('format', 'not stated')!r}, "
            f"expected {FORMAT!r}); foreign weights go through `icmsr import`"
        )
    try:
        values = json.loads(metadata["icmsr"])
    except (KeyError, ValueError) as error:
        raise IcmsrError(f"{name}: its description cannot be read ({error}): export it again") from error
    version = values.get("format_version", FORMAT_VERSION) if isinstance(values, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:  # before the rest, which another version may lay out differently
        raise IcmsrError(f"{name}: format version {version}, this version of ICM-SR reads {FORMAT_VERSION}: update it")
    info = info_from_json(name, GeneratorInfo, values)
    check_prediction(info.prediction)
    return info


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "Prediction": (str,),
    "Mapping[str, Any]": (dict,),
}


def info_from_json(name: str, kind: type[Info], values: Any) -> Info:
    """The dataclass `kind` from a JSON object; keys that it does not know are left out.

    Raises `IcmsrError`, which says `name`, when a key is missing, of another type or not finite.
    """
    if not isinstance(values, dict):
        raise IcmsrError(f"{name}: its description must be a JSON object, got {type(values).__name__}")
    known = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name not in values:
            continue
        value = known[entry.name] = values[entry.name]
        fits = isinstance(value, _JSON_TYPES[str(entry.type)]) and not isinstance(value, bool)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise IcmsrError(f"{name}: {entry.name} in its description must be a {entry.type}, got {value!r}")
    try:
        return kind(**known)
    except TypeError as error:
        raise IcmsrError(f"{name}: its description cannot be read ({error}): export it again") from error


def merged_tensors(
    name: str, weights: PartWeights, state: Mapping[str, Tensor], alpha: float, strength: float = 1.0
) -> dict[str, Tensor]:
    """The parameters of a network that `weights` changes, merged in float32 (cast afterwards, never before).

    `state` maps diffusers parameter names to the base's tensors. LoRA: ``W + strength * alpha / rank * B A``; whole
    tensor: ``W + strength * (new - W)``. Raises `IcmsrError` naming every key that has no place or another shape.
    """
    merged: dict[str, Tensor] = {}
    wrong: list[str] = []
    for parameter, tensor in weights.tensors.items():
        base = state.get(parameter)
        if base is None or base.shape != tensor.shape:
            wrong.append(_misfit(parameter, tensor.shape, base))
            continue
        base = base.float()
        merged[parameter] = base + strength * (tensor.to(base) - base) if strength != 1.0 else tensor.to(base)
    for module, pair in weights.lora.items():
        parameter = f"{module}.weight"
        base = state.get(parameter)
        rank = pair.down.shape[0]
        shape = (pair.up.shape[0], *pair.down.shape[1:])
        if base is None or tuple(base.shape) != shape:
            wrong.append(_misfit(parameter, shape, base))
            continue
        start = merged.get(parameter, base.float())
        delta = pair.up.to(start).flatten(1) @ pair.down.to(start).flatten(1)
        merged[parameter] = start + strength * alpha / rank * delta.reshape(base.shape)
    if wrong:
        raise IcmsrError(f"{name}: the generator does not fit this base model: {_names(wrong)}")
    return merged


def _misfit(parameter: str, shape: Iterable[int], base: Tensor | None) -> str:
    return f"{parameter} {list(shape)} ({'no such parameter' if base is None else f'the base has {list(base.shape)}'})"


def _split_part(name: str, part: str, tensors: Mapping[str, Tensor]) -> PartWeights:
    lora: dict[str, LoraPair] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(part + "."):
            continue
        inner = key[len(part) + 1 :]
        if inner.endswith((".lora_A.weight", ".lora_B.weight")):
            module = inner[: -len(".lora_A.weight")]
            down = tensors.get(f"{part}.{module}.lora_A.weight")
            up = tensors.get(f"{part}.{module}.lora_B.weight")
            if down is None or up is None:
                missing = "lora_A" if down is None else "lora_B"
                raise IcmsrError(f"{name}: missing tensor {part}.{module}.{missing}.weight")
            fits = down.ndim in (2, 4) and up.ndim == down.ndim and down.shape[0] == up.shape[1] > 0
            if not fits or any(side != 1 for side in up.shape[2:]):
                raise IcmsrError(
                    f"{name}: {part}.{module}: LoRA matrices {list(down.shape)} and {list(up.shape)} do not multiply"
                )
            lora[module] = LoraPair(down, up)
        else:
            whole[inner] = tensor
    return PartWeights(lora, whole)


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise IcmsrError(f"{name}: NaN or infinite values in {_names(bad)}")


def _names(items: Iterable[str], most: int = 4) -> str:
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
