"""What ICM-SR knows of a MODEL: it travels as an attachment of its ModelPatcher, through clones and user LoRAs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import comfy.model_sampling
from torch import Tensor

from ...icmsr_core.backbone.protocol import BackboneDescriptor
from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.weights.generator_file import Generator
from ...icmsr_core.weights.generator_fit import check_prior
from .core_objects import Model

log = logging.getLogger(__name__)

ATTACHMENT = "icmsr"
FAMILY_BY_CONTEXT_WIDTH = {768: "sd15", 1024: "sd21"}
"""Families of core's checkpoints, told apart by the width of their text embedding."""


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """Attached to a MODEL, and to the VAE whose weights a generator changed along with it."""

    descriptor: BackboneDescriptor
    """The backbone, with the generator's timestep and prediction once one is applied."""
    base: str
    """Name of the base model."""
    base_hash: str = ""
    """SHA-256 of its UNet weights; empty when unknown."""
    prompt_embedding: Tensor | None = None
    """Constant context [tokens, width], or None when a CONDITIONING must be connected."""
    generator: str = ""
    """Name of the generator that is applied; empty for a bare base."""
    changes_vae: bool = False
    """Whether that generator changed the VAE, so that the two outputs belong together."""


def describe(model: Model) -> ModelDescription:
    """The description attached to `model`, or one read off a Stable Diffusion 1.5 or 2.1 MODEL of core's loaders.

    Raises `IcmsrError` for a MODEL of any other kind.
    """
    attached: ModelDescription | None = model.get_attachment(ATTACHMENT)
    if attached is not None:
        return attached
    config = model.model.model_config.unet_config
    family = FAMILY_BY_CONTEXT_WIDTH.get(config.get("context_dim", 0))
    if family is None or config.get("in_channels") != 4 or config.get("adm_in_channels") is not None:
        raise IcmsrError(
            f"ICM-SR has no generators for a MODEL of type {type(model.model).__name__}: take MODEL and VAE from "
            "'ICM-SR Load Embedded', or from a checkpoint of Stable Diffusion 1.5 or 2.1-base"
        )
    factor = model.model.latent_format.spacial_downscale_ratio
    # Not model_type, which core guesses from a weight's statistics: ModelSamplingDiscrete may have corrected it.
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
    """`description` after `generator` is applied.

    Raises `IcmsrError` for another family, for a base that predicts something else than the one it was trained on, or
    when a generator is there already: two would be merged into nonsense.
    """
    info, descriptor = generator.info, description.descriptor
    if description.generator:
        raise IcmsrError(
            f"this MODEL already carries the generator {description.generator!r}: connect ICM-SR Apply Generator to "
            "the bare base (ICM-SR Load Embedded with generator = none)"
        )
    if info.family != descriptor.family:
        raise IcmsrError(
            f"{generator.name}: the generator is for the family {info.family!r}, the MODEL ({description.base}) is of "
            f"{descriptor.family!r}: choose files of one family"
        )
    where = f"the MODEL, {description.base}"
    if not description.base_hash:  # nothing but core's judgement stands behind it
        where += "; where ComfyUI took it for the wrong kind, ModelSamplingDiscrete before this node says which it is"
    own = bool(info.base_hash) and info.base_hash == description.base_hash
    check_prior(generator, descriptor.prediction, where, lambda: own)
    if info.base_hash and description.base_hash and info.base_hash != description.base_hash:
        log.warning(
            "%s was trained on other weights of %s than these: results may suffer", generator.name, description.base
        )
    descriptor.schedule.check_timestep(info.timestep)
    return replace(
        description,
        descriptor=replace(descriptor, timestep=info.timestep, prediction=info.prediction),
        prompt_embedding=(
            description.prompt_embedding if generator.prompt_embedding is None else generator.prompt_embedding
        ),
        generator=generator.name,
        changes_vae=any(generator.sets("vae")),
    )
