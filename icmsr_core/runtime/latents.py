"""Latents of diffusers' VAEs: pictures in [-1, 1] to the scaled latent that the UNet sees, and back.

The posterior's mode, never a sample, so that a picture always has the same latent. Works on the objects, so it needs no
diffusers itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def posterior_mode(vae: Any, image: Tensor) -> Tensor:
    """The unscaled latent [N, C, h, w] of `image` [N, 3, H, W] in [-1, 1], in the type that the VAE computes in.

    `vae` is an AutoencoderKL, or an AutoencoderTiny, whose encoder gives the latent itself.
    """
    found = vae.encode(image)
    latent: Tensor = found.latents if "latents" in found else found.latent_dist.mode()
    return latent


def encode_picture(vae: Any, image: Tensor) -> Tensor:
    """The scaled latent [N, C, h, w], float32, of `image` [N, 3, H, W] in [-1, 1]."""
    return posterior_mode(vae, image).float() * vae.config.scaling_factor


def decode_latent(vae: Any, latent: Tensor) -> Tensor:
    """The picture [N, 3, H, W], float32, nominally in [-1, 1] and not clamped, of a scaled `latent` [N, C, h, w]."""
    image: Tensor = vae.decode(latent / vae.config.scaling_factor).sample
    return image.float()
