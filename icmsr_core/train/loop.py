"""The training loop: one visible function for every kind of training here.

Progress is counted in images, so that a schedule survives a change of batch size. To resume, run the same command:
the loop finds the state in the run folder and goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import IcmsrError
from .checkpoint import fingerprint, load_state, save_state
from .data import TrainingPairs, make_loader

log = logging.getLogger(__name__)
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train."""

    images: int = 20_000
    """Training images (samples, not distinct pictures) in all."""
    batch: int = 8
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_images: int = 400
    """Images over which the learning rate rises from 0; it then falls to 0 along a cosine."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    clip: float = 1.0
    """Largest gradient norm."""
    average_images: int = 4_000
    """Half-life, in images, of the running average of the weights that is exported."""
    precision: str = "bf16"
    """bf16 (autocast; weights and losses stay float32) or fp32."""
    workers: int = 1
    """Processes that prepare data."""
    seed: int = 0
    """Seed of the data, of the initial weights and of every random number in training."""
    save_every: int = 8_000
    """Images between saved states and sample grids."""
    log_every: int = 400
    """Images between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "save_every", "log_every", "average_images"):
            if getattr(self, name) < 1:
                raise IcmsrError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise IcmsrError(f"precision must be bf16 or fp32, got {self.precision!r}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise IcmsrError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_images", "weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise IcmsrError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise IcmsrError(f"betas must be at least 0 and below 1, got {self.betas}")


class Task(Protocol):
    """What is trained. It knows nothing of logging, schedules or files of the run."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Networks by name; their parameters that require a gradient are trained."""

    def losses(self, batch: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name, of which ``loss`` is minimised. `random` is the step's own source of random numbers."""

    def grid(self, batch: Batch) -> Tensor:
        """Sample picture [3, H, W] in [0, 1]."""

    def export(self, run: Path) -> list[Path]:
        """Writes the results of the run (the averaged weights are in place) and names the files."""


class Interrupted(Exception):
    """The run was stopped by a signal, and its state is saved."""


def learning_rate(config: LoopConfig, images: int) -> float:
    """The learning rate after `images` images: linear warm-up, then half a cosine to zero."""
    if images < config.warmup_images:
        return config.learning_rate * (images + config.batch) / (config.warmup_images + config.batch)
    progress = (images - config.warmup_images) / max(1, config.images - config.warmup_images)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(task: Task, pairs: TrainingPairs, config: LoopConfig, run: Path, settings: Mapping[str, Any],
          device: torch.device, keep_average: bool = False) -> list[Path]:
    """Trains `task` in the folder `run`, resuming what is there, and returns the exported files.

    `settings` is the whole resolved configuration: written to `config.json`, and compared on resuming. With
    `keep_average` the averaged weights stay in the networks afterwards, for a further stage. Raises `Interrupted`
    after saving on SIGINT or SIGTERM, and `IcmsrError` when losses stay non-finite.
    """
    run.mkdir(parents=True, exist_ok=True)
    modules = task.modules()
    parameters = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, foreach=True
    )
    state_file, mark = run / "state.safetensors", fingerprint(settings)
    images = load_state(state_file, parameters, average, optimizer, mark) if state_file.exists() else 0
    if images == 0:
        (run / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
        (run / "metrics.jsonl").unlink(missing_ok=True)
    decay = 0.5 ** (config.batch / config.average_images)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    skipped, started, losses = 0, time.monotonic(), {}
    loader = make_loader(pairs, config.batch, images, config.images // config.batch * config.batch, config.workers)
    with stop_signals() as stopped, tqdm(total=config.images, initial=images, unit="image", smoothing=0.05) as bar:
        for batch in loader:
            batch = {name: value.to(device) for name, value in batch.items()}
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, images)
            random = torch.Generator(device).manual_seed(config.seed * 1_000_003 + images)
            with autocast:
                losses = task.losses(batch, random)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            if bool(norm.isfinite()):
                optimizer.step()
                for name, parameter in parameters.items():
                    average[name].lerp_(parameter.detach(), max(1 - decay, 1 / (1 + images / config.batch)))
            else:
                skipped += 1
                if skipped > 50:
                    raise IcmsrError(f"{skipped} steps with a non-finite gradient: lower learning_rate or use fp32")
            images += config.batch
            bar.update(config.batch)
            if images % config.log_every < config.batch:
                line = {name: round(float(value), 6) for name, value in losses.items()}
                line |= {"images": images, "lr": learning_rate(config, images), "grad": round(float(norm), 5),
                         "skipped": skipped, "seconds": round(time.monotonic() - started, 1)}
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix({name: f"{float(value):.4f}" for name, value in losses.items()})
            if images % config.save_every < config.batch or stopped():
                save_state(state_file, parameters, average, optimizer, images, mark)
                if stopped():
                    raise Interrupted(f"stopped at {images} images; the same command goes on from here")
                with averaged(parameters, average):
                    save_grid(task, batch, run / "grids" / f"{images:08d}.png")
    save_state(state_file, parameters, average, optimizer, images, mark)
    with averaged(parameters, average):
        exported = task.export(run)
    if keep_average:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(average[name])
    return exported


@contextmanager
def averaged(parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> Iterator[None]:
    """The averaged weights in place of the live ones, for the length of the block."""
    live = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(live[name])


def save_grid(task: Task, batch: Batch, path: Path) -> None:
    """The task's sample picture as a PNG."""
    from ..image_io import Picture, from_tensor, write_picture

    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        picture = task.grid(batch)
    write_picture(path, Picture(rgb=from_tensor(picture[None].float().cpu().clamp(0, 1))))


@contextmanager
def stop_signals() -> Iterator[Any]:
    """A function that tells whether SIGINT or SIGTERM has come; the old handlers are put back afterwards."""
    seen: list[int] = []
    old = {number: signal.signal(number, lambda got, _: seen.append(got)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
