"""A generator file as patches of core's ModelPatcher: core merges them when it loads the networks, and undoes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import comfy.weight_adapter
from torch import Tensor

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.generator_file import Generator, PartWeights
from .model_description import ATTACHMENT, describe, with_generator
from .native_keys import native_unet_keys, native_vae_key, vae_levels


class Patches(NamedTuple):
    """Patches by native parameter name."""

    whole: dict[str, tuple]
    low_rank: dict[str, comfy.weight_adapter.WeightAdapterBase]


def apply_generator(model, vae, generator: Generator, name: str, strength: float = 1.0):
    """Copies of `model` and `vae` with `generator`, called `name`, laid over them; the originals stay as they are.

    LoRA: ``W + strength * alpha / rank * B A``; whole tensor: ``W + strength * (new - W)``. LoRAs of the user act on
    top of it, whichever node comes first. Raises `IcmsrError` that names every tensor without a place.
    """
    description = with_generator(describe(model), generator, name)
    config = model.model.model_config.unet_config
    embedding = description.prompt_embedding
    if embedding is not None and embedding.shape[1] != config["context_dim"]:
        raise IcmsrError(
            f"{name}: its prompt embedding is {embedding.shape[1]} wide, this MODEL takes {config['context_dim']}"
        )
    if vae.latent_channels != description.descriptor.latent_channels:
        raise wrong_vae(vae.latent_channels, description.descriptor.latent_channels)
    unet_keys = native_unet_keys(config)
    unet_patches = _native_patches(
        f"{name}: unet",
        generator.unet,
        model.model_state_dict(),
        generator.info.alpha,
        lambda key: f"diffusion_model.{unet_keys.get(key, key)}",
    )
    model_copy = model.clone()
    _add(model_copy, unet_patches, strength)
    model_copy.set_attachments(ATTACHMENT, description)
    if not generator.vae:
        return model_copy, vae

    vae_state = vae.patcher.model_state_dict()
    levels = vae_levels(vae_state)
    if not levels:
        raise IcmsrError(f"{name}: the generator changes an AutoencoderKL, this VAE is of another kind")
    vae_patches = _native_patches(
        f"{name}: vae", generator.vae, vae_state, generator.info.alpha, lambda key: native_vae_key(key, levels)
    )
    vae_copy = copy.copy(vae)  # core's VAE has no clone()
    vae_copy.patcher = vae.patcher.clone()
    _add(vae_copy.patcher, vae_patches, strength)
    vae_copy.patcher.set_attachments(ATTACHMENT, description)
    return model_copy, vae_copy


def wrong_vae(got: int, expected: int) -> IcmsrError:
    """The error for a VAE that does not belong to the MODEL."""
    return IcmsrError(
        f"this VAE has {got} latent channels, the MODEL takes {expected}: connect the VAE of the same loader"
    )


def _native_patches(
    name: str, weights: PartWeights, state: Mapping[str, Tensor], alpha: float, native: Callable[[str], str]
) -> Patches:
    whole: dict[str, tuple] = {}
    low_rank: dict[str, comfy.weight_adapter.WeightAdapterBase] = {}
    wrong: list[str] = []
    for parameter, tensor in weights.tensors.items():
        target = state.get(native(parameter))
        if target is None or _squeezed(target) != _squeezed(tensor):
            wrong.append(_misfit(parameter, tensor.shape, target))
        else:
            whole[native(parameter)] = ("diff", (tensor.reshape(target.shape),))
    for module, (down, up) in weights.lora.items():
        parameter = f"{module}.weight"
        target = state.get(native(parameter))
        shape = (up.shape[0], *down.shape[1:])
        if target is None or _squeezed(target) != tuple(length for length in shape if length != 1):
            wrong.append(_misfit(parameter, shape, target))
        else:
            low_rank[native(parameter)] = comfy.weight_adapter.LoRAAdapter(set(), (up, down, alpha, None, None, None))
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise IcmsrError(f"{name}: the generator does not fit this base model: {', '.join(wrong[:4])}{more}")
    return Patches(whole, low_rank)


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    # A linear layer here may be a 1x1 convolution there.
    return tuple(length for length in tensor.shape if length != 1)


def _misfit(parameter: str, shape, target: Tensor | None) -> str:
    there = "no such parameter" if target is None else f"the base has {list(target.shape)}"
    return f"{parameter} {list(shape)} ({there})"


def _add(patcher, patches: Patches, strength: float) -> None:
    """Puts the patches under those that are there already, so that a user's LoRA survives a tensor replaced whole."""
    earlier = patcher.patches
    patcher.patches = {}
    # "diff" adds strength * new to (1 - strength) * W: no need to know W, which may be loaded, patched or cast.
    placed = patcher.add_patches(patches.whole, strength_patch=strength, strength_model=1.0 - strength)
    placed += patcher.add_patches(patches.low_rank, strength_patch=strength)
    assert len(placed) == len(patches.whole) + len(patches.low_rank)  # every name was looked up before
    for key, entries in earlier.items():
        patcher.patches[key] = patcher.patches.get(key, []) + entries
