"""Tiny VAEs as they are published, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file


def write_tiny_folder(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A diffusers folder as madebyollin/taesd is: TAESD's sizes but for what `config` says."""
    torch.manual_seed(seed)
    vae = AutoencoderTiny(**config)
    with torch.no_grad():
        for parameter in vae.parameters():
            # So that results differ by about as much as pictures do.
            parameter.mul_(1.6 if parameter.ndim > 1 else 1).add_(0.02 * torch.randn_like(parameter))
        vae.decoder.layers[-1].bias.add_(0.5)
    vae.save_pretrained(folder)
    return folder


def write_tiny_pair(target: Path, folder: Path) -> Path:
    """The weights of the diffusers folder `folder` as TAESD's own two files in `target`, in ComfyUI's layout too.

    Encoder: the same numbers. Decoder: one more, for the clamp before the first convolution.
    """
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    target.mkdir(parents=True)
    for part, shift in (("encoder", 0), ("decoder", 1)):
        own = {}
        for key, tensor in state.items():
            if key.startswith(f"{part}.layers."):
                number, rest = key.removeprefix(f"{part}.layers.").split(".", 1)
                own[f"{int(number) + shift}.{rest}"] = tensor
        save_file(own, target / f"taesd_{part}.safetensors")
    return target
