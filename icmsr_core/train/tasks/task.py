"""What the loop trains: a module with one or more players, each with weights and an optimiser of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from ...pictures.ranges import signed_to_unit
from ..losses.diagnostics import BinnedMeans

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Player:
    """A set of weights that one optimiser moves."""

    name: str
    """``weights`` where there is one, ``generator`` and ``auxiliary`` in distillation."""
    parameters: Mapping[str, nn.Parameter]
    """What is trained, float32, by names that stay the same from run to run."""
    rounds: int = 1
    """Optimiser steps in each step of the loop."""
    learning_rate: float = 1.0
    """Factor on the loop's learning rate."""
    averaged: bool = True
    """Whether a running average is kept, shown in sample grids and exported."""


class Task(nn.Module, ABC):
    """Base of what is trained. It knows nothing of logging, schedules, processes or the run's files.

    `forward` is the one way in, so that under DDP every gradient passes through the wrapper: a call past it would leave
    the processes' gradients unsynchronised, without an error.
    """

    meter: BinnedMeans | None = None
    """Sums by timestep that `forward` adds to; the loop reads and resets them."""

    @abstractmethod
    def players(self) -> Sequence[Player]:
        """Who is trained, in the order of their turns."""

    @abstractmethod
    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """`batch` with everything that `forward` needs and cannot compute: random numbers, OpenCV, the warm-up.

        All of it is on the CPU, so that nothing waits for a device; only what an earlier player brought may be on one.
        `images` is the run's position; `turn` counts the player's optimiser steps within a step of the loop.
        """

    @abstractmethod
    def forward(self, player: str, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """Scalars by name, of which ``loss`` is minimised, and what the batch brings to the next player.

        Every scalar is a mean over the samples, so that the mean over half batches is that of the whole batch.
        """

    @abstractmethod
    def grid(self, batch: Batch) -> Tensor:
        """Sample picture [3, H, W] in [0, 1]."""

    def measure(self) -> dict[str, float]:
        """Values by log key that are measured at every checkpoint, with the averaged weights in place; may be empty."""
        return {}

    @abstractmethod
    def export(self, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
        """Writes the results into `folder` and returns their paths; the averaged weights are in place.

        `settings` is the run's configuration, for files that say how they were trained (see `shareable`).
        """


def stack_rows(*rows: Tensor) -> Tensor:
    """Batches [N, 3, H, W] in [-1, 1] as one picture [3, rows * H, N * W] in [0, 1]."""
    return signed_to_unit(rearrange([row.float() for row in rows], "rows n c h w -> c (rows h) (n w)")).clamp(0, 1)


def latent_shape(vae: AutoencoderKL, picture: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of the latent of `picture` [N, 3, H, W]."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.config.latent_channels), picture.shape[-2] // factor, picture.shape[-1] // factor
