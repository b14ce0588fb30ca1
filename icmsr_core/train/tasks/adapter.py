"""Training of the T2I-Adapter that gives teacher and auxiliary their eyes, on a frozen base (arXiv 2302.08453).

The plain diffusion loss on latents of sharp pictures, with the features of their own structure; timesteps are cubic,
because structure is decided at high noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import T2IAdapter
from torch import Tensor

from ...backbone.context import repeated_context
from ...errors import IcmsrError
from ...pictures.ranges import bytes_to_signed, bytes_to_unit, unit_to_signed
from ...runtime.latents import decode_latent, encode_picture
from ...weights.base import BaseFolder
from ..data.draws import TimestepConfig, all_timesteps, draw_noise, draw_noising, draw_uniform
from ..losses.diagnostics import BinnedMeans
from ..networks.adapters import save_adapter
from ..networks.bases import BaseNetworks
from ..networks.conditioning import WITHOUT_ADAPTER, StructureConfig
from ..networks.roles import predict
from ..settings import shareable
from .task import Batch, Player, Task, latent_shape, stack_rows

GRID_LEVELS = (0.3, 0.6, 0.9)
"""Noise levels, as shares of T, at which the sample grid shows the teacher's clean estimate."""


@dataclass(frozen=True)
class AdapterConfig(StructureConfig):
    """The adapter and what it is trained for."""

    dropout: float = 0.0
    """Share of samples that see no condition. They train nothing here, the base being frozen; with guidance over the
    condition they keep the features moderate."""
    timesteps: TimestepConfig = field(default_factory=lambda: all_timesteps("cubic"))
    """Where timesteps are drawn."""
    checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, more time."""
    base_dtype: str = "fp32"
    """Precision of the frozen base, fp32 or bf16; the adapter is float32 in either."""
    licence: str = "Apache-2.0"
    """Licence of the exported weights (SPDX)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind in WITHOUT_ADAPTER:
            raise IcmsrError(f"the condition {self.kind} has no adapter to train: choose icm, colormap, edges, ...")
        if not 0 <= self.dropout < 1:
            raise IcmsrError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.base_dtype not in ("fp32", "bf16"):
            raise IcmsrError(f"base_dtype must be fp32 or bf16, got {self.base_dtype!r}")


class AdapterTask(Task):
    """Trains a T2I-Adapter by the error that the frozen base makes with its features."""

    context: Tensor

    def __init__(
        self,
        adapter: T2IAdapter,
        networks: BaseNetworks,
        context: Tensor,
        base: BaseFolder,
        config: AdapterConfig,
        seed: int,
    ) -> None:
        """`context` [tokens, width] is the base's constant prompt, embedded."""
        super().__init__()
        unet, vae = networks.unet.requires_grad_(False), networks.vae.requires_grad_(False)
        self.adapter, self.unet, self.vae = adapter, unet, vae
        self.base, self.config, self.seed = base, config, seed
        self.schedule, self.prediction = base.schedule, base.info.prediction
        self.register_buffer("context", context, persistent=False)
        self.meter = BinnedMeans(self.schedule.steps)
        if config.checkpointing:
            unet.enable_gradient_checkpointing()

    def players(self) -> Sequence[Player]:
        """See `Task`."""
        return [Player("weights", dict(self.adapter.named_parameters()))]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """See `Task`."""
        shape, index = latent_shape(self.vae, batch["sharp"]), batch["index"]
        return {
            **batch,
            **draw_noising(self.seed, index, "adapter", shape, self.schedule.steps, self.config.timesteps),
            "keep": draw_uniform(self.seed, index, "adapter/dropout") >= self.config.dropout,
            "maps": self.config.maps(bytes_to_unit(batch["sharp"])),
        }

    def forward(self, player: str, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """See `Task`."""
        latent, t, eps = self._latent(batch), batch["t"], batch["eps"]
        noisy = self.schedule.add_noise(latent, eps, t)
        features = [level.float() * batch["keep"].view(-1, 1, 1, 1) for level in self.adapter(batch["maps"])]
        output = predict(self.unet, noisy, t, repeated_context(self.context, noisy), features)
        target = eps if self.prediction == "eps" else self.schedule.v_from_x0(noisy, latent, t)
        assert self.meter is not None
        self.meter.add({"mse": (output.detach() - target).square().flatten(1).mean(1)}, t)
        return {"loss": F.mse_loss(output, target)}, {}

    @torch.no_grad()
    def grid(self, batch: Batch) -> Tensor:
        """Truth and condition; then, from three noise levels, the teacher's clean estimate with and without it."""
        latent, maps = self._latent(batch), self.config.maps(bytes_to_unit(batch["sharp"]))
        index = torch.arange(latent.shape[0])
        eps = draw_noise(self.seed, index, "grid", latent.shape[1:]).to(latent)
        rows = [bytes_to_signed(batch["sharp"]), *self.config.shown(unit_to_signed(maps))]
        features = list(self.adapter(maps))
        for level in GRID_LEVELS:
            t = torch.full((latent.shape[0],), int(level * self.schedule.steps), device=latent.device)
            noisy = self.schedule.add_noise(latent, eps, t)
            for given in (features, None):
                output = predict(self.unet, noisy, t, repeated_context(self.context, noisy), given)
                clean = self.schedule.x0_from_output(self.prediction, noisy, output, t)
                rows.append(decode_latent(self.vae, clean))
        return stack_rows(*rows)

    def export(self, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
        """``adapter.safetensors`` and the diffusers folder ``adapter`` in `folder`."""
        description = {
            "structure": self.config.describe(),
            "family": self.base.info.family,
            "base": self.base.info.name,
            "base_hash": self.base.hash(),
            "licence": self.config.licence,
            "training": shareable(settings),
        }
        return save_adapter(folder / "adapter", self.adapter, description, torch.float16)

    @torch.no_grad()
    def _latent(self, batch: Batch) -> Tensor:
        return encode_picture(self.vae, bytes_to_signed(batch["sharp"]))
