"""Small autoencoders and restorers against each other, at one budget of CPU time: the tables of docs/nano.md.

    python benchmarks/nano_networks.py --photos PHOTOS --seconds 100 f8x12 f8x32 f4x8
    python benchmarks/nano_networks.py --photos PHOTOS --seconds 150 --task restoration --random f8x12 f4x8

Every network trains alone on one thread (crops of 96 px, eight a step), then meets 12 photographs that it never saw.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from _command_line import run_benchmark
from diffusers import AutoencoderKL
from torch import Tensor

from icmsr_core.backbone.context import repeated_context
from icmsr_core.measures.metrics import dss, fsim, high_frequency_ratio, psnr_y
from icmsr_core.pictures.files import from_tensor
from icmsr_core.pictures.ranges import bytes_to_signed, bytes_to_unit, signed_to_unit, unit_to_signed
from icmsr_core.runtime.latents import posterior_mode
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.losses.reconstruction import charbonnier, gradient_l1, with_low_frequencies
from icmsr_core.train.losses.spectra import fourier_l1
from icmsr_core.train.networks.bases import NetworkConfig, make_unet, make_vae
from icmsr_core.upscale.sizes import resize

NETWORKS = {
    "f8x12": NetworkConfig(latent_channels=12),
    "f8x32": NetworkConfig(latent_channels=32),
    "f4x8": NetworkConfig(latent_channels=8, vae_channels=(32, 64, 96), unet_channels=(32, 64)),
    "f4x8s": NetworkConfig(8, (32, 32, 64), unet_channels=(64, 128), unet_self_attention=False),
    "f4x8m": NetworkConfig(8, (32, 64, 96), unet_channels=(64, 128), unet_self_attention=False),
    "f4x16s": NetworkConfig(16, (32, 32, 64), unet_channels=(64, 128), unet_self_attention=False),
}
BATCH, CROP, SIZE, PICTURES, HOLD_OUT = 8, 96, 256, 12, 0.06


def main() -> int:
    """Trains each network that is named, prints its line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=sorted(NETWORKS))
    parser.add_argument("--photos", required=True, help="folder of photographs")
    parser.add_argument("--seconds", type=float, default=100, help="CPU time of each training")
    parser.add_argument("--task", default="autoencoder", choices=("autoencoder", "restoration"))
    parser.add_argument("--rate", type=float, default=6e-4, help="learning rate at its peak")
    parser.add_argument("--random", action="store_true", help="usual random weights, not the thumbnail start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {options.task} | steps | PSNR-Y | FSIM | DSS | hf ratio | PSNR, RGB | mean colour, /255 |")
    print(f"|---|{'---:|' * 7}")
    for name in options.networks:
        steps, values = measure(NETWORKS[name], options)
        print(f"| {name} | {steps} | " + " | ".join(f"{value:.4g}" for value in values) + " |", flush=True)
    return 0


def measure(config: NetworkConfig, options: argparse.Namespace) -> tuple[int, list[float]]:
    """Steps done, and the means over the pictures."""
    torch.manual_seed(0)
    vae, unet = make_vae(config), make_unet(config)
    if options.random:
        vae = AutoencoderKL.from_config(dict(vae.config))
    vae.to(memory_format=torch.channels_last)
    restores = options.task == "restoration"
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    context, t = torch.zeros(config.context_tokens, config.context_width), torch.tensor([200])

    def run(sharp: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        latent = posterior_mode(vae, given if restores else sharp)
        if restores:
            latent = latent - unet(latent, t.expand(len(latent)), repeated_context(context, latent)).sample
        raw = vae.decode(latent).sample
        return raw, with_low_frequencies(raw, given) if restores else raw

    def data(crop: int, light: float, held_out: bool) -> TrainingPairs:
        folders = (str(Path(options.photos)),)
        return TrainingPairs(
            DataConfig(
                folders=folders,
                hold_out=HOLD_OUT,
                crop=crop,
                synthetic=0.0 if held_out else 0.1,
                degradation_weights=(light, 1 - light),
            ),
            0,
            held_out=held_out,
        )

    parameters = [*vae.parameters(), *(unet.parameters() if restores else ())]
    steps = train(run, data(CROP, 0.8, False), parameters, options)
    pairs, rows = data(SIZE, 1.0, True), []
    with torch.no_grad():
        for index in range(PICTURES):
            sharp, given = batch(pairs, [index])
            result = run(sharp, given)[1]
            shown, truth = (from_tensor(signed_to_unit(picture.clamp(-1, 1))) for picture in (result, sharp))
            rows.append(
                (
                    psnr_y(shown, truth),
                    fsim(shown, truth),
                    dss(shown, truth),
                    high_frequency_ratio(shown, truth),
                    -10 * math.log10(float(((shown - truth) ** 2).mean())),
                    255 * float(np.abs(shown.mean((0, 1)) - truth.mean((0, 1))).mean()),
                )
            )
    return steps, np.mean(rows, axis=0).tolist()


def train(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    pairs: TrainingPairs,
    parameters: list[torch.nn.Parameter],
    options: argparse.Namespace,
) -> int:
    """Trains until the CPU time is spent, the making of samples not counted; returns the steps."""
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0)
    spent, steps = 0.0, 0
    while spent < options.seconds:
        sharp, given = batch(pairs, range(steps * BATCH, (steps + 1) * BATCH))
        started = time.process_time()
        fall = (1 + math.cos(math.pi * spent / options.seconds)) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, (steps + 1) / 20) * fall
        raw, result = run(sharp, given)
        loss = charbonnier(result, sharp) + gradient_l1(result, sharp) + 0.05 * fourier_l1(result, sharp)
        (loss + 0.1 * charbonnier(raw, sharp)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent, steps = spent + time.process_time() - started, steps + 1
    return steps


def batch(pairs: TrainingPairs, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sharp pictures, and the degraded ones at their size, both in [-1, 1]."""
    samples = [pairs[index] for index in indices]
    sharp, low = (torch.stack([sample[name] for sample in samples]) for name in ("sharp", "low"))
    return bytes_to_signed(sharp), unit_to_signed(resize(bytes_to_unit(low), *sharp.shape[-2:]))


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
