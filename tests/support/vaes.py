"""Small random VAEs of diffusers' classes, pictures for them, and one half of a VAE run over stripes."""

import torch
from diffusers import AutoencoderKL

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.backbone.vae_steps import Norm, VaeHalf
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from icmsr_core.tiled_vae.modes import BoundedStream, Estimate, ExactStream, Statistics
from icmsr_core.train.networks.bases import NetworkConfig, make_unet
from tests.support.stripes import decode_in_stripes

TOLERANCE = 2e-5
"""On [-1, 1], float32; the aim is 1e-4."""


def random_vae(levels: int, attention: bool, quant: bool, layers: int = 1, channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(levels)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 24, 32)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers,
        norm_num_groups=4,
        latent_channels=channels,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        scaling_factor=0.7,
    ).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if ".to_" in name:
                parameter.mul_(3)  # attention that tells places apart
    return vae


def backbone_of(vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> DiffusersBackbone:
    channels = vae.config.latent_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    descriptor = BackboneDescriptor("toy", channels, factor, 2 * factor, 200, "residual")
    unet = make_unet(NetworkConfig(latent_channels=channels, unet_channels=(32, 32)))
    return DiffusersBackbone(unet, vae, descriptor, torch.zeros(1, 32), torch.device("cpu"), dtype)


def uneven_picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth at one end and rough at the other, so that no part has the statistics of the whole."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.linspace(0, 1, height)[:, None] * torch.linspace(0.2, 1, width)
    return 0.8 * rough * torch.rand(1, 3, height, width, generator=generator) + 0.1


def decoded(backbone: DiffusersBackbone, latent: torch.Tensor, **options) -> torch.Tensor:
    factor = backbone.descriptor.latent_factor
    out = torch.empty(1, 3, latent.shape[2] * factor, latent.shape[3] * factor)
    decode_in_stripes(backbone, latent, out, **options)
    return 2 * out - 1


def own_statistics(half: VaeHalf, source: torch.Tensor) -> dict[Norm, Statistics]:
    stream = ExactStream(half, 2)
    list(stream.through(half.steps, stream.source(source, source.shape[2])).chunks)
    return stream.statistics


def run_bounded(half: VaeHalf, source: torch.Tensor, nominal: int, known, axis=2, window=10**6, margin=0):
    estimate = known if isinstance(known, Estimate) else Estimate(known)
    stream = BoundedStream(half, axis, estimate, window, margin)
    return torch.cat(list(stream.through(half.steps, stream.source(source, nominal)).chunks), axis)
