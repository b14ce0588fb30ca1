"""Exports the UNet LoRA of a generator file: as diffusers' folder, or as a file for the loader of ComfyUI's core.

These formats cannot state the one timestep of the UNet or what its output means, and cannot hold a VAE's LoRA, replaced
tensors or a prompt embedding: `Exported.dropped` lists what is lost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IcmsrError
from ..foreign.layouts import kohya_name
from ..foreign.lora_files import DIFFUSERS_CONFIG, DIFFUSERS_FILE
from ..weights.generator_file import Generator, LoraPair, PartWeights, load_generator
from ..weights.tensor_files import first_names, write_tensors
from .formats import EXPORT_FORMATS
from .importers import check_result_file


@dataclass(frozen=True)
class Exported:
    """The file that was written."""

    path: Path
    """The .safetensors."""
    modules: int
    """Number of modules with a LoRA."""
    dropped: tuple[str, ...]
    """The parts of the generator that the format cannot hold, one phrase each."""


def export_generator(form: str, source: Path, dest: Path, fidelity: float | None = None) -> Exported:
    """Writes the UNet's LoRA of the generator file `source` in the format `form`, in its precision.

    ``diffusers``: ``pytorch_lora_weights.safetensors`` in the folder `dest`, with the alpha in the metadata (read by
    diffusers 0.34 and later). ``comfyui``: the file `dest` with kohya's names and alphas, all of which core's key map
    has. Two sets become one LoRA, with the realistic set at `fidelity` (see `Generator.at_fidelity`): the matrices of
    both are concatenated, in float32. The file appears complete or not at all.

    Raises `IcmsrError` for an unknown format, a damaged file, a fidelity that does not apply, and a generator without
    any LoRA of the UNet.
    """
    if form not in EXPORT_FORMATS:
        raise IcmsrError(f"format must be one of {', '.join(EXPORT_FORMATS)}, got {form!r}")
    if form == "comfyui":
        check_result_file(source, dest)
    elif dest.is_file():
        raise IcmsrError(f"{dest}: is a file, but diffusers stores a LoRA as a folder: give a folder")
    generator = load_generator(source).at_fidelity(fidelity)
    lora, alphas = _one_lora(generator)
    if not lora:
        raise IcmsrError(
            f"{source}: has no LoRA for the UNet, the only part that a LoRA file can hold: choose a generator with "
            "LoRA weights"
        )
    if form == "diffusers":
        path = dest / DIFFUSERS_FILE
        tensors, metadata = _diffusers_tensors(lora), {DIFFUSERS_CONFIG: _diffusers_config(lora, alphas)}
    else:
        path, tensors, metadata = dest, _kohya_tensors(lora, alphas), {}
    write_tensors(path, tensors, {"format": "pt", **metadata})
    return Exported(path, len(lora), _dropped(generator))


def _one_lora(generator: Generator) -> tuple[dict[str, LoraPair], dict[str, float]]:
    """The UNet's LoRA by module, with both sets combined, and the alpha of each module."""
    info, fidelity = generator.info, generator.fidelity
    faithful, realistic = generator.sets("unet")
    if fidelity == 0 or not realistic.lora:
        return dict(faithful.lora), dict.fromkeys(faithful.lora, info.alpha)
    pairs: dict[str, LoraPair] = {}
    for module in dict.fromkeys([*faithful.lora, *realistic.lora]):
        scaled = [
            LoraPair(pair.down.float(), pair.up.float() * (scale / pair.down.shape[0]))
            for pair, scale in (
                (faithful.lora.get(module), info.alpha),
                (realistic.lora.get(module), fidelity * info.realistic_alpha),
            )
            if pair is not None
        ]
        pairs[module] = LoraPair(torch.cat([pair.down for pair in scaled]), torch.cat([pair.up for pair in scaled], 1))
    return pairs, {module: float(pair.down.shape[0]) for module, pair in pairs.items()}


def _diffusers_tensors(lora: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    halves = (
        (f"unet.{module}.lora_{half}.weight", tensor)
        for module, pair in lora.items()
        for half, tensor in zip("AB", pair)
    )
    return dict(halves)


def _diffusers_config(lora: Mapping[str, LoraPair], alphas: Mapping[str, float]) -> str:
    """PEFT's configuration in diffusers' form: the most common rank and alpha, and patterns for the others."""
    ranks: dict[str, Any] = {module: pair.down.shape[0] for module, pair in lora.items()}
    whole = {module: int(alpha) if alpha == int(alpha) else alpha for module, alpha in alphas.items()}
    config: dict[str, Any] = {"target_modules": sorted(lora)}
    for name, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", whole)):
        config[name] = Counter(values.values()).most_common(1)[0][0]
        config[pattern] = {module: value for module, value in values.items() if value != config[name]}
    return json.dumps({f"unet.{key}": value for key, value in config.items()}, sort_keys=True)


def _kohya_tensors(lora: Mapping[str, LoraPair], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, pair in lora.items():
        name = kohya_name(module)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = pair
        tensors[f"{name}.alpha"] = torch.tensor(alphas[module])
    return tensors


def _dropped(generator: Generator) -> tuple[str, ...]:
    info = generator.info
    lost = [f"the timestep {info.timestep} and the {info.prediction} prediction, which the user must set"]
    if info.prediction == "residual":  # samplers know eps and v
        lost = [f"the timestep {info.timestep} and the residual prediction, which no ordinary sampler computes"]
    if info.coeff_t is not None:
        lost.append(f"coeff_t {info.coeff_t}, the timestep of its closed form")
    whole = [name for weights in generator.sets("unet") for name in weights.tensors]
    if whole:
        lost.append(f"the UNet's replaced tensors {first_names(dict.fromkeys(whole))}")
    vae: list[PartWeights] = [weights for weights in generator.sets("vae") if weights]
    if vae:
        modules = {*(name for weights in vae for name in weights.lora)}
        tensors = {*(name for weights in vae for name in weights.tensors)}
        lost.append(f"the VAE's LoRA on {len(modules)} modules and {len(tensors)} replaced tensors")
    if generator.prompt_embedding is not None:
        lost.append("the prompt embedding")
    return tuple(lost)
