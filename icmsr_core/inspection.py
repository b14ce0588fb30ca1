"""What a generator file or a base folder holds, in words."""

from __future__ import annotations

import json
from pathlib import Path

from .base_folder import open_base
from .generator_file import Generator, load_generator


def describe(path: Path) -> str:
    """Lines ``name  value`` about the generator or base at `path`. Raises `IcmsrError` for anything else."""
    rows = _base_rows(path) if path.is_dir() else _generator_rows(path)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _base_rows(path: Path) -> list[tuple[str, str]]:
    base = open_base(path)
    descriptor = base.descriptor()
    counts = {"unet": base.unet_state(), "vae": base.vae_state()}
    return [
        ("kind", "base folder"),
        ("name", base.info.name),
        ("family", base.info.family),
        ("prior predicts", base.info.prediction),
        ("latent", f"{descriptor.latent_channels} channels, 1 cell per {descriptor.latent_factor} px"),
        ("sizes", f"multiples of {descriptor.multiple_of} px inside (pictures are padded to it)"),
        *((part, f"{sum(t.numel() for t in state.values()) / 1e6:.2f} M parameters") for part, state in counts.items()),
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
        ("timestep", str(info.timestep)),
        ("prediction", info.prediction),
    ]
    for part, weights in (("unet", generator.unet), ("vae", generator.vae)):
        whole = sum(tensor.numel() for tensor in weights.tensors.values())
        lora = sum(pair.down.numel() + pair.up.numel() for pair in weights.lora.values())
        rows.append((part, f"{len(weights.tensors)} whole tensors ({whole / 1e6:.2f} M), "
                           f"LoRA on {len(weights.lora)} modules ({lora / 1e6:.2f} M)"))
    if generator.unet.lora or generator.vae.lora:
        rows.append(("LoRA", f"rank {info.rank}, alpha {info.alpha:g}"))
    embedding = generator.prompt_embedding
    rows.append(("prompt", "none: bring a conditioning" if embedding is None else f"constant {list(embedding.shape)}"))
    rows.append(("licence", info.licence or "not stated"))
    if info.training:
        rows.append(("training", json.dumps(info.training, sort_keys=True)))
    return rows
