"""What the networks of a recipe are built from: files opened and checked, choices made, once.

Needs no diffusers, so that the command line can check a recipe before it imports that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbone.protocol import BackboneDescriptor
from ..errors import IcmsrError
from ..foreign.conversion import check_head, is_generator_file, load_any_generator
from ..foreign.told import Told
from ..weights.base import BaseFolder, open_base
from ..weights.fidelity import check_fidelity_applies
from ..weights.generator_file import PARTS, Generator, holds_two_sets
from ..weights.hub import find_base
from ..weights.tiny_vae_file import TinyVae, read_tiny_vae
from .compilation import check_compiler
from .device import pick_device
from .precision import PRECISIONS, choose_dtype, computes_bf16
from .prompts import embed_prompts
from .recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ingredients:
    """A `Recipe` resolved: everything fits together, and nothing is left to choose."""

    base: BaseFolder
    generator: Generator | None
    """At the recipe's fidelity; None: the bare prior."""
    tiny_vae: TinyVae | None
    """Takes the place of the base's VAE."""
    descriptor: BackboneDescriptor
    prompt_embedding: Tensor
    """Constant context [tokens, width]."""
    device: torch.device
    dtype: torch.dtype


def check_recipe(recipe: Recipe) -> None:
    """Raises `IcmsrError` for what can be seen before any weights are read.

    A device that cannot be used here, no compiler for it, a generator that is missing or another kind of file, and a
    fidelity for a generator of a single set.
    """
    device = pick_device(recipe.device)
    if recipe.compile_unet:
        check_compiler(device)
    generator = recipe.generator
    if isinstance(generator, Path):
        if is_generator_file(generator):
            check_fidelity_applies(str(generator), holds_two_sets(generator), recipe.fidelity)
        else:
            check_head(generator)
    elif generator is not None:
        generator.at_fidelity(recipe.fidelity)
    else:
        check_fidelity_applies("no generator", False, recipe.fidelity)


def resolve(recipe: Recipe) -> Ingredients:
    """What the networks of `recipe` are built from; a base on the hub is fetched, a prompt is embedded.

    Raises `IcmsrError` as `check_recipe`, for files that are missing, damaged or do not belong together, and where
    there is no prompt. Logs a warning for a generator that was trained on other weights of the base, and for one that
    changes the VAE where a tiny one replaces it.
    """
    check_recipe(recipe)
    device = pick_device(recipe.device)
    path = find_base(recipe.base, recipe.prompt is not None) if isinstance(recipe.base, str) else recipe.base
    base = open_base(path)
    generator = recipe.generator
    if generator is not None:
        if isinstance(generator, Path):
            generator = _load(generator, recipe.told, base)
        generator = generator.at_fidelity(recipe.fidelity)
    descriptor = base.descriptor(generator)
    tiny = None if recipe.tiny_vae is None else read_tiny_vae(recipe.tiny_vae)
    if tiny is not None:
        tiny.check_fits(descriptor)
        if generator is not None and any(generator.sets("vae")):
            log.warning(
                "%s also changes the VAE, which the tiny VAE replaces: this is a preview of its result", generator.name
            )
    embedding = _prompt_embedding(recipe, base, generator, device)
    if generator is not None and generator.info.base_hash and generator.info.base_hash != base.hash():
        log.warning(
            "%s was trained on other base weights than %s, or on another file of them (fp16, single file)",
            generator.name,
            base.path,
        )
    if recipe.dtype == "auto":
        dtype = choose_dtype(device.type, descriptor, computes_bf16(device))
    else:
        dtype = PRECISIONS[recipe.dtype]
    return Ingredients(base, generator, tiny, descriptor, embedding, device, dtype)


def _load(path: Path, told: Told, base: BaseFolder) -> Generator:
    layouts = {base.info.family: {part: base.shapes(part) for part in PARTS}}
    generator, found = load_any_generator(path, told, layouts=layouts)
    if found:
        log.info("%s: %s. %s", path.name, found, generator.info.notes)
    return generator


def _prompt_embedding(recipe: Recipe, base: BaseFolder, generator: Generator | None, device: torch.device) -> Tensor:
    """The constant context [tokens, width]: the recipe's prompt, else the generator's, else the base's own."""
    if recipe.prompt is not None:
        embedding: Tensor | None = embed_prompts(base, [recipe.prompt], None, device)[0]
    else:
        embedding = None if generator is None else generator.prompt_embedding
        if embedding is None:
            embedding = base.prompt_embedding()
    name = str(base.path) if generator is None else generator.name
    if embedding is None:
        raise IcmsrError(
            f"{name}: neither the generator nor the base {base.path} holds a prompt embedding: give a prompt "
            '(--prompt "" for the empty one) and a base with a text encoder: a checkpoint in one file, a whole Stable '
            "Diffusion folder or a hub id"
        )
    width = base.unet_config["cross_attention_dim"]
    if embedding.shape[-1] != width:
        raise IcmsrError(
            f"{name}: its prompt embedding has width {embedding.shape[-1]}, the base {base.path} takes {width}: "
            "choose files that belong together"
        )
    return embedding
