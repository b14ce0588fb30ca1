"""The protocol of the networks that a one-step generator runs on: a VAE and a UNet.

There are two implementations: `runtime/diffusers_backbone.py` (library, command line, training) and
`nodes/native/backbone.py` (ComfyUI's MODEL and VAE). `upscale/one_step.py` works with either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .noise_schedule import NoiseSchedule
from .prediction import Prediction
from .recommended import Recommended, recommended_from
from .vae_steps import VaeHalf, VaePart


class GeneratorFacts(Protocol):
    """What a generator's description (`GeneratorInfo`) says about its one step."""

    @property
    def timestep(self) -> int:
        """The UNet's input timestep."""

    @property
    def prediction(self) -> Prediction:
        """What its output means."""

    @property
    def coeff_t(self) -> int | None:
        """The timestep of the closed form; None: the same."""

    @property
    def recommended(self) -> Mapping[str, Any]:
        """The fields of `Recommended`."""


@dataclass(frozen=True)
class BackboneDescriptor:
    """Everything that a caller must know about a backbone before running it."""

    family: str
    """Which base the weights belong to: ``nano``, ``sd21``, ``sd15``."""
    latent_channels: int
    """Channels of the latent."""
    latent_factor: int
    """Pixels per latent cell, along each axis."""
    multiple_of: int
    """Height and width in pixels must be multiples of this (latent factor times the UNet's downsampling)."""
    timestep: int
    """The generator's one input timestep."""
    prediction: Prediction
    """What the network's output means at that timestep."""
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    """The base model's noise schedule."""
    coeff_t: int | None = None
    """The timestep of the closed form; None: the input timestep, as with all but some imported generators."""
    recommended: Recommended = field(default_factory=Recommended)
    """Settings that the generator's authors ran it with."""

    def clean(self, latent: Tensor, output: Tensor) -> Tensor:
        """The clean latent [N, C, h, w] in closed form, of the UNet's `output` for `latent` at the input timestep."""
        t = self.timestep if self.coeff_t is None else self.coeff_t
        return self.schedule.x0_from_output(self.prediction, latent, output, t)

    def with_generator(self, info: GeneratorFacts) -> BackboneDescriptor:
        """This descriptor with a generator's timesteps, prediction and recommendations.

        Raises `IcmsrError` for a timestep that the schedule does not have.
        """
        self.schedule.check_timestep(info.timestep)
        if info.coeff_t is not None:
            self.schedule.check_timestep(info.coeff_t)
        return replace(
            self,
            timestep=info.timestep,
            prediction=info.prediction,
            coeff_t=info.coeff_t,
            recommended=recommended_from("the generator", info.recommended),
        )


@runtime_checkable
class Backbone(Protocol):
    """A VAE and a UNet.

    Tensors are NCHW and may be on any device. Results are float32: latents and the UNet's outputs on the UNet's device,
    images on the VAE's, which may be another.
    """

    @property
    def descriptor(self) -> BackboneDescriptor:
        """What this backbone is and which sizes it takes."""

    def encode(self, image: Tensor) -> Tensor:
        """Scaled latent [N, C, H/f, W/f] of `image` [N, 3, H, W] in [-1, 1]: the posterior's mode, never a sample."""

    def predict_noise(self, latent: Tensor, timestep: int, features: Sequence[Tensor] | None = None) -> Tensor:
        """The UNet's raw output [N, C, h, w] for `latent` at `timestep`, whatever the descriptor says it predicts.

        `features` are a T2I-Adapter's residuals, one per level of the UNet, or None.
        """

    def decode(self, latent: Tensor) -> Tensor:
        """Image [N, 3, h*f, w*f], nominally in [-1, 1] and not clamped, of a scaled latent."""

    def vae_half(self, part: VaePart, pixels: int) -> VaeHalf:
        """The VAE's encoder or decoder as steps, ready to run over stripes that are each `pixels` of the picture.

        The results are those of `encode` and `decode`. Raises `UnknownLayer` for a VAE with layers that are not known.
        """
