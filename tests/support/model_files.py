"""Small model files of the real formats with random weights, for tests."""

from dataclasses import replace
from pathlib import Path

import torch

from icmsr_core.train.networks.bases import NetworkConfig, make_unet, make_vae, save_base
from icmsr_core.weights.base import BaseInfo, default_prompt_embedding, open_base
from icmsr_core.weights.generator_file import Generator, GeneratorInfo, LoraPair, PartWeights, save_generator

TINY = NetworkConfig(latent_channels=4, vae_channels=(32, 32, 32, 32), unet_channels=(32, 64), vae_groups=4)
"""Few channels, with the latent of Stable Diffusion: 4 channels, a cell for 8 x 8 pixels."""


def write_base(folder: Path, config: NetworkConfig | None = None, family: str = "nano", seed: int = 0) -> Path:
    """A base folder of nano's architecture with random weights whose biases and norms are not left at 0 and 1."""
    config = config or NetworkConfig()
    torch.manual_seed(seed)
    unet, vae = make_unet(config), make_vae(config)
    with torch.no_grad():
        for network in (unet, vae):
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    vae.register_to_config(scaling_factor=0.7)
    embedding = default_prompt_embedding(config.context_tokens, config.context_width)
    save_base(folder, unet, vae, embedding, BaseInfo("random", family, licence="CC0-1.0"), torch.float32)
    return folder


def random_generator(
    base: Path, *, prediction: str = "residual", timestep: int = 200, seed: int = 1, two_sets: bool = False
) -> Generator:
    """A generator for `base`: LoRA on some UNet modules and the VAE encoder's convolutions, two tensors whole.

    The realistic set (`two_sets`) has LoRA of another rank and alpha and whole tensors, over parameters of each kind:
    replaced, LoRA, both, and untouched by the faithful set.
    """
    folder = open_base(base)
    random = torch.Generator().manual_seed(seed)

    def pair(weight: torch.Tensor, rank: int = 4) -> LoraPair:
        down = torch.randn(rank, *weight.shape[1:], generator=random) * 0.05
        up = torch.randn(weight.shape[0], rank, *([1] * (weight.ndim - 2)), generator=random) * 0.05
        return LoraPair(down, up)

    def modules(state: dict[str, torch.Tensor], *marks: str) -> dict[str, LoraPair]:
        chosen = [key for key in state if key.endswith(".weight") and any(mark in key for mark in marks)]
        return {key[: -len(".weight")]: pair(state[key].float()) for key in chosen if state[key].ndim in (2, 4)}

    unet, vae = folder.unet_state(), folder.vae_state()
    whole = {
        key: unet[key].float() + 0.05 * torch.randn(unet[key].shape, generator=random)
        for key in ("conv_in.weight", "conv_in.bias")
    }
    lora = modules(unet, "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "ff.net", "proj_")
    info = GeneratorInfo("nano", timestep, prediction, "random", folder.hash(), rank=4, alpha=4.0, licence="CC0-1.0")
    embedding = folder.prompt_embedding()
    generator = Generator(
        info, PartWeights(lora, whole), PartWeights(modules(vae, "encoder.", "quant_conv")), embedding
    )
    if not two_sets:
        return generator

    def near(state: dict[str, torch.Tensor], *keys: str) -> dict[str, torch.Tensor]:
        return {key: state[key].float() + 0.05 * torch.randn(state[key].shape, generator=random) for key in keys}

    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    pairs = {
        name: pair(unet[f"{name}.weight"].float(), rank=2)
        for name in ("conv_in", "conv_out", f"{attention}.to_q", f"{attention}.to_k", "mid_block.resnets.0.conv1")
    }
    tensors = near(
        unet,
        "conv_in.weight",
        f"{attention}.to_q.weight",
        f"{attention}.to_v.weight",
        "conv_norm_out.weight",
        "conv_out.bias",
    )
    vae_pairs = {
        name: pair(vae[f"{name}.weight"].float(), rank=2)
        for name in ("quant_conv", "encoder.mid_block.resnets.0.conv1")
    }
    realistic = {
        "unet": PartWeights(pairs, tensors),
        "vae": PartWeights(vae_pairs, near(vae, "encoder.conv_in.weight", "decoder.conv_in.bias")),
    }
    info = replace(info, realistic_rank=2, realistic_alpha=3.0, realistic_training={"loss": "icm"}, format_version=2)
    return replace(generator, info=info, realistic=realistic)


def write_generator(path: Path, base: Path, **options) -> Path:
    """`random_generator` as a file, in float32 so that parity tests see no rounding."""
    save_generator(path, random_generator(base, **options), torch.float32)
    return path
