"""The generator file: one .safetensors that turns a base model into a one-step generator.

Keys, with the diffusers names of the base's modules and parameters:

    unet.<module>.lora_A.weight, unet.<module>.lora_B.weight     low-rank update of the UNet
    unet.<parameter>                                             tensor that replaces the UNet's own
    vae.<...>                                                    the same two forms for the VAE
    realistic.unet.<...>, realistic.vae.<...>                    a second set over the first, in the same two forms
    prompt_embedding                                             constant context [tokens, width]

The first set is the faithful one; most files hold nothing else. The second is added to it for a more realistic result;
the fidelity says how much of it (`merging.py`).

The metadata entry ``icmsr`` is JSON (see `GeneratorInfo`); ``format`` is ``icmsr-generator``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbone.prediction import Prediction, check_prediction
from ..backbone.recommended import recommended_from
from ..errors import IcmsrError
from .descriptions import OWN_ENTRY, info_from, own_description
from .fidelity import check_fidelity_applies
from .file_kinds import known_kind
from .tensor_files import check_finite, first_names, read_head, read_tensors, write_tensors

GENERATOR_FORMAT = "icmsr-generator"
ADAPTER_FORMAT = "icmsr-adapter"
"""``format`` in the metadata of a T2I-Adapter's file (`train/networks/adapters.py`)."""
FORMAT_VERSIONS = (1, 2, 3)
"""Layouts that can be read. A file with one set of weights is written as 1, with two as 2, with a `coeff_t` as 3, which
older versions of ICM-SR would ignore."""
PARTS = ("unet", "vae")
MAY_BE_LEFT_OUT = ("notes", "coeff_t", "recommended")
"""Fields of the description that a file has only if there is something to say."""
REALISTIC = "realistic."
"""Prefix of the keys of the second set."""


class LoraPair(NamedTuple):
    """``down`` (A) [rank, in, ...] and ``up`` (B) [out, rank, ...] of one module."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class PartWeights:
    """What a generator changes in one network: low-rank updates by module, replaced tensors by parameter."""

    lora: Mapping[str, LoraPair] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lora or self.tensors)

    def parameters(self) -> set[str]:
        """Names of the parameters that it changes."""
        return {*self.tensors, *(f"{module}.weight" for module in self.lora)}


@dataclass(frozen=True)
class GeneratorInfo:
    """The description in a generator file."""

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
    """LoRA rank; 0 when the file holds no LoRA."""
    alpha: float = 0.0
    """LoRA alpha: the update is ``alpha / rank * B @ A``."""
    licence: str = ""
    """Licence of the weights (SPDX)."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the run that made it."""
    realistic_rank: int = 0
    """LoRA rank of the second set; 0 when there is none or it holds no LoRA."""
    realistic_alpha: float = 0.0
    """LoRA alpha of the second set."""
    realistic_training: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the run that made the second set."""
    realistic_default: float = 1.0
    """Fidelity for users who choose none, from 0 (the faithful set alone) to 2."""
    notes: str = ""
    """Other facts that a user must know, as a text for people."""
    coeff_t: int | None = None
    """The timestep of the closed form, if it differs from the UNet's `timestep` (HYPIR has such a one)."""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its authors, the fields of `Recommended`; empty: none."""
    format_version: int = 1
    """Version of the layout in the file it was read from; `save_generator` writes the version that the weights need."""


@dataclass(frozen=True)
class Generator:
    """A generator file in memory. Raises `IcmsrError` when `realistic` has parts other than unet and vae."""

    info: GeneratorInfo
    unet: PartWeights
    vae: PartWeights
    prompt_embedding: Tensor | None = None
    """Constant context [tokens, width]; None when the user has to give one."""
    realistic: Mapping[str, PartWeights] = field(default_factory=dict)
    """The second set by part (``unet``, ``vae``), added to the first; empty when there is one set."""
    name: str = "generator"
    """Its name in messages: the file it was read from."""
    chosen_fidelity: float | None = None
    """The fidelity that a user chose (`at_fidelity`); None: the file's default."""

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
        """How much of the realistic set is merged, 0 to 2: the chosen fidelity, or the file's default."""
        return self.info.realistic_default if self.chosen_fidelity is None else self.chosen_fidelity

    def at_fidelity(self, fidelity: float | None) -> Generator:
        """This generator, to be merged at `fidelity`; None is the file's default.

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
    check_finite(path, tensors)
    two = generator.has_two_sets
    description = asdict(replace(generator.info, format_version=_version(generator)))
    if not two:
        description = {key: value for key, value in description.items() if not key.startswith("realistic_")}
    elif generator.info.realistic_default == 1.0:
        del description["realistic_default"]
    description = {
        key: value for key, value in description.items() if key not in MAY_BE_LEFT_OUT or value not in (None, "", {})
    }
    write_tensors(path, tensors, {"format": GENERATOR_FORMAT, OWN_ENTRY: json.dumps(description, sort_keys=True)})


def _version(generator: Generator) -> int:
    if generator.info.coeff_t is not None:
        return 3
    return 2 if generator.has_two_sets else 1


def _two_sets(info: GeneratorInfo, keys: Collection[str]) -> bool:
    return info.format_version == 2 or (info.format_version == 3 and any(key.startswith(REALISTIC) for key in keys))


def load_generator(path: Path, name: str = "") -> Generator:
    """The generator in the file at `path`. `name` is its name in later messages; empty: the path.

    Raises `IcmsrError` for another format or version, a wrong description, LoRA matrices that do not pair, and values
    that are not finite. Whether its keys fit a base is checked when it is merged (`merging.check_fit`).
    """
    tensors, metadata = read_tensors(path)
    info = parse_info(path, metadata, tensors)
    check_finite(path, tensors)
    embedding = tensors.pop("prompt_embedding", None)
    if embedding is not None and embedding.ndim != 2:
        raise IcmsrError(f"{path}: prompt_embedding must be [tokens, width], got {tuple(embedding.shape)}")
    two = _two_sets(info, tensors)
    prefixes = [f"{part}." for part in PARTS] + ([f"{REALISTIC}{part}." for part in PARTS] if two else [])
    strange = sorted(key for key in tensors if not key.startswith(tuple(prefixes)))
    if strange:
        allowed = f"{', '.join(prefixes[:-1])} or {prefixes[-1]}"
        raise IcmsrError(f"{path}: unexpected tensors {first_names(strange)}: keys must begin with {allowed}")
    faithful = _read_set(f"{path}: the {'faithful set' if two else 'file'}", "", tensors, info.rank)
    realistic = _read_set(f"{path}: the realistic set", REALISTIC, tensors, info.realistic_rank) if two else {}
    return Generator(info, faithful["unet"], faithful["vae"], embedding, realistic, name or str(path))


def holds_two_sets(path: Path) -> bool:
    """Whether the generator file at `path` holds a faithful and a realistic set. Reads its description only.

    Raises `IcmsrError` for a missing file or another kind of file.
    """
    keys, metadata = read_head(path)
    return _two_sets(parse_info(path, metadata, keys), keys)


def parse_info(path: Path, metadata: Mapping[str, str], keys: Collection[str]) -> GeneratorInfo:
    """The description in the `metadata` of the file at `path`; its `keys` help to say what another kind of file is."""
    if metadata.get("format") != GENERATOR_FORMAT:
        kind = known_kind(keys)
        stated = metadata.get("format", "not stated")
        found = f"{kind and kind + '; '}its format is {stated!r}, expected {GENERATOR_FORMAT!r}"
        way_out = {
            "a LoRA": "a one-step model's LoRA becomes one with `icmsr import lora`",
            "a checkpoint": "it can be the base, name it there",
            "a T2I-Adapter": "it goes into ICM-SR Load Adapter",
        }.get(kind, "foreign weights go through `icmsr import`")
        raise IcmsrError(f"{path}: not an ICM-SR generator file ({found}): {way_out}")
    values = own_description(path, metadata)
    version = values.get("format_version", 1)
    if version not in FORMAT_VERSIONS:  # checked first: another version may have other fields
        known = ", ".join(str(entry) for entry in FORMAT_VERSIONS)
        raise IcmsrError(f"{path}: format version {version}, this version of ICM-SR reads {known}: update ICM-SR")
    info = info_from(path, GeneratorInfo, values)
    check_prediction(info.prediction)
    check_coeff_t(info.coeff_t, info.prediction, f"{path}: ")
    recommended_from(path, info.recommended)
    if not 0 <= info.realistic_default <= 2:
        raise IcmsrError(
            f"{path}: realistic_default in its description must be from 0 to 2, got {info.realistic_default:g}"
        )
    return info


def check_coeff_t(coeff_t: int | None, prediction: str, where: str = "") -> None:
    """Raises `IcmsrError` for a timestep of the closed form that does nothing; `where` begins the message.

    Whether the schedule has it is checked with the base.
    """
    if coeff_t is not None and prediction == "residual":
        raise IcmsrError(
            f"{where}coeff_t has no effect on a generator that predicts the residual, got {coeff_t}: leave it out"
        )


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
