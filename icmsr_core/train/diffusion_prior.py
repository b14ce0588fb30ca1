"""Second half of a prior: a UNet that predicts the noise in latents of sharp pictures, without text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..base_folder import BaseInfo
from ..noise_schedule import NoiseSchedule
from .autoencoder import stack_rows
from .loop import Batch
from .networks import save_base


class PriorTask:
    """The plain diffusion loss (Ho et al. 2020, equation 14) in the latent of a frozen VAE."""

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, prompt_embedding: Tensor, schedule: NoiseSchedule,
        info: BaseInfo,
    ) -> None:
        self.unet, self.vae, self.schedule, self.info = unet, vae, schedule, info
        self.vae.requires_grad_(False)
        self.context = prompt_embedding

    def modules(self) -> Mapping[str, nn.Module]:
        """See `Task`."""
        return {"unet": self.unet}

    def losses(self, batch: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """See `Task`."""
        latent = self._latent(batch)
        eps = torch.randn(latent.shape, generator=random, device=latent.device)
        t = torch.randint(self.schedule.steps, (latent.shape[0],), generator=random, device=latent.device)
        output = self._predict(self.schedule.add_noise(latent, eps, t), t)
        return {"loss": F.mse_loss(output.float(), eps)}

    @torch.no_grad()
    def grid(self, batch: Batch) -> Tensor:
        """Truth, then the clean estimate from three noise levels, row by row."""
        latent = self._latent(batch)[:6]
        eps = torch.randn(latent.shape, generator=torch.Generator(latent.device).manual_seed(0), device=latent.device)
        rows = [self._decode(latent)]
        for level in (0.1, 0.3, 0.6):
            t = torch.full((latent.shape[0],), int(level * self.schedule.steps), device=latent.device)
            noisy = self.schedule.add_noise(latent, eps, t)
            rows.append(self._decode(self.schedule.x0_from_output("eps", noisy, self._predict(noisy, t).float(), t)))
        return stack_rows(*rows)

    def export(self, run: Path) -> list[Path]:
        """The base folder ``base`` in the run folder."""
        folder = run / "base"
        save_base(folder, self.unet, self.vae, self.context.cpu(), self.info)
        return [folder]

    @torch.no_grad()
    def _latent(self, batch: Batch) -> Tensor:
        sharp = batch["sharp"].float() / 127.5 - 1
        return self.vae.encode(sharp).latent_dist.mode().float() * self.vae.config.scaling_factor

    def _predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        context = self.context.to(noisy)[None].expand(noisy.shape[0], -1, -1)
        output: Tensor = self.unet(noisy, t, encoder_hidden_states=context).sample
        return output

    def _decode(self, latent: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent / self.vae.config.scaling_factor).sample
        return image
