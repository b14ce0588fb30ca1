"""First half of a prior: the autoencoder whose latent everything else lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .loop import Batch
from .reconstruction import charbonnier, fourier_l1, gradient_l1


@dataclass(frozen=True)
class AutoencoderLosses:
    """Weights of the autoencoder's losses."""

    gradient: float = 0.5
    """Weight of the L1 of image gradients."""
    fourier: float = 0.05
    """Weight of the L1 of Fourier magnitudes."""
    latent: float = 1e-4
    """Weight of the latent's mean square: keeps its scale from drifting."""


class AutoencoderTask:
    """Trains an AutoencoderKL to reproduce sharp pictures from the mode of its posterior.

    Nothing here ever samples the posterior, so its variance is left untrained: sampling while training cost this small
    network several times as many steps for the same quality.
    """

    def __init__(self, vae: AutoencoderKL, losses: AutoencoderLosses) -> None:
        self.vae, self.weights = vae, losses

    def modules(self) -> Mapping[str, nn.Module]:
        """See `Task`."""
        return {"vae": self.vae}

    def losses(self, batch: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """See `Task`."""
        truth = batch["sharp"].float() / 127.5 - 1
        latent = self.vae.encode(truth).latent_dist.mode().float()
        result = self.vae.decode(latent).sample.float()
        pixel, gradient = charbonnier(result, truth), gradient_l1(result, truth)
        fourier = fourier_l1(result, truth)
        size = latent.square().mean()
        weights = self.weights
        loss = pixel + weights.gradient * gradient + weights.fourier * fourier + weights.latent * size
        mse = (result.clamp(-1, 1) - truth).square().mean().detach() / 4
        return {"loss": loss, "pixel": pixel, "gradient": gradient, "fourier": fourier, "latent": size,
                "psnr": -10 * mse.log10()}

    def grid(self, batch: Batch) -> Tensor:
        """Truth above, reconstruction (of the posterior's mode) below."""
        truth = batch["sharp"][:6].float() / 127.5 - 1
        result = self.vae.decode(self.vae.encode(truth).latent_dist.mode()).sample
        return stack_rows(truth, result)

    def export(self, run: Path) -> list[Path]:
        """Nothing: the weights go on into the second half in memory."""
        return []


def stack_rows(*rows: Tensor) -> Tensor:
    """Batches [N, 3, H, W] in [-1, 1] as one picture [3, rows * H, N * W] in [0, 1]."""
    return torch.cat([torch.cat(list(row.float()), dim=-1) for row in rows], dim=-2).add(1).div(2).clamp(0, 1)


@torch.no_grad()
def measure_scaling(vae: AutoencoderKL, pictures: Tensor) -> float:
    """The scaling factor that gives latents of `pictures` [N, 3, H, W] in [-1, 1] a standard deviation of one."""
    return 1.0 / float(vae.encode(pictures).latent_dist.mode().float().std())
