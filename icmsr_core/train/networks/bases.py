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
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ...backbone.narrow_maps import mend_narrow_maps
from ...errors import IcmsrError
from ...weights.base import PROMPT_FILE, BaseInfo, write_base_info
from ...weights.diffusers_folder import WEIGHTS_FILE, write_configuration
from ...weights.tensor_files import write_tensors


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
    unet_self_attention: bool = True
    """Whether the attention blocks look at other places of the picture, and not only at the context. Without it, the
    middle is one residual block and only convolutions mix places: no cost grows with the square of the cells, and
    attention does not meet more cells at inference than in training."""
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


@dataclass(frozen=True)
class BaseNetworks:
    """A base in memory: its networks, and what it says of itself."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    info: BaseInfo


CONSTANT = 2.0
"""Level of the constant channels of `start_as_thumbnail`: above what pictures in [-1, 1] reach."""


def make_vae(config: NetworkConfig) -> AutoencoderKL:
    """An AutoencoderKL without attention in its middle, that begins as a thumbnail codec (`start_as_thumbnail`)."""
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
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
    mend_narrow_maps(vae)
    start_as_thumbnail(vae)
    return vae


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> None:
    """Weights with which an untrained `vae` keeps the mean of every cell in its latent, decoded smoothly (ours).

    With the usual random weights a small AutoencoderKL spends a thousand steps on finding out how to pass on a plain
    colour, because its GroupNorms take the mean out of everything. Here residual blocks begin as the identity (their
    second convolution is zero), the others as averaging, interpolation and plain copies of the first channels, which
    hold R, G, B and -R, -G, -B. The rest begins with constants that outweigh a picture, so that the last GroupNorm
    divides by nearly the same number whatever it shows, and silu(x) - silu(-x) = x makes a straight line of the last
    activation. Random weights remain in the residual blocks' first convolutions and in the other channels.
    Raises `IcmsrError` when a group of the GroupNorms has fewer than eight channels.
    """
    group = min(vae.config.block_out_channels) // vae.config.norm_num_groups
    if group < 8:
        raise IcmsrError(f"a group of the VAE's GroupNorms must have 8 channels or more, got {group}: use fewer groups")
    middle = torch.zeros(3, 3)
    middle[1, 1] = 1.0
    box, tent = torch.zeros(3, 3), torch.tensor([0.25, 0.5, 0.25])
    box[:2, :2] = 0.25  # the convolution of a Downsample2D looks at rows and columns 0, 1, 2 from its place
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _fill(module.conv2)
            if module.conv_shortcut is not None:
                _fill(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            _fill(module.conv, box)
        elif isinstance(module, Upsample2D):
            _fill(module.conv, torch.outer(tent, tent))
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.weight[:6] = 0.0
        for channel in range(3):
            conv.weight[channel, channel] = middle
            conv.weight[3 + channel, channel] = -middle
        conv.bias[:6] = 0.0
        conv.bias[6::2], conv.bias[7::2] = CONSTANT, -CONSTANT
    for part in (vae.encoder, vae.decoder):
        width = part.conv_norm_out.num_channels // part.conv_norm_out.num_groups
        deviation = ((width - 6) / width * CONSTANT**2 + 6 / width * 0.2) ** 0.5  # 0.2: a photograph's mean square
        part.conv_out.bias.zero_()
        part.conv_out.weight[:3] = 0.0
        for channel in range(3):
            part.conv_out.weight[channel, channel] = deviation * middle
            part.conv_out.weight[channel, 3 + channel] = -deviation * middle
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _fill(conv, torch.ones(1, 1))


def _fill(conv: nn.Conv2d, taps: Tensor | None = None) -> None:
    """Each channel from the one of its number through `taps`, the channels beyond nothing; all zero without `taps`."""
    for parameter in conv.parameters():
        parameter.zero_()
    if taps is not None:
        for channel in range(min(conv.weight.shape[:2])):
            conv.weight[channel, channel] = taps


def make_unet(config: NetworkConfig) -> UNet2DConditionModel:
    """A UNet2DConditionModel with random weights, in Stable Diffusion's block layout."""
    attending = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_channels,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        attention_head_dim=[width // config.head_width for width in config.unet_channels],
        only_cross_attention=[not config.unet_self_attention] * len(config.unet_channels),
        # Diffusers' usual middle attends to itself whatever `only_cross_attention` says; this one is a residual block.
        mid_block_type="UNetMidBlock2DCrossAttn" if config.unet_self_attention else "UNetMidBlock2D",
        cross_attention_dim=config.context_width,
        use_linear_projection=True,
    )
    mend_narrow_maps(unet)
    return unet


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
        write_configuration(folder / part, network)
        state = {key: value.detach().to("cpu", dtype) for key, value in network.state_dict().items()}
        write_tensors(folder / part / WEIGHTS_FILE, state, {"format": "pt"})
    embedding = {"prompt_embedding": prompt_embedding.detach().cpu().float()}
    write_tensors(folder / PROMPT_FILE, embedding, {"format": "pt"})
    write_base_info(folder, info)
