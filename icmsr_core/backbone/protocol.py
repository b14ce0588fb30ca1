"""The protocol of the networks that a one-step generator runs on: a VAE and a UNet.

There are two implementations: `runtime/diffusers_backbone.py` (library, command line, training) and
`nodes/native/backbone.py` (ComfyUI's MODEL and VAE). `upscale/one_step.py` works with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .noise_schedule import NoiseSchedule
from .prediction import Prediction
from .vae_steps import VaeHalf, VaePart


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
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Precisions in which the networks are known to give finite, correct results, best first. Others are never chosen,
    only computed in when the user asks for them."""


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
