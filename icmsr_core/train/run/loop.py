"""The training loop: one visible function for every kind of training here.

Progress is counted in images, so that a schedule survives a change of batch size. To resume, run the same command:
the loop finds the newest checkpoint in the run folder and goes on where it stopped. Nothing random lives in it:
samples, noise and timesteps depend on the seed and the sample's number alone (`draws`), so a resumed run is the same
run, and several processes are one process with a larger batch.
"""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ...errors import IcmsrError
from ..data.pairs import Samples, Tally, make_loader
from ..tasks.task import Batch, Player, Task
from .checkpoint import (
    STATE_FILE,
    Averages,
    Position,
    fingerprint,
    load_state,
    newest_checkpoint,
    write_checkpoint,
)
from .logs import MetricsLog
from .plots import plot_run

log = logging.getLogger(__name__)
SCHEDULES = ("cosine", "linear", "constant")
FREE_KEYS = (
    "run",
    "device",
    "data.cache_mb",
    *(
        f"loop.{key}"
        for key in ("batch", "accumulate", "workers", "log_every", "save_every", "keep", "tensorboard", "patience")
    ),
)
"""Settings that change nothing in the weights: a run may be resumed with others. Of batch and accumulate it is their
product with the number of processes that counts, and that is compared."""


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train."""

    images: int = 20_000
    """Training images (samples, not distinct pictures) in all."""
    batch: int = 8
    """Images per forward pass and process."""
    accumulate: int = 1
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
    workers: int = 1
    """Processes that prepare data, for each process that trains."""
    seed: int = 0
    """Seed of the data, of the initial weights and of every random number in training."""
    save_every: int = 8_000
    """Images between checkpoints, with sample grids and plots."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 400
    """Images between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard scalars too, where the package is installed."""
    patience: int = 50
    """Optimiser steps with a non-finite gradient, in a row, that are left out before the run stops."""

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


class Interrupted(Exception):
    """The run was stopped by a signal, and its state is saved."""


def learning_rate(config: LoopConfig, images: int, step: int) -> float:
    """The learning rate of the optimiser step from `images` to `images + step`."""
    if images < config.warmup_images:
        return config.learning_rate * (images + step) / (config.warmup_images + step)
    progress = min(1.0, (images - config.warmup_images) / max(1, config.images - config.warmup_images))
    falls = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * falls[config.schedule]


def train(
    task: Task,
    pairs: Samples,
    config: LoopConfig,
    run: Path,
    settings: Mapping[str, Any],
    accelerator: Accelerator,
    device: torch.device,
    keep_average: bool = False,
) -> list[Path]:
    """Trains `task` in the folder `run`, resuming what is there, and returns the exported files.

    `settings` is the whole resolved configuration: written to `config.json`, and compared on resuming. With
    `keep_average` the averaged weights stay in the networks afterwards, for a further stage. Raises `Interrupted`
    after saving on SIGINT or SIGTERM, and `IcmsrError` when gradients stay non-finite.
    """
    main = accelerator.is_main_process
    players = task.to(device).players()
    model = accelerator.prepare_model(task) if accelerator.num_processes > 1 else task
    optimizers = {
        player.name: torch.optim.AdamW(
            player.parameters.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        for player in players
    }
    averages = Averages(
        {
            player.name: {name: parameter.detach().clone() for name, parameter in player.parameters.items()}
            for player in players
            if player.averaged
        }
    )
    run.mkdir(parents=True, exist_ok=True)
    step = config.batch * config.accumulate * accelerator.num_processes
    if config.images < step:
        raise IcmsrError(f"loop.images is {config.images}, below one effective batch of {step}")
    mark = fingerprint({**decisive(settings), "effective batch": step})
    position, newest = Position(), broadcast(accelerator, newest_checkpoint(run) if main else None)
    if newest is not None:
        position = load_state(newest / STATE_FILE, players, averages, optimizers, mark)
    elif main:
        (run / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    records = MetricsLog(run, config.tensorboard) if main else None
    if records is not None:
        records.truncate_after(position.images)
    last = position.images + (config.images - position.images) // step * step
    decay = 0.5 ** (step / config.average_images)
    means, tally, rates = Means(), Tally(pairs), {}
    loader = iter(
        make_loader(
            pairs,
            config.batch,
            position.images,
            last,
            config.workers,
            accelerator.process_index,
            accelerator.num_processes,
        )
    )
    bar = tqdm(total=last, initial=position.images, unit="image", smoothing=0.05, disable=not main)
    with stop_signals() as stopped, bar:
        while position.images < last:
            micros: list[Batch] = []
            for _ in range(config.accumulate):
                batch = next(loader)
                tally.add(batch)
                micros.append({name: value.to(device) for name, value in batch.items()})
            for player in players:
                optimizer = optimizers[player.name]
                rate = rates[f"lr/{player.name}"] = player.learning_rate * learning_rate(config, position.images, step)
                for turn in range(player.rounds):
                    for number, batch in enumerate(micros):
                        prepared = task.prepare(player.name, batch, position.images, turn)
                        synchronise = number == len(micros) - 1
                        with gradients(model, synchronise):
                            with autocast(device, config.precision):
                                losses, brings = model(player.name, prepared)
                            (losses["loss"] / config.accumulate).backward()
                        micros[number] = {**batch, **brings}
                        means.add({f"loss/{player.name}/{name}": value for name, value in losses.items()})
                    norm = nn.utils.clip_grad_norm_(player.parameters.values(), config.clip)
                    if bool(norm.isfinite()):
                        for group in optimizer.param_groups:
                            group["lr"] = rate
                        optimizer.step()
                        position.in_a_row[player.name] = 0
                        means.add({f"health/gradient/{player.name}": norm})
                    else:
                        position.skipped += 1
                        position.in_a_row[player.name] = position.in_a_row.get(player.name, 0) + 1
                    optimizer.zero_grad(set_to_none=True)
                    if position.in_a_row[player.name] >= config.patience:
                        raise IcmsrError(
                            f"{config.patience} optimiser steps of {player.name} in a row had a non-finite gradient, "
                            f"the last at {position.images} images: lower learning_rate, or use precision fp32"
                        )
                if player.averaged:
                    weight = max(1 - decay, 1 / (1 + position.images / step))
                    for name, parameter in player.parameters.items():
                        averages[player.name][name].lerp_(parameter.detach(), weight)
            position.images += step
            bar.update(step)
            if position.images % config.log_every < step or position.images == last:
                values = means.take(accelerator) | rates
                values |= {f"data/{name}": value for name, value in total(accelerator, tally.take()).items()}
                values["health/skipped"] = position.skipped
                if task.meter is not None:
                    values |= {f"icm/{name}": value for name, value in task.meter.take(accelerator).items()}
                if records is not None:
                    records.write(position.images, values)
                bar.set_postfix({key: f"{values[key]:.4f}" for key in values if key.endswith("/loss")})
            stop = any_process(accelerator, bool(stopped()))
            if position.images % config.save_every < step or stop or position.images == last:
                if records is not None:
                    with averaged(players, averages):
                        measured = task.measure()
                    if measured:  # before the checkpoint: a log cut back to the last checkpoint then has this line
                        records.write(position.images, measured)
                if main:
                    # The state holds the live weights, for going on; what is exported and shown is the average.
                    write_checkpoint(
                        run,
                        players,
                        averages,
                        optimizers,
                        position,
                        mark,
                        config.keep,
                        averaged(players, averages)(task.export),
                    )
                    if not stop:
                        with averaged(players, averages):
                            save_grid(task, pairs, device, config, run / "grids" / f"{position.images:09d}.png")
                        if records is not None and records.path.exists():  # save_every may be below log_every
                            plot_run(run)
                accelerator.wait_for_everyone()
                if stop:
                    raise Interrupted(f"stopped at {position.images} images; the same command goes on from here")
    for name in everybodys(accelerator, tally.unreadable):
        log.warning("%s: not a readable picture, left out", name)
    exported = []
    with averaged(players, averages):
        if main:
            exported = task.export(run)
    if keep_average:
        put(players, averages)
    accelerator.wait_for_everyone()
    return exported


class Means:
    """Means of scalars over a logging interval, and over processes, without a synchronisation per step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one value of each."""
        for name, value in values.items():
            value = value.detach().float()
            good = value.isfinite()  # what a skipped step leaves would hide all the others
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + torch.where(good, value, 0.0)
            self._counts[name] = self._counts.get(name, torch.zeros_like(value)) + good

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call."""
        found = {name: self._sums[name] / self._counts[name] for name in sorted(self._sums)}
        self._sums.clear()
        self._counts.clear()
        if accelerator.num_processes > 1:
            found = {name: accelerator.reduce(value, "mean") for name, value in found.items()}
        return {name: float(value) for name, value in found.items()}


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without what changes nothing in the weights (`FREE_KEYS`, in every part of the run)."""

    def keep(values: Mapping[str, Any], above: str) -> dict[str, Any]:
        kept = {}
        for key, value in values.items():
            loop = isinstance(value, Mapping) and "save_every" in value
            if f"{above}{key}" not in FREE_KEYS:
                kept[key] = keep(value, "loop." if loop else f"{key}.") if isinstance(value, Mapping) else value
        return kept

    return keep(settings, "")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The precision of the forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def gradients(model: nn.Module, synchronise: bool) -> AbstractContextManager[Any]:
    """Under DDP, gradients are exchanged only in the last of several accumulated passes."""
    return nullcontext() if synchronise or not hasattr(model, "no_sync") else model.no_sync()  # type: ignore[operator]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in any process; they must all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    total: Tensor = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total > 0)


def total(accelerator: Accelerator, counts: Mapping[str, int]) -> dict[str, int]:
    """`counts` summed over the processes."""
    if accelerator.num_processes == 1:
        return dict(counts)
    values = torch.tensor(list(counts.values()), dtype=torch.float64, device=accelerator.device)
    summed: Tensor = accelerator.reduce(values, "sum")
    return {name: int(value) for name, value in zip(counts, summed.tolist())}


def everybodys(accelerator: Accelerator, names: Sequence[str]) -> list[str]:
    """The names that any process has, each once."""
    if accelerator.num_processes == 1:
        return list(names)
    from accelerate.utils import gather_object

    return sorted(set(gather_object(list(names))))


def broadcast(accelerator: Accelerator, value: Any) -> Any:
    """The main process's `value` in every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@torch.no_grad()
def put(players: Sequence[Player], averages: Averages) -> None:
    """Puts the averaged weights into the networks."""
    for player in players:
        for name, value in averages.get(player.name, {}).items():
            player.parameters[name].copy_(value)


@contextmanager
def averaged(players: Sequence[Player], averages: Averages) -> Iterator[None]:
    """The averaged weights in place of the live ones, for the length of the block."""
    live = Averages(
        {
            player.name: {name: parameter.detach().clone() for name, parameter in player.parameters.items()}
            for player in players
            if player.averaged
        }
    )
    put(players, averages)
    try:
        yield
    finally:
        put(players, live)


def save_grid(task: Task, pairs: Samples, device: torch.device, config: LoopConfig, path: Path) -> None:
    """The task's picture of six samples as a PNG, the same at every checkpoint; no training sample has their number."""
    from ...pictures.files import Picture, from_tensor, write_picture

    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [pairs[len(pairs) - 1 - number] for number in range(6)]
    batch = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}
    with torch.no_grad(), autocast(device, config.precision):
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
