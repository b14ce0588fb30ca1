"""Small networks of the diffusers classes in Stable Diffusion's block layout, made from scratch.

The layout is what ComfyUI's native classes can also build: every down block but the last with attention, two
residual blocks per level (a T2I-Adapter's residuals fit nowhere else), widths that are whole multiples of the
first and of 32, because ComfyUI's GroupNorms are built with 32 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ..base_folder import PROMPT_FILE, WEIGHTS_FILE, BaseInfo, write_base_info
from ..errors import IcmsrError
from ..generator_file import write_atomically


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a small VAE and UNet; the defaults are nano's."""

    latent_channels: int = 12
    """Channels of the latent."""
    vae_channels: tuple[int, ...] = (32, 32, 64, 96)
    """Width of each VAE level; the latent factor is 2 to the number of levels less one."""
    vae_layers: int = 1
    """Residual blocks per VAE level (the decoder has one more)."""
    vae_groups: int = 4
    """Groups of the VAE's GroupNorms: few, so that statistics of small crops and whole pictures agree."""
    unet_channels: tuple[int, ...] = (64, 128)
    """Width of each UNet level, whole multiples of the first."""
    head_width: int = 32
    """Channels per attention head."""
    context_width: int = 32
    """Width of the constant context."""
    context_tokens: int = 1
    """Tokens of the constant context."""

    def __post_init__(self) -> None:
        for name, widths in (("vae_channels", self.vae_channels), ("unet_channels", self.unet_channels)):
            if len(widths) < 2 or any(width % 32 or width % widths[0] for width in widths):
                raise IcmsrError(f"{name} must be two or more multiples of 32 and of the first, got {widths}")
        if any(width % self.vae_groups for width in self.vae_channels):
            raise IcmsrError(f"vae_groups must divide every VAE width, got {self.vae_groups} for {self.vae_channels}")


def make_vae(config: NetworkConfig) -> AutoencoderKL:
    """An AutoencoderKL with random weights and no attention in its middle."""
    levels = len(config.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=config.latent_channels,
        block_out_channels=config.vae_channels,
        layers_per_block=config.vae_layers,
        norm_num_groups=config.vae_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def make_unet(config: NetworkConfig) -> UNet2DConditionModel:
    """A UNet2DConditionModel with random weights, in Stable Diffusion's block layout."""
    attending = len(config.unet_channels) - 1
    return UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_channels,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        attention_head_dim=[width // config.head_width for width in config.unet_channels],
        cross_attention_dim=config.context_width,
        use_linear_projection=True,
    )


def save_base(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    prompt_embedding: Tensor,
    info: BaseInfo,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a base folder (see `base_folder`): diffusers configurations, weights in `dtype`, prompt embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, network in (("unet", unet), ("vae", vae)):
        network.save_config(folder / part)
        state = {key: value.detach().to("cpu", dtype) for key, value in network.state_dict().items()}
        write_atomically(folder / part / WEIGHTS_FILE, state, {"format": "pt"})
    embedding = {"prompt_embedding": prompt_embedding.detach().cpu().float()}
    write_atomically(folder / PROMPT_FILE, embedding, {"format": "pt"})
    write_base_info(folder, info)
