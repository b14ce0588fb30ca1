"""Imports foreign checkpoints as generator files: OSEDiff, PiSA-SR, and LoRA files of the UNet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..backbone.noise_schedule import NoiseSchedule
from ..backbone.prediction import check_prediction
from ..errors import IcmsrError
from ..runtime.prompts import check_prompts, embed_prompts
from ..weights.base import BaseFolder, open_base
from ..weights.generator_file import PARTS, REALISTIC, Generator, GeneratorInfo, LoraPair, PartWeights, save_generator
from ..weights.merging import misfit, not_for_this_base
from .kinds import IMPORT_KINDS, LORA_KIND
from .layouts import Layout, Shapes, published_layout
from .lora_files import read_lora
from .one_step_checkpoints import PICKLED_KINDS, read_pickled

LORA_NOTES = (
    "A LoRA file says neither its timestep nor what the UNet's output means: both are what the import was told (999 "
    "and eps by default)."
)
BRING_A_PROMPT = "This file holds no prompt: bring one, as conditioning in ComfyUI, with --prompt on the command line."


@dataclass(frozen=True)
class ImportSettings:
    """What a foreign file does not state."""

    family: str = ""
    """``sd21`` or ``sd15``, for a LoRA file; empty: that of `base`."""
    base: Path | None = None
    """Base that the file must fit and whose hash is recorded; None: the published layers of the family."""
    timestep: int | None = None
    """Input timestep of a LoRA file; None: 999."""
    prediction: str | None = None
    """What the UNet's output means with a LoRA file: eps, v or residual; None: eps."""
    prompt: str | None = None
    """Text whose embedding becomes the constant prompt, by the text encoder of `base`; None: no prompt."""


def import_checkpoint(kind: str, source: Path, dest: Path, settings: ImportSettings | None = None) -> Generator:
    """Writes the foreign checkpoint at `source` to `dest` as a generator file, and returns the generator.

    `kind` is one of `IMPORT_KINDS`. The effective scale of each LoRA stays the same, and so does the precision, except
    that a file of mixed precisions becomes float32. No code in a pickle is run. `dest` appears complete or not at all.

    Raises `IcmsrError` for an unknown kind, an option that does not apply to it, a file that is missing, damaged, holds
    code or values that are not finite, or does not fit the base (it names the first keys), and for a prompt without a
    base that has a text encoder.
    """
    settings = settings or ImportSettings()
    if kind not in IMPORT_KINDS:
        raise IcmsrError(f"kind must be one of {', '.join(IMPORT_KINDS)}, got {kind!r}")
    check_result_file(source, dest)
    family = settings.family if kind == LORA_KIND else _fixed_family(kind, settings)
    base = None if settings.base is None else open_base(settings.base)
    family, layout = _target(family, base)
    if settings.prompt is not None:
        if base is None:
            raise IcmsrError(
                "a prompt needs a text encoder, and that comes with a base: give --base too, a full Stable Diffusion "
                "folder or a hub id"
            )
        check_prompts(base)  # before the file is read
    if kind == LORA_KIND:
        generator = _lora_generator(source, family, layout, settings)
    else:
        generator = read_pickled(kind, source)
    generator = _fitted(replace(generator, name=f"{source} for {family}"), layout)
    if base is not None:
        generator = replace(generator, info=replace(generator.info, base=base.info.name, base_hash=base.hash()))
    if base is not None and settings.prompt is not None:
        generator = replace(generator, prompt_embedding=embed_prompts(base, [settings.prompt], None, "cpu")[0])
    said = BRING_A_PROMPT if settings.prompt is None else f"Its constant prompt is {json.dumps(settings.prompt)}."
    generator = replace(generator, info=replace(generator.info, notes=f"{generator.info.notes} {said}"))
    save_generator(dest, generator, _common_dtype(generator))
    return generator


def check_result_file(source: Path, dest: Path) -> None:
    """Raises `IcmsrError` unless `source` exists and `dest` names another file, a .safetensors."""
    if dest.suffix.lower() != ".safetensors" or dest.is_dir():
        raise IcmsrError(f"{dest}: the result must be a file whose name ends in .safetensors")
    if not source.exists():
        raise IcmsrError(f"{source}: no such file")
    if dest.exists() and dest.samefile(source):
        raise IcmsrError(f"{dest}: source and result are the same file: choose another name for the result")


def _fixed_family(kind: str, settings: ImportSettings) -> str:
    fixed = PICKLED_KINDS[kind].info
    for option in ("family", "timestep", "prediction"):
        value, own = getattr(settings, option), getattr(fixed, option)
        if value not in (None, "", own):
            raise IcmsrError(f"the {option} of {kind} is always {own}, got {value}: drop --{option}")
    return fixed.family


def _target(family: str, base: BaseFolder | None) -> tuple[str, Layout]:
    """The family, and the names and shapes that the file must fit."""
    if base is None:
        if not family:
            raise IcmsrError("a LoRA file does not say which family it is for: give --family (sd15 or sd21), or --base")
        return family, published_layout(family)
    if family not in ("", base.info.family):
        raise IcmsrError(
            f"{base.path}: this base is {base.info.family}, but the file is for {family}: choose a base of that family"
        )
    states = {"unet": base.unet_state(), "vae": base.vae_state()}
    layout = {part: {key: tuple(value.shape) for key, value in state.items()} for part, state in states.items()}
    return base.info.family, layout


def _lora_generator(source: Path, family: str, layout: Layout, settings: ImportSettings) -> Generator:
    timestep = 999 if settings.timestep is None else settings.timestep
    prediction = check_prediction(settings.prediction or "eps")
    NoiseSchedule().check_timestep(timestep)
    end = ".weight"
    lora = read_lora(source, [key[: -len(end)] for key in layout["unet"] if key.endswith(end)])
    info = GeneratorInfo(family, timestep, prediction, rank=lora.rank, alpha=lora.alpha, notes=LORA_NOTES)
    return Generator(info, PartWeights(lora.pairs), PartWeights())


def _fitted(generator: Generator, layout: Layout) -> Generator:
    """`generator` with its LoRA matrices in the shapes of their layers; raises `IcmsrError` for what does not fit."""
    wrong: list[str] = []
    sets = {part: generator.sets(part) for part in PARTS}
    faithful = {part: _fit(f"{part}.", first, layout[part], wrong) for part, (first, _) in sets.items()}
    realistic = {
        part: _fit(f"{REALISTIC}{part}.", second, layout[part], wrong) for part, (_, second) in sets.items() if second
    }
    if wrong:
        raise not_for_this_base(generator.name, wrong)
    return replace(generator, unet=faithful["unet"], vae=faithful["vae"], realistic=realistic)


def _fit(prefix: str, weights: PartWeights, shapes: Shapes, wrong: list[str]) -> PartWeights:
    for parameter, tensor in weights.tensors.items():
        if shapes.get(parameter) != tuple(tensor.shape):
            wrong.append(misfit(prefix + parameter, tensor.shape, shapes.get(parameter)))
    lora: dict[str, LoraPair] = {}
    for module, (down, up) in weights.lora.items():
        shape = shapes.get(f"{module}.weight", ())
        # A convolution of one pixel is a linear layer; files have it in either form.
        if len(shape) != down.ndim and all(side == 1 for side in (*shape[2:], *down.shape[2:])):
            down = down.reshape(*down.shape[:2], *shape[2:])
        up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2)) if all(side == 1 for side in up.shape[2:]) else up
        got = (up.shape[0], *down.shape[1:])
        if got != shape or any(side != 1 for side in up.shape[2:]):
            wrong.append(misfit(f"{prefix}{module}.weight", got, shape or None))
        lora[module] = LoraPair(down, up)
    return PartWeights(lora, weights.tensors)


def _common_dtype(generator: Generator) -> torch.dtype:
    dtypes = {tensor.dtype for part in PARTS for weights in generator.sets(part) for tensor in _tensors(weights)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _tensors(weights: PartWeights) -> list[Tensor]:
    pairs: Mapping[str, LoraPair] = weights.lora
    return [*weights.tensors.values(), *(half for pair in pairs.values() for half in pair)]
