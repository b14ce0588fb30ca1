"""What ICM-SR knows about a MODEL. It is attached to the ModelPatcher, so it survives clones and LoRA loaders."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import comfy.model_sampling
from torch import Tensor

from ...icmsr_core.backbone.protocol import BackboneDescriptor
from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.weights.generator_file import Generator
from ...icmsr_core.weights.generator_fit import check_prior
from ...icmsr_core.weights.sd_families import SD_FILES
from .core_objects import Model

log = logging.getLogger(__name__)

ATTACHMENT = "icmsr"
FAMILY_BY_CONTEXT_WIDTH = {768: "sd15", 1024: "sd21"}
"""Family of a checkpoint by the width of its text embedding."""


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """Attached to a MODEL, and to the VAE if the generator changed its weights too."""

    descriptor: BackboneDescriptor
    """The backbone; once a generator is applied, with its timestep and prediction."""
    base: str
    """Name of the base model."""
    base_hash: str = ""
    """SHA-256 of the base's UNet weights; empty if unknown."""
    prompt_embedding: Tensor | None = None
    """Constant context [tokens, width]; None if a CONDITIONING must be connected."""
    generator: str = ""
    """Name of the applied generator; empty for a base without one."""
    changes_vae: bool = False
    """Whether the generator changed the VAE, so that MODEL and VAE must be used together."""


def describe(model: Model) -> ModelDescription:
    """The description attached to `model`, or for a Stable Diffusion 1.5 or 2.1 MODEL from core's loaders a new one.

    Raises `IcmsrError` for a MODEL of any other kind.
    """
    attached: ModelDescription | None = model.get_attachment(ATTACHMENT)
    if attached is not None:
        return attached
    config = model.model.model_config.unet_config
    family = FAMILY_BY_CONTEXT_WIDTH.get(config.get("context_dim", 0))
    if family is None or config.get("in_channels") != 4 or config.get("adm_in_channels") is not None:
        raise IcmsrError(
            f"ICM-SR does not work with a MODEL of the type {type(model.model).__name__}: take MODEL and VAE from "
            "ICM-SR Load Embedded, or from Load Checkpoint with Stable Diffusion 1.5 or 2.1"
        )
    factor = model.model.latent_format.spacial_downscale_ratio
    # Not model_type, which core guesses from the statistics of a weight: ModelSamplingDiscrete may have corrected it.
    sampling = model.get_model_object("model_sampling")
    descriptor = BackboneDescriptor(
        family=family,
        latent_channels=model.model.latent_format.latent_channels,
        latent_factor=factor,
        multiple_of=factor * 2 ** (len(config["channel_mult"]) - 1),
        timestep=0,
        prediction="v" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "eps",
    )
    return ModelDescription(descriptor, f"{family} checkpoint")


def with_generator(description: ModelDescription, generator: Generator) -> ModelDescription:
    """The description of the MODEL once `generator` is applied.

    Raises `IcmsrError` for a generator of another family, for one trained on a base with another prediction type, and
    if a generator is applied already: two merged into one model give nonsense.
    """
    info, descriptor = generator.info, description.descriptor
    if description.generator:
        raise IcmsrError(
            f"this MODEL already carries the generator {description.generator!r}, and only one is possible: connect a "
            "model without one (ICM-SR Load Embedded with generator = none, or Load Checkpoint)"
        )
    if info.family != descriptor.family:
        raise IcmsrError(
            f"{generator.name}: the generator is for the family {info.family!r}, this MODEL ({description.base}) is of "
            f"the family {descriptor.family!r}: choose a generator and a model of the same family"
            + (f", such as {SD_FILES[info.family]}" if info.family in SD_FILES else "")
        )
    where = f"the MODEL, {description.base}"
    if not description.base_hash:  # a checkpoint, whose prediction type core has guessed
        where += "; if ComfyUI guessed its kind wrong, set it with ModelSamplingDiscrete before this node"
    own = bool(info.base_hash) and info.base_hash == description.base_hash
    check_prior(generator, descriptor.prediction, where, lambda: own)
    if info.base_hash and description.base_hash and info.base_hash != description.base_hash:
        log.warning("%s was trained on other weights of %s: the result may be worse", generator.name, description.base)
    return replace(
        description,
        descriptor=descriptor.with_generator(info),
        prompt_embedding=(
            description.prompt_embedding if generator.prompt_embedding is None else generator.prompt_embedding
        ),
        generator=generator.name,
        changes_vae=any(generator.sets("vae")),
    )
