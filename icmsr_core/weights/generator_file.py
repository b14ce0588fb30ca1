"""The generator file: one .safetensors that turns a base model into a one-step generator.

Keys, with the diffusers names of the base's modules and parameters:

    unet.<module>.lora_A.weight, unet.<module>.lora_B.weight     low-rank update of the UNet
    unet.<parameter>                                             tensor of the UNet replaced whole
    vae.<...>                                                    the same two forms for the VAE
    realistic.unet.<...>, realistic.vae.<...>                    a second set over the first, in the same two forms
    prompt_embedding                                             constant context [tokens, width]

The first set is the faithful one, and all there is in most files. The second leads from its result to a more realistic
one; how much of it is laid on is the fidelity (`merging.py`).

The metadata entry ``icmsr`` is JSON (see `GeneratorInfo`); ``format`` is ``icmsr-generator``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..backbone.prediction import Prediction, check_prediction
from ..errors import IcmsrError
from ..whole_file import replacing
from .fidelity import check_fidelity_applies
from .file_kinds import known_kind, unreadable

GENERATOR_FORMAT = "icmsr-generator"
ADAPTER_FORMAT = "icmsr-adapter"
"""What a T2I-Adapter's file says of itself in its metadata (`train/adapter_file.py`)."""
FORMAT_VERSIONS = (1, 2)
"""Layouts that are read. Files with one set of weights are written as 1, files with two as 2."""
PARTS = ("unet", "vae")
REALISTIC = "realistic."
"""What the keys of the second set begin with."""
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

    def parameters(self) -> set[str]:
        """Names of the parameters that it changes."""
        return {*self.tensors, *(f"{module}.weight" for module in self.lora)}


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
    realistic_rank: int = 0
    """LoRA rank of the second set; 0 without one, or when it holds whole tensors only."""
    realistic_alpha: float = 0.0
    """LoRA alpha of the second set."""
    realistic_training: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the run that made the second set."""
    realistic_default: float = 1.0
    """Fidelity to use where none is asked for, from 0 (the faithful set alone) to 2."""
    notes: str = ""
    """What a user must know beyond the rest, for people."""
    format_version: int = 1
    """Version of the layout it was read in; `save_generator` writes the one that the weights need."""


@dataclass(frozen=True)
class Generator:
    """A generator file in memory. Raises `IcmsrError` when `realistic` names another part than unet and vae."""

    info: GeneratorInfo
    unet: PartWeights
    vae: PartWeights
    prompt_embedding: Tensor | None = None
    """Constant context [tokens, width], or None when the caller must bring one."""
    realistic: Mapping[str, PartWeights] = field(default_factory=dict)
    """The second set by part (``unet``, ``vae``), laid over the first; empty when there is one set."""
    name: str = "generator"
    """What it is called in messages: the file it was read from."""
    chosen_fidelity: float | None = None
    """Fidelity that was asked for (`at_fidelity`); None: what the file says."""

    def __post_init__(self) -> None:
        surplus = sorted(set(self.realistic) - set(PARTS))
        if surplus:
            raise IcmsrError(f"the realistic set has the parts {' and '.join(PARTS)}, got {', '.join(surplus)}")

    @property
    def has_two_sets(self) -> bool:
        """Whether there is a realistic set, so that a fidelity can be chosen."""
        return any(self.realistic.values())

    @property
    def fidelity(self) -> float:
        """How much of the realistic set is merged: as chosen, or what the file says."""
        return self.info.realistic_default if self.chosen_fidelity is None else self.chosen_fidelity

    def at_fidelity(self, fidelity: float | None) -> Generator:
        """This generator, to be merged at `fidelity`; None: at what the file says.

        Raises `IcmsrError` for a value beyond 0..2, or for any value where there is one set.
        """
        check_fidelity_applies(self.name, self.has_two_sets, fidelity)
        return replace(self, chosen_fidelity=fidelity)

    def faithful(self) -> Generator:
        """This generator without its realistic set."""
        return replace(self, realistic={}, chosen_fidelity=None)

    def sets(self, part: str) -> tuple[PartWeights, PartWeights]:
        """The faithful and the realistic weights of `part`; the latter empty when there is one set."""
        return getattr(self, part), self.realistic.get(part, PartWeights())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A .safetensors at `path`, which appears whole or not at all. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata=dict(metadata))


def save_generator(path: Path, generator: Generator, dtype: torch.dtype = torch.float16) -> None:
    """Writes `generator` to `path` atomically, its tensors in `dtype` on the CPU: format version 1, or 2 with two sets.

    Raises `IcmsrError` when a value is not finite, or leaves the range of `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        for prefix, weights in zip((f"{part}.", f"{REALISTIC}{part}."), generator.sets(part)):
            for module, pair in weights.lora.items():
                tensors[f"{prefix}{module}.lora_A.weight"] = pair.down
                tensors[f"{prefix}{module}.lora_B.weight"] = pair.up
            for name, tensor in weights.tensors.items():
                tensors[f"{prefix}{name}"] = tensor
    if generator.prompt_embedding is not None:
        tensors["prompt_embedding"] = generator.prompt_embedding
    tensors = {key: value.detach().to("cpu", dtype) for key, value in tensors.items()}
    _check_finite(str(path), tensors)
    two = generator.has_two_sets
    description = asdict(replace(generator.info, format_version=2 if two else 1))
    if not two:
        description = {key: value for key, value in description.items() if not key.startswith("realistic_")}
    elif generator.info.realistic_default == 1.0:
        del description["realistic_default"]
    if not generator.info.notes:
        del description["notes"]
    write_tensors(path, tensors, {"format": GENERATOR_FORMAT, "icmsr": json.dumps(description, sort_keys=True)})


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A .safetensors file, opened by `safe_open`; an `IcmsrError` when there is none or it is damaged."""
    if path.is_dir():
        raise IcmsrError(f"{path}: is a folder: name the .safetensors file")
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise IcmsrError(unreadable(path, str(error))) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file; an `IcmsrError` when there is none or it is damaged."""
    with open_tensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def load_generator(path: Path, name: str = "") -> Generator:
    """The generator in `path`, checked: format, version, metadata, pairs of LoRA matrices, finite values.

    Whether its keys fit a base is checked where it is applied (`merging.py`). `name` is what it is called from then on,
    `path` where that is empty. Raises `IcmsrError`.
    """
    tensors, metadata = read_tensors(path)
    info = parse_info(str(path), metadata, tensors)
    _check_finite(str(path), tensors)
    embedding = tensors.pop("prompt_embedding", None)
    if embedding is not None and embedding.ndim != 2:
        raise IcmsrError(f"{path}: prompt_embedding must be [tokens, width], got {tuple(embedding.shape)}")
    two = info.format_version == 2
    prefixes = [f"{part}." for part in PARTS] + ([f"{REALISTIC}{part}." for part in PARTS] if two else [])
    strange = sorted(key for key in tensors if not key.startswith(tuple(prefixes)))
    if strange:
        allowed = f"{', '.join(prefixes[:-1])} or {prefixes[-1]}"
        raise IcmsrError(f"{path}: unexpected tensors {first_names(strange)}: keys must begin with {allowed}")
    faithful = _read_set(f"{path}: the {'faithful set' if two else 'file'}", "", tensors, info.rank)
    realistic = _read_set(f"{path}: the realistic set", REALISTIC, tensors, info.realistic_rank) if two else {}
    return Generator(info, faithful["unet"], faithful["vae"], embedding, realistic, name or str(path))


def holds_two_sets(path: Path) -> bool:
    """Whether the generator file at `path` holds a faithful and a realistic set, by its description alone.

    Raises `IcmsrError` when there is no such file, or it is no generator file.
    """
    with open_tensors(path) as file:
        return parse_info(str(path), dict(file.metadata() or {}), list(file.keys())).format_version == 2


def parse_info(name: str, metadata: Mapping[str, str], keys: Collection[str] = ()) -> GeneratorInfo:
    """`GeneratorInfo` from a file's safetensors metadata; `name` names the file in errors, and `keys` tell its kind."""
    if metadata.get("format") != GENERATOR_FORMAT:
        kind = known_kind(keys)
        stated = metadata.get("format", "not stated")
        found = f"{kind and kind + '; '}its format is {stated!r}, expected {GENERATOR_FORMAT!r}"
        way_out = {
            "a LoRA": "a one-step model's LoRA becomes one with `icmsr import lora`",
            "a checkpoint": "it can be the base, name it there",
            "a T2I-Adapter": "it goes into ICM-SR Load Adapter",
        }.get(kind, "foreign weights go through `icmsr import`")
        raise IcmsrError(f"{name}: not an ICM-SR generator file ({found}): {way_out}")
    try:
        values = json.loads(metadata["icmsr"])
    except (KeyError, ValueError) as error:
        raise IcmsrError(f"{name}: its description cannot be read ({error}): export it again") from error
    version = values.get("format_version", 1) if isinstance(values, dict) else 1
    if version not in FORMAT_VERSIONS:  # before the rest, which another version may lay out differently
        known = " and ".join(str(entry) for entry in FORMAT_VERSIONS)
        raise IcmsrError(f"{name}: format version {version}, this version of ICM-SR reads {known}: update ICM-SR")
    info = info_from_json(name, GeneratorInfo, values)
    check_prediction(info.prediction)
    if not 0 <= info.realistic_default <= 2:
        raise IcmsrError(
            f"{name}: realistic_default in its description must be from 0 to 2, got {info.realistic_default:g}"
        )
    return info


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "Prediction": (str,),
    "Mapping[str, Any]": (dict,),
}


def info_from_json(name: str, kind: type[Info], values: Any) -> Info:
    """The dataclass `kind` from a JSON object; keys that it does not know are ignored.

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


def _read_set(name: str, prefix: str, tensors: Mapping[str, Tensor], rank: int) -> dict[str, PartWeights]:
    parts = {part: _split_part(name, f"{prefix}{part}.", tensors) for part in PARTS}
    if not any(parts.values()):
        raise IcmsrError(f"{name} holds no weights ({prefix}unet. or {prefix}vae.): export it again")
    if rank < 1 and any(weights.lora for weights in parts.values()):
        raise IcmsrError(f"{name} holds LoRA matrices, but its description gives the rank {rank}: export it again")
    return parts


def _split_part(name: str, prefix: str, tensors: Mapping[str, Tensor]) -> PartWeights:
    lora: dict[str, LoraPair] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            continue
        inner = key[len(prefix) :]
        if inner.endswith((".lora_A.weight", ".lora_B.weight")):
            module = inner[: -len(".lora_A.weight")]
            down = tensors.get(f"{prefix}{module}.lora_A.weight")
            up = tensors.get(f"{prefix}{module}.lora_B.weight")
            if down is None or up is None:
                missing = "lora_A" if down is None else "lora_B"
                raise IcmsrError(f"{name}: missing tensor {prefix}{module}.{missing}.weight")
            fits = down.ndim in (2, 4) and up.ndim == down.ndim and down.shape[0] == up.shape[1] > 0
            if not fits or any(side != 1 for side in up.shape[2:]):
                raise IcmsrError(
                    f"{name}: {prefix}{module}: LoRA matrices {list(down.shape)} and {list(up.shape)} do not multiply"
                )
            lora[module] = LoraPair(down, up)
        else:
            whole[inner] = tensor
    return PartWeights(lora, whole)


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise IcmsrError(f"{name}: NaN or infinite values in {first_names(bad)}")


def first_names(items: Iterable[str], most: int = 4) -> str:
    """The first few of `items` and how many more there are, for an error."""
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
