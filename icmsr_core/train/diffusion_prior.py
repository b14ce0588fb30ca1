"""Second half of a prior: a UNet that predicts the noise in latents of sharp pictures, without text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ..base_folder import BaseInfo
from ..noise_schedule import NoiseSchedule
from .draws import draw_noising
from .icm import BinnedMeans, all_timesteps
from .networks import save_base
from .roles import predict
from .task import Batch, Player, Task, latent_shape, stack_rows, to_signed


class PriorTask(Task):
    """The plain diffusion loss (Ho et al. 2020, equation 14) in the latent of a frozen VAE."""

    context: Tensor

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, prompt_embedding: Tensor, schedule: NoiseSchedule,
        info: BaseInfo, seed: int,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.schedule, self.info, self.seed = unet, vae, schedule, info, seed
        self.vae.requires_grad_(False)
        self.register_buffer("context", prompt_embedding, persistent=False)
        self.meter = BinnedMeans(schedule.steps)

    def players(self) -> Sequence[Player]:
        """See `Task`."""
        return [Player("weights", dict(self.unet.named_parameters()))]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """See `Task`."""
        shape, device = latent_shape(self.vae, batch["sharp"]), batch["sharp"].device
        return {
            **batch,
            **draw_noising(self.seed, batch["index"], "prior", shape, self.schedule.steps, all_timesteps(), device),
        }

    def forward(self, player: str, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """See `Task`."""
        t, eps = batch["t"], batch["eps"]
        output = self._predict(self.schedule.add_noise(self._latent(batch), eps, t), t)
        assert self.meter is not None
        self.meter.add({"mse": (output.detach() - eps).square().flatten(1).mean(1)}, t)
        return {"loss": F.mse_loss(output, eps)}, {}

    @torch.no_grad()
    def grid(self, batch: Batch) -> Tensor:
        """Truth, then the clean estimate from three noise levels, row by row."""
        latent = self._latent(batch)
        eps = torch.randn(latent.shape, generator=torch.Generator(latent.device).manual_seed(0), device=latent.device)
        rows = [self._decode(latent)]
        for level in (0.1, 0.3, 0.6):
            t = torch.full((latent.shape[0],), int(level * self.schedule.steps), device=latent.device)
            noisy = self.schedule.add_noise(latent, eps, t)
            rows.append(self._decode(self.schedule.x0_from_output("eps", noisy, self._predict(noisy, t), t)))
        return stack_rows(*rows)

    def export(self, folder: Path) -> list[Path]:
        """The base folder ``base`` in `folder`."""
        base = folder / "base"
        save_base(base, self.unet, self.vae, self.context.cpu(), self.info)
        return [base]

    @torch.no_grad()
    def _latent(self, batch: Batch) -> Tensor:
        return self.vae.encode(to_signed(batch["sharp"])).latent_dist.mode().float() * self.vae.config.scaling_factor

    def _predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        context = self.context.to(noisy)[None].expand(noisy.shape[0], -1, -1)
        return predict(self.unet, noisy, t, context, None)

    def _decode(self, latent: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent / self.vae.config.scaling_factor).sample
        return image
