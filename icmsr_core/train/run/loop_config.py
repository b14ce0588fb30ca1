"""How long and how fast a run trains: the settings of the loop, and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ...errors import IcmsrError
from ..settings import FREE

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    `batch` and `accumulate` are `FREE`, because only their product with the number of processes shapes the weights: the
    loop compares that one.
    """

    images: int = 20_000
    """Training images (samples, not distinct pictures) in all."""
    batch: int = field(default=8, metadata=FREE)
    """Images per forward pass and process."""
    accumulate: int = field(default=1, metadata=FREE)
    """Forward passes per optimiser step: the effective batch is batch x accumulate x processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """What follows the warm-up: cosine or linear to 0, or constant."""
    warmup_images: int = 400
    """Images over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    clip: float = 1.0
    """Largest gradient norm, for each player."""
    average_images: int = 4_000
    """Half-life, in images, of the running average of the weights that is exported."""
    precision: str = "bf16"
    """bf16 (autocast; trained weights and losses stay float32) or fp32."""
    workers: int = field(default=1, metadata=FREE)
    """Processes that prepare data, for each process that trains."""
    seed: int = 0
    """Seed of the data, of the initial weights and of every random number in training."""
    save_every: int = field(default=8_000, metadata=FREE)
    """Images between checkpoints, with sample grids and plots."""
    keep: int = field(default=2, metadata=FREE)
    """Checkpoints kept."""
    log_every: int = field(default=400, metadata=FREE)
    """Images between lines of metrics.jsonl."""
    tensorboard: bool = field(default=True, metadata=FREE)
    """Write TensorBoard scalars too, where the package is installed."""
    patience: int = field(default=50, metadata=FREE)
    """Skipped optimiser steps (their gradient was not finite) in a row that stop the run."""

    changed_photographs: bool = field(default=False, metadata=FREE)
    """Resume although photographs were added, removed or replaced: samples then differ from those of one whole run."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "accumulate", "save_every", "keep", "log_every", "average_images", "patience"):
            if getattr(self, name) < 1:
                raise IcmsrError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (("precision", ("bf16", "fp32")), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise IcmsrError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise IcmsrError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_images", "weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise IcmsrError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise IcmsrError(f"betas must be at least 0 and below 1, got {self.betas}")


def named_loops(settings: Any) -> dict[str, LoopConfig]:
    """The loops in `settings`, a dataclass or a mapping, by name and in the order in which they run."""
    if is_dataclass(settings):
        settings = {field.name: getattr(settings, field.name) for field in fields(settings)}
    found: Mapping[str, Any] = settings
    return {name: value for name, value in found.items() if isinstance(value, LoopConfig)}


def lengths_of(settings: Any, config: LoopConfig) -> tuple[str, str]:
    """The names of the settings with the images of the loop `config` and of the last loop in `settings`; empty where
    `settings` does not have `config`."""
    loops = named_loops(settings)
    own = next((name for name, loop in loops.items() if loop is config), "")
    return (f"{own}.images", f"{list(loops)[-1]}.images") if own else ("", "")


def learning_rate(config: LoopConfig, images: int, step: int) -> float:
    """The learning rate of the optimiser step from `images` to `images + step`."""
    if images < config.warmup_images:
        return config.learning_rate * (images + step) / (config.warmup_images + step)
    progress = min(1.0, (images - config.warmup_images) / max(1, config.images - config.warmup_images))
    falls = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * falls[config.schedule]
