"""Second half of a prior: a UNet that predicts the noise in latents of sharp pictures, without text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbone.context import repeated_context
from ...pictures.ranges import bytes_to_signed
from ...runtime.latents import decode_latent, encode_picture
from ..data.draws import all_timesteps, draw_noising
from ..losses.diagnostics import BinnedMeans
from ..networks.bases import BaseNetworks, save_base
from ..networks.roles import predict
from .task import Batch, Player, Task, latent_shape, stack_rows

HELD_OUT_TIMESTEPS = (25, 100, 200, 350, 500, 700)
"""Where the error on held-out photographs is measured: t of a schedule of 1000 steps."""


class PriorTask(Task):
    """The plain diffusion loss (Ho et al. 2020, equation 14) in the latent of a frozen VAE."""

    context: Tensor

    def __init__(
        self,
        networks: BaseNetworks,
        context: Tensor,
        seed: int,
        held_out: Tensor | None = None,
    ) -> None:
        """`context` [tokens, width] is the constant prompt embedding, which the exported base keeps. `held_out`
        [N, C, h, w] are scaled latents that training does not see, for `measure`."""
        super().__init__()
        self.held_out = held_out
        self.unet, self.vae, self.info, self.seed = networks.unet, networks.vae, networks.info, seed
        self.schedule = self.info.schedule
        self.vae.requires_grad_(False)
        self.register_buffer("context", context, persistent=False)
        self.meter = BinnedMeans(self.schedule.steps)

    def players(self) -> Sequence[Player]:
        """See `Task`."""
        return [Player("weights", dict(self.unet.named_parameters()))]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """See `Task`."""
        latent = batch.get("latent")
        shape = latent_shape(self.vae, batch["sharp"]) if latent is None else tuple(latent.shape[1:])
        noising = draw_noising(self.seed, batch["index"], "prior", shape, self.schedule.steps, all_timesteps())
        return {**batch, **noising}

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
        eps = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent.device)
        rows = [decode_latent(self.vae, latent)]
        for level in (0.1, 0.3, 0.6):
            t = torch.full((latent.shape[0],), int(level * self.schedule.steps), device=latent.device)
            noisy = self.schedule.add_noise(latent, eps, t)
            rows.append(decode_latent(self.vae, self.schedule.x0_from_output("eps", noisy, self._predict(noisy, t), t)))
        return stack_rows(*rows)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``loss/held_out/T``: the error on the held-out latents at the timestep T, always under the same noise."""
        if self.held_out is None:
            return {}
        errors = {}
        for timestep in HELD_OUT_TIMESTEPS:
            generator = torch.Generator().manual_seed(timestep)
            sums = [self._squared_error(part, timestep, generator) for part in self.held_out.split(16)]
            errors[f"loss/held_out/{timestep}"] = float(torch.stack(sums).sum()) / self.held_out.numel()
        return errors

    def export(self, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
        """The base folder ``base`` in `folder`."""
        base = folder / "base"
        save_base(base, self.unet, self.vae, self.context.cpu(), self.info)
        return [base]

    def _squared_error(self, latent: Tensor, timestep: int, generator: torch.Generator) -> Tensor:
        eps = torch.randn(latent.shape, generator=generator).to(self.context.device)
        t = torch.full((len(latent),), timestep, device=eps.device)
        output = self._predict(self.schedule.add_noise(latent.to(eps.device), eps, t), t)
        return (output.float() - eps).square().sum()

    @torch.no_grad()
    def _latent(self, batch: Batch) -> Tensor:
        if "latent" in batch:
            return batch["latent"]
        return encode_picture(self.vae, bytes_to_signed(batch["sharp"]))

    def _predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        return predict(self.unet, noisy, t, repeated_context(self.context, noisy), None)
