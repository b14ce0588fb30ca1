"""First half of a prior: the autoencoder whose latent everything else lives in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .reconstruction import charbonnier, fourier_l1, gradient_l1
from .task import Batch, Player, Task, stack_rows, to_signed


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
        truth = to_signed(batch["sharp"])
        latent = self.vae.encode(truth).latent_dist.mode().float()
        result = self.vae.decode(latent).sample.float()
        pixel, gradient = charbonnier(result, truth), gradient_l1(result, truth)
        fourier = fourier_l1(result, truth)
        size = latent.square().mean()
        weights = self.weights
        loss = pixel + weights.gradient * gradient + weights.fourier * fourier + weights.latent * size
        mse = (result.clamp(-1, 1) - truth).square().mean().detach() / 4
        return {"loss": loss, "pixel": pixel, "gradient": gradient, "fourier": fourier, "latent": size,
                "psnr": -10 * mse.log10()}, {}

    def grid(self, batch: Batch) -> Tensor:
        """Truth above, reconstruction (of the posterior's mode) below."""
        truth = to_signed(batch["sharp"])
        result = self.vae.decode(self.vae.encode(truth).latent_dist.mode()).sample
        return stack_rows(truth, result)

    def export(self, folder: Path) -> list[Path]:
        """Nothing: the weights go on into the second half in memory."""
        return []


@torch.no_grad()
def measure_scaling(vae: AutoencoderKL, pictures: Tensor) -> float:
    """The scaling factor that gives latents of `pictures` [N, 3, H, W] in [-1, 1] a standard deviation of one."""
    return 1.0 / float(vae.encode(pictures).latent_dist.mode().float().std())
