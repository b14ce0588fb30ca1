"""First half of a prior: the autoencoder whose latent everything else lives in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...pictures.ranges import bytes_to_signed
from ...runtime.latents import encode_picture, posterior_mode
from ..losses.reconstruction import charbonnier, gradient_l1, psnr
from ..losses.spectra import fourier_l1
from .task import Batch, Player, Task, stack_rows


@dataclass(frozen=True)
class AutoencoderLosses:
    """Weights of the autoencoder's losses."""

    gradient: float = 0.5
    """Weight of the L1 of image gradients."""
    fourier: float = 0.05
    """Weight of the L1 of Fourier magnitudes."""
    latent: float = 1e-4
    """Weight of the latent's mean square: keeps its scale from drifting."""


class AutoencoderTask(Task):
    """Trains an AutoencoderKL to reproduce sharp pictures from the mode of its posterior.

    Nothing here ever samples the posterior, so its variance is left untrained: sampling while training cost this small
    network several times as many steps for the same quality.
    """

    def __init__(self, vae: AutoencoderKL, losses: AutoencoderLosses) -> None:
        super().__init__()
        self.vae, self.weights = vae, losses

    def players(self) -> Sequence[Player]:
        """See `Task`."""
        return [Player("weights", dict(self.vae.named_parameters()))]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """See `Task`."""
        return batch

    def forward(self, player: str, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """See `Task`."""
        truth = bytes_to_signed(batch["sharp"])
        latent = posterior_mode(self.vae, truth).float()
        result = self.vae.decode(latent).sample.float()
        pixel, gradient = charbonnier(result, truth), gradient_l1(result, truth)
        fourier = fourier_l1(result, truth)
        size = latent.square().mean()
        weights = self.weights
        loss = pixel + weights.gradient * gradient + weights.fourier * fourier + weights.latent * size
        return {
            "loss": loss,
            "pixel": pixel,
            "gradient": gradient,
            "fourier": fourier,
            "latent": size,
            "psnr": psnr(result, truth),
        }, {}

    def grid(self, batch: Batch) -> Tensor:
        """Truth above, reconstruction (of the posterior's mode) below."""
        truth = bytes_to_signed(batch["sharp"])
        result = self.vae.decode(posterior_mode(self.vae, truth)).sample
        return stack_rows(truth, result)

    def export(self, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
        """Nothing: the weights go on into the second half in memory."""
        return []


@torch.no_grad()
def normalise_latent(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Gives every latent channel of `pictures` [N, 3, H, W] in [-1, 1] mean 0 and standard deviation 1 (ours).

    A scaling factor alone gives the latent as a whole a deviation of one. The noise of the diffusion then drowns the
    channels with little spread, which hold the detail, long before the others. The change goes into the VAE's 1x1
    convolutions, `quant_conv` and `post_quant_conv`, so decoded pictures stay the same; the scaling factor becomes 1.
    Returns the former means [C] and deviations [C], in units of the former scaling factor.
    """
    old = float(vae.config.scaling_factor)
    latent = torch.cat([encode_picture(vae, part) for part in pictures.split(8)])
    mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    gain, shape = old / deviation, (-1, 1, 1, 1)
    quant.weight[:channels] *= gain.view(shape)
    quant.bias[:channels] = quant.bias[:channels] * gain - mean / deviation
    quant.bias[channels:] += 2 * gain.log()  # the posterior's log variance
    post.bias += post.weight[:, :, 0, 0] @ (mean / old)
    post.weight /= gain.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)
    return mean, deviation
