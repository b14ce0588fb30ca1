"""A generator as patches of core's ModelPatcher, which core merges when it loads the networks and can take back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import comfy.weight_adapter
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.weights.generator_file import REALISTIC, Generator, PartWeights
from ...icmsr_core.weights.merging import misfit, not_for_this_base
from .core_objects import Model, Patcher, Vae
from .description import ATTACHMENT, describe, with_generator
from .keys import native_unet_keys, native_vae_key, vae_levels

log = logging.getLogger(__name__)


class Patches(NamedTuple):
    """One set of a generator's weights as patches, by native parameter name."""

    whole: dict[str, tuple[str, tuple[Tensor]]]
    """Tensors replaced whole, in core's form ("diff", (tensor,))."""
    low_rank: dict[str, comfy.weight_adapter.WeightAdapterBase]


def apply_generator(
    model: Model, vae: Vae, generator: Generator, strength: float = 1.0, fidelity: float = 1.0
) -> tuple[Model, Vae]:
    """Copies of `model` and `vae` with `generator` merged in; the originals stay unchanged.

    A weight W becomes ``W + strength * (W' - W)``, where W' is the weight merged at `fidelity` (`weights/merging.py`).
    A generator with one set of weights takes only the fidelity 1, the default of the nodes. LoRAs of the user act on
    top, whichever node comes first. Raises `IcmsrError` for any other fidelity then, for one outside 0..2, for a VAE
    that does not belong to the MODEL, and for tensors that do not fit, by name.
    """
    chosen = None if fidelity == 1.0 and not generator.has_two_sets else fidelity
    generator = generator.at_fidelity(chosen)
    description = with_generator(describe(model), generator)
    config = model.model.model_config.unet_config
    embedding = description.prompt_embedding
    if embedding is not None and embedding.shape[1] != config["context_dim"]:
        raise IcmsrError(
            f"{generator.name}: its prompt embedding has width {embedding.shape[1]}, this MODEL takes "
            f"{config['context_dim']}: choose a generator and a model that belong together"
        )
    if vae.latent_channels != description.descriptor.latent_channels:
        raise wrong_vae(vae.latent_channels, description.descriptor.latent_channels)
    unet_keys = native_unet_keys(config)
    unet_patches = _native_patches(
        generator, "unet", model.model_state_dict(), lambda key: f"diffusion_model.{unet_keys.get(key, key)}"
    )
    _warn_of_eight_bits(generator, model, unet_patches)
    model_copy = model.clone()
    _add(model_copy, *unet_patches, strength, generator.fidelity)
    model_copy.set_attachments(ATTACHMENT, description)
    if not description.changes_vae:
        return model_copy, vae

    vae_state = vae.patcher.model_state_dict()
    levels = vae_levels(vae_state)
    if not levels:
        raise IcmsrError(
            f"{generator.name}: the generator changes the VAE, and this VAE is of a kind that it cannot change (such "
            "as a tiny one): connect the VAE of the checkpoint"
        )
    vae_patches = _native_patches(generator, "vae", vae_state, lambda key: native_vae_key(key, levels))
    vae_copy = copy.copy(vae)  # core's VAE has no clone()
    vae_copy.patcher = vae.patcher.clone()
    _add(vae_copy.patcher, *vae_patches, strength, generator.fidelity)
    vae_copy.patcher.set_attachments(ATTACHMENT, description)
    return model_copy, vae_copy


def wrong_vae(got: int, expected: int) -> IcmsrError:
    """The error for a VAE that does not belong to the MODEL."""
    return IcmsrError(
        f"this VAE has {got} latent channels, the MODEL takes {expected}: connect the VAE from the same node as the "
        "MODEL"
    )


def _warn_of_eight_bits(generator: Generator, model: Model, sets: tuple[Patches, Patches]) -> None:
    """Warns if the MODEL keeps changed weights in 8 bits: core rounds them to that, which destroys most of a LoRA."""
    state = model.model_state_dict()
    keys = {key for patches in sets for part in patches for key in part}
    dtypes = sorted({str(state[key].dtype).removeprefix("torch.") for key in keys if state[key].element_size() == 1})
    if dtypes:
        log.warning(
            "%s: this MODEL keeps its weights in %s, so the generator is rounded to 8 bits too: load the checkpoint in "
            "16 bits for the full quality",
            generator.name,
            " and ".join(dtypes),
        )


def _native_patches(
    generator: Generator, part: str, state: Mapping[str, Tensor], native: Callable[[str], str]
) -> tuple[Patches, Patches]:
    """The faithful and the realistic set of `part` (unet or vae), checked against `state` by name and shape."""
    faithful, realistic = generator.sets(part)
    first, wrong = _set_patches(f"{part}.", faithful, state, generator.info.alpha, native)
    second, wrong_above = _set_patches(f"{REALISTIC}{part}.", realistic, state, generator.info.realistic_alpha, native)
    if wrong or wrong_above:
        raise not_for_this_base(generator.name, wrong + wrong_above)
    return first, second


def _set_patches(
    prefix: str, weights: PartWeights, state: Mapping[str, Tensor], alpha: float, native: Callable[[str], str]
) -> tuple[Patches, list[str]]:
    patches = Patches({}, {})
    wrong: list[str] = []
    for parameter, tensor in weights.tensors.items():
        target = state.get(native(parameter))
        if target is None or _squeezed(target) != _squeezed(tensor):
            wrong.append(misfit(prefix + parameter, tensor.shape, None if target is None else target.shape))
        else:
            patches.whole[native(parameter)] = ("diff", (tensor.reshape(target.shape),))
    for module, (down, up) in weights.lora.items():
        parameter = f"{module}.weight"
        target = state.get(native(parameter))
        shape = (up.shape[0], *down.shape[1:])
        if target is None or _squeezed(target) != tuple(length for length in shape if length != 1):
            wrong.append(misfit(prefix + parameter, shape, None if target is None else target.shape))
        else:
            adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, alpha, None, None, None))
            patches.low_rank[native(parameter)] = adapter
    return patches, wrong


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    # A linear layer of diffusers may be a 1x1 convolution in core.
    return tuple(length for length in tensor.shape if length != 1)


def _add(patcher: Patcher, faithful: Patches, realistic: Patches, strength: float, fidelity: float) -> None:
    """Adds the patches before those that the patcher already has, so that a user's LoRA survives replaced tensors.

    A patch of core never sees W, which may be loaded, patched or cast: it can only scale the weight and add to it. With
    s the strength, f the fidelity and W1 the faithful weight, ``W + s * (W1 + f * (new - W1) - W)`` is built from the
    replaced tensors first and the LoRA after them. Where the realistic set replaces a tensor, the faithful set's part
    has the factor s * (1 - f), elsewhere s.
    """
    earlier = patcher.patches
    patcher.patches = {}
    above = strength * fidelity
    if not above:
        realistic = Patches({}, {})

    def add(patches: dict[str, Any], amount: float, rest: float = 1.0) -> None:
        """Turns each weight into ``rest * weight + amount * patch``."""
        if patches and (amount or rest != 1.0):
            placed = patcher.add_patches(patches, strength_patch=amount, strength_model=rest)
            assert len(placed) == len(patches)  # every name was looked up before

    kept, replaced = _split(faithful.whole, realistic.whole)
    add(kept, strength, 1.0 - strength)
    add(replaced, strength - above, 1.0 - strength)
    first, second = _split(realistic.whole, faithful.whole)
    add(first, above, 1.0 - above)
    add(second, above)
    kept, replaced = _split(faithful.low_rank, realistic.whole)
    add(kept, strength)
    add(replaced, strength - above)
    add(realistic.low_rank, above)
    for key, entries in earlier.items():
        patcher.patches[key] = patcher.patches.get(key, []) + entries


def _split(patches: dict[str, Any], others: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `patches` whose keys are not in `others`, and those whose keys are."""
    return (
        {key: patch for key, patch in patches.items() if key not in others},
        {key: patch for key, patch in patches.items() if key in others},
    )
