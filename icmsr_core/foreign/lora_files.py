"""Reads LoRA files in the forms of PEFT, diffusers and kohya."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import IcmsrError
from ..weights.descriptions import parse_description, read_description, shortened
from ..weights.generator_file import LoraPair
from ..weights.tensor_files import check_finite, first_names
from .containers import Container, read_container
from .layouts import lora_keys

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
FOLDER_FILES = (PEFT_FILE, DIFFUSERS_FILE, "adapter_model.bin", "pytorch_lora_weights.bin")
"""The weights file of a LoRA's folder, the first of these that is there."""
DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""Entry of the metadata with PEFT's configuration, in files of diffusers 0.34 and later."""


class LoraFile(NamedTuple):
    """The LoRA of one network: the update of each module is ``alpha / rank_of_the_pair * B @ A``."""

    pairs: dict[str, LoraPair]
    rank: int
    """The most common rank."""
    alpha: float


def read_lora(source: Path, modules: Collection[str]) -> LoraFile:
    """`lora_of` the file `source`, or the folder of one. Raises `IcmsrError` as that and `read_container`."""
    return lora_of(read_container(lora_file(source)), modules)


def lora_of(file: Container, modules: Collection[str]) -> LoraFile:
    """The LoRA in `file` for a network with these diffusers `modules`.

    Each module's scale comes from its own ``.alpha``, else from the PEFT configuration in the file or next to it, else
    it is 1. Where alphas differ, the matrices are rescaled to the most common one, in float32. Raises `IcmsrError` for
    a key that belongs to no module, a matrix without its partner, values that are not finite, and a PEFT LoRA without
    its configuration or of another form than B A.
    """
    path, tensors = file.path, file.tensors()
    check_finite(path, tensors)
    odd = [key for key, value in tensors.items() if not value.is_floating_point() and not key.endswith(".alpha")]
    if odd:
        raise IcmsrError(
            f"{path}: whole numbers ({tensors[odd[0]].dtype}) in {first_names(odd)}: a quantised LoRA cannot be read, "
            "get it in float16 or float8"
        )
    # Exact: float16 holds every value of both kinds of float8, in which torch cannot compute.
    tensors = {key: value.half() if value.element_size() == 1 else value for key, value in tensors.items()}
    found = _keys_by_module(path, tensors, modules)
    peft = any("base_model.model." in key for roles in found.values() for key in roles.values())
    config = _config(path, file.metadata, peft)
    pairs = {module: _pair(path, module, roles, tensors) for module, roles in found.items()}
    alphas = {
        module: _alpha(path, module, pairs[module], tensors.get(roles.get("alpha", "")), config)
        for module, roles in found.items()
    }
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    pairs = {module: with_alpha(pair, alphas[module], alpha) for module, pair in pairs.items()}
    rank = Counter(pair.down.shape[0] for pair in pairs.values()).most_common(1)[0][0]
    return LoraFile(pairs, rank, alpha)


def with_alpha(pair: LoraPair, own: float, alpha: float) -> LoraPair:
    """`pair`, whose alpha is `own`, rescaled in float32 to have the same effect with `alpha`."""
    return pair if own == alpha else LoraPair(pair.down, pair.up.float() * (own / alpha))


def _keys_by_module(path: Path, tensors: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, dict[str, str]]:
    """The keys of each module's ``down``, ``up`` and ``alpha``."""
    keys, lost = lora_keys(tensors, modules)
    if lost:
        text = any("text_encoder" in key or key.startswith("lora_te") for key in lost)
        hint = "a generator holds no text encoder" if text else "only a plain LoRA of this family's UNet can be read"
        raise IcmsrError(f"{path}: the UNet has no layer for {first_names(lost)}: {hint}")
    if not keys:
        raise IcmsrError(f"{path}: holds no tensors")
    found: dict[str, dict[str, str]] = {}
    for key, (module, role) in keys.items():
        if role in found.setdefault(module, {}):
            raise IcmsrError(f"{path}: {key} and {found[module][role]} are both the {role} matrix of {module}")
        found[module][role] = key
    return found


def _pair(path: Path, module: str, roles: Mapping[str, str], tensors: Mapping[str, Tensor]) -> LoraPair:
    """The two matrices of `module`, whose keys are `roles`."""
    missing = [role for role in ("down", "up") if role not in roles]
    if missing:
        raise IcmsrError(f"{path}: {module} has no {missing[0]} matrix, only {next(iter(roles.values()))}")
    pair = LoraPair(tensors[roles["down"]], tensors[roles["up"]])
    if pair.down.ndim not in (2, 4) or pair.up.ndim < 2 or not pair.down.shape[0] == pair.up.shape[1] > 0:
        raise IcmsrError(
            f"{path}: {roles['down']} {list(pair.down.shape)} and {roles['up']} {list(pair.up.shape)} "
            "are not a LoRA pair: expected [rank, in, ...] and [out, rank, ...]"
        )
    return pair


def lora_file(source: Path) -> Path:
    """The weights file of `source`: itself, or the one in a LoRA's folder. Raises `IcmsrError` if there is none."""
    if not source.is_dir():
        return source
    for name in FOLDER_FILES:
        if (source / name).is_file():
            return source / name
    raise IcmsrError(f"{source}: has neither {PEFT_FILE} nor {DIFFUSERS_FILE}: give the weights file itself")


def _config(path: Path, metadata: Mapping[str, str], peft: bool) -> Mapping[str, Any]:
    """PEFT's configuration of the UNet's LoRA; empty when the file does not need one."""
    if peft:
        file, where = path.parent / PEFT_CONFIG, f"{path.parent / PEFT_CONFIG}"
        if not file.is_file():
            raise IcmsrError(f"{file}: missing, and {path.name} needs it for its alpha: put both into one folder")
        config = read_description(file)
    else:
        where = f"{path}: {DIFFUSERS_CONFIG}"
        config = parse_description(path, metadata.get(DIFFUSERS_CONFIG, "{}"), DIFFUSERS_CONFIG)
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    for key, plain in (("peft_type", "LORA"), ("use_dora", False), ("lora_bias", False), ("bias", "none")):
        if config.get(key) not in (None, plain):
            raise IcmsrError(
                f"{where}: {key} must be {plain!r}, got {config[key]!r}: this kind of LoRA is not supported"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise IcmsrError(f"{where}: {key} must be a JSON object, got {shortened(config[key])}: download it again")
    if config and not (_positive(config.get("r")) and _positive(config.get("lora_alpha"))):
        raise IcmsrError(
            f"{where}: r and lora_alpha must be positive numbers, got {config.get('r')!r} and "
            f"{config.get('lora_alpha')!r}"
        )
    return config


def _alpha(path: Path, module: str, pair: LoraPair, own: Tensor | None, config: Mapping[str, Any]) -> float:
    """The alpha of `module`; its scale is alpha over the rank of `pair`."""
    rank = pair.down.shape[0]
    if own is not None:
        if own.numel() != 1 or not _positive(float(own)):
            raise IcmsrError(f"{path}: the alpha of {module} must be one positive number, got {own.tolist()}")
        return float(own)
    if not config:
        return float(rank)
    stated = _pattern_value(config.get("rank_pattern"), module, config["r"])
    if stated != rank:
        raise IcmsrError(f"{path}: the rank of {module} is {rank}, its configuration says {stated}")
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not _positive(alpha):
        raise IcmsrError(f"{path}: the alpha of {module} must be a positive number, got {alpha!r}")
    # rsLoRA (arXiv 2312.03732) divides by the root of the rank.
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _pattern_value(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole name or its end after a dot (PEFT's rule)."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise IcmsrError(
                f"{pattern!r} in the LoRA's configuration is not a regular expression ({error}): download it again"
            ) from error
    return default


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
