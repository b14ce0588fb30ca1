"""Imports foreign checkpoints as generator files: OSEDiff, PiSA-SR, HYPIR, OMGSR-S, and LoRA files of the UNet."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..errors import IcmsrError
from ..foreign.conversion import read_foreign, stored_dtype, told_info
from ..foreign.kinds import IMPORT_KINDS
from ..foreign.layouts import Layout, published_layout
from ..foreign.told import Told
from ..runtime.prompts import check_prompts, embed_prompts
from ..weights.base import BaseFolder, open_base
from ..weights.generator_file import PARTS, Generator, save_generator

BRING_A_PROMPT = "This file holds no prompt: bring one, as conditioning in ComfyUI, with --prompt on the command line."


@dataclass(frozen=True)
class ImportSettings:
    """What a foreign file does not state."""

    told: Told = field(default_factory=Told)
    """What the file does not say: of a LoRA the family (or that of `base`), timestep (999) and prediction (eps), in
    brackets what is taken without; of any file `coeff_t`."""
    base: Path | None = None
    """Base that the file must fit and whose hash is recorded; None: the published layers of the family."""
    prompt: str | None = None
    """Text whose embedding becomes the constant prompt, by the text encoder of `base`; None: no prompt."""
    half: bool = False
    """Whether tensors are stored in float16, in half the bytes of float32."""


def import_checkpoint(kind: str, source: Path, dest: Path, settings: ImportSettings | None = None) -> Generator:
    """Writes the foreign checkpoint at `source` to `dest` as a generator file, and returns the generator.

    `kind` is one of `IMPORT_KINDS`. The effective scale of each LoRA stays the same, and so does the precision, except
    that a file of mixed precisions becomes float32, and any float16 if the settings say so. No code in a pickle is run.
    `dest` appears complete or not at all.

    Raises `IcmsrError` for an unknown kind, an option that does not apply to it, a file that is missing, damaged, holds
    code or values that are not finite, lacks a module, or does not fit the base (it names the first keys), and for a
    prompt without a base that has a text encoder.
    """
    settings = settings or ImportSettings()
    if kind not in IMPORT_KINDS:
        raise IcmsrError(f"kind must be one of {', '.join(IMPORT_KINDS)}, got {kind!r}")
    check_result_file(source, dest)
    base = None if settings.base is None else open_base(settings.base)
    # Refuses options before the file is read.
    family, layout = _target(told_info(kind, settings.told).family, base)
    if settings.prompt is not None:
        if base is None:
            raise IcmsrError(
                "a prompt needs a text encoder, and that comes with a base: give --base too, a full Stable Diffusion "
                "folder, a hub id, or for the empty prompt a checkpoint"
            )
        check_prompts(base, [settings.prompt])  # before the file is read
    generator = read_foreign(kind, source, replace(settings.told, family=family), layout)
    if base is not None:
        generator = replace(generator, info=replace(generator.info, base=base.info.name, base_hash=base.hash()))
    if base is not None and settings.prompt is not None:
        generator = replace(generator, prompt_embedding=embed_prompts(base, [settings.prompt], None, "cpu")[0])
    said = BRING_A_PROMPT if settings.prompt is None else f"Its constant prompt is {json.dumps(settings.prompt)}."
    generator = replace(generator, info=replace(generator.info, notes=f"{generator.info.notes} {said}"))
    save_generator(dest, generator, torch.float16 if settings.half else stored_dtype(generator))
    return generator


def check_result_file(source: Path, dest: Path) -> None:
    """Raises `IcmsrError` unless `source` exists and `dest` names another file, a .safetensors."""
    if dest.suffix.lower() != ".safetensors" or dest.is_dir():
        raise IcmsrError(f"{dest}: the result must be a file whose name ends in .safetensors")
    if not source.exists():
        raise IcmsrError(f"{source}: no such file")
    if dest.exists() and dest.samefile(source):
        raise IcmsrError(f"{dest}: source and result are the same file: choose another name for the result")


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
    return base.info.family, {part: base.shapes(part) for part in PARTS}
