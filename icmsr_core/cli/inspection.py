"""Describes a generator file, an adapter or a base in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import IcmsrError
from ..weights.base import open_base
from ..weights.descriptions import own_description
from ..weights.diffusers_folder import WEIGHTS_FILE
from ..weights.generator_file import (
    ADAPTER_FORMAT,
    PARTS,
    Generator,
    PartWeights,
    load_generator,
)
from ..weights.single_file import PREFIXES
from ..weights.tensor_files import read_head, read_tensors


def file_report(path: Path) -> str:
    """Lines ``name  value`` about the generator, adapter or base at `path`. Raises `IcmsrError` for other files."""
    weights = path / WEIGHTS_FILE
    if path.is_dir() and weights.is_file():  # a base keeps its weights one folder further down
        rows = _adapter_rows(weights)
    elif path.is_dir():
        rows = _base_rows(path)
    elif not path.exists():
        raise IcmsrError(f"{path}: no such file or folder")
    else:
        keys, metadata = read_head(path)
        if metadata.get("format") == ADAPTER_FORMAT:
            rows = _adapter_rows(path)
        elif any(key.startswith(PREFIXES["unet"]) for key in keys):
            rows = _base_rows(path)
        else:
            rows = _generator_rows(path)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _adapter_rows(path: Path) -> list[tuple[str, str]]:
    tensors, metadata = read_tensors(path)
    if "adapter.conv_in.weight" not in tensors:
        raise IcmsrError(f"{path}: not a T2I-Adapter, a generator or a base")
    values = own_description(path, metadata)
    config, structure = values.get("config", {}), values.get("structure", {})
    details = ", ".join(f"{key} {value}" for key, value in structure.items() if key != "names")
    count = sum(tensor.numel() for tensor in tensors.values())
    rows = [
        ("kind", "T2I-Adapter (diffusers)"),
        ("family", values.get("family") or "not stated"),
        ("base", f"{values.get('base') or 'not stated'} {values.get('base_hash', '')}".rstrip()),
        ("condition", f"{' + '.join(structure.get('names', [])) or 'not stated'}{f' ({details})' if details else ''}"),
        ("channels", f"{config.get('in_channels', 'not stated')} in, {config.get('channels', 'not stated')} by level"),
        ("parameters", f"{count / 1e6:.2f} M"),
        ("licence", values.get("licence") or "not stated"),
    ]
    if values.get("training"):
        rows.append(("training", json.dumps(values["training"], sort_keys=True)))
    return rows


def _base_rows(path: Path) -> list[tuple[str, str]]:
    base = open_base(path)
    descriptor = base.descriptor()
    return [
        ("kind", "base folder" if path.is_dir() else "base, a checkpoint in one file"),
        ("name", base.info.name),
        ("family", base.info.family),
        ("prior predicts", base.info.prediction),
        ("latent", f"{descriptor.latent_channels} channels, 1 cell per {descriptor.latent_factor} px"),
        ("sizes", f"multiples of {descriptor.multiple_of} px (pictures are padded to them)"),
        *((part, f"{base.parameter_count(part) / 1e6:.2f} M parameters") for part in ("unet", "vae")),
        ("licence", base.info.licence or "not stated"),
        ("hash", base.hash()),
    ]


def _generator_rows(path: Path) -> list[tuple[str, str]]:
    generator: Generator = load_generator(path)
    info = generator.info
    rows = [
        ("kind", f"generator file, format version {info.format_version}"),
        ("family", info.family),
        ("base", f"{info.base or 'not stated'} {info.base_hash}".rstrip()),
        ("timestep", str(info.timestep) + (f", coeff_t {info.coeff_t}" if info.coeff_t is not None else "")),
        ("prediction", info.prediction),
    ]
    faithful = {part: generator.sets(part)[0] for part in PARTS}
    if generator.has_two_sets:
        default = f"default {info.realistic_default:g}"
        rows.append(
            ("fidelity", f"a faithful set of weights (0) and a realistic one on top of it (1; up to 2); {default}")
        )
        rows += _set_rows("faithful ", faithful, info.rank, info.alpha)
        rows += _set_rows("realistic ", generator.realistic, info.realistic_rank, info.realistic_alpha)
    else:
        rows += _set_rows("", faithful, info.rank, info.alpha)
    embedding = generator.prompt_embedding
    none = "none: give one, as conditioning in ComfyUI or with --prompt on the command line"
    rows.append(("prompt", none if embedding is None else f"constant {list(embedding.shape)}"))
    rows.append(("licence", info.licence or "not stated"))
    if info.recommended:
        rows.append(("recommended", ", ".join(f"{key} {value}" for key, value in sorted(info.recommended.items()))))
    if info.training:
        rows.append(("training", json.dumps(info.training, sort_keys=True)))
    if info.realistic_training:
        rows.append(("realistic training", json.dumps(info.realistic_training, sort_keys=True)))
    if info.notes:
        rows.append(("notes", info.notes))
    return rows


def _set_rows(kind: str, parts: Mapping[str, PartWeights], rank: int, alpha: float) -> list[tuple[str, str]]:
    rows = []
    for part, weights in parts.items():
        replaced = sum(tensor.numel() for tensor in weights.tensors.values())
        lora = sum(pair.down.numel() + pair.up.numel() for pair in weights.lora.values())
        rows.append(
            (
                f"{kind}{part}",
                f"{len(weights.tensors)} replaced tensors ({replaced / 1e6:.2f} M), "
                f"LoRA on {len(weights.lora)} modules ({lora / 1e6:.2f} M)",
            )
        )
    if any(weights.lora for weights in parts.values()):
        rows.append((f"{kind}LoRA", f"rank {rank}, alpha {alpha:g}"))
    return rows
