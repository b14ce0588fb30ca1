"""The training loop: one visible function for every kind of training here.

Progress is counted in images, so that a schedule survives a change of batch size. To resume, run the same command:
the loop finds the newest checkpoint in the run folder and goes on from it. Nothing random happens in the loop: samples,
noise and timesteps depend on the seed and the sample's number alone (`draws`). A resumed run is therefore the same run,
and several processes are one process with a larger batch.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...errors import IcmsrError
from ...pictures.files import Picture, from_tensor, write_picture
from ...runtime.precision import autocast
from ...transfer import pins_memory
from ...whole_file import replace_file
from ..data.loader import Resumable, make_loader
from ..data.samples import Samples, Tally, last_samples
from ..settings import compared_settings, plain_settings
from ..tasks.task import Batch, Player, Task
from .checkpoint import STATE_FILE, checkpoint_folder, newest_checkpoint, write_checkpoint
from .logs import MetricsLog
from .loop_config import LoopConfig, lengths_of
from .means import Means
from .plots import plot_run
from .processes import Processes
from .state import RunState, fingerprint, listing
from .transfer import Transfer

log = logging.getLogger(__name__)
GRID_SAMPLES = 6
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
"""What ends a run once its state is saved: Ctrl-C, a scheduler's request, and under Windows Ctrl-Break."""


class Interrupted(Exception):
    """The run was stopped by a signal, and its state is saved."""


@dataclass
class Run:
    """A run that is under way: what the parts of the loop share."""

    task: Task
    model: nn.Module
    """`task` as it must be called: under DDP, its wrapper."""
    samples: Samples
    config: LoopConfig
    folder: Path
    settings: dict[str, Any]
    """The whole configuration, plain."""
    state: RunState
    processes: Processes
    records: MetricsLog | None
    """None but in the main process."""
    tally: Tally
    means: Means = field(default_factory=Means)

    @property
    def end(self) -> int:
        """The position at which the run is over: no step is left that would be whole."""
        images, step = self.state.position.images, self.state.step
        return images + (self.config.images - images) // step * step

    def due(self, interval: int) -> bool:
        """Whether the last step reached a multiple of `interval` images, or the end."""
        images = self.state.position.images
        return images % interval < self.state.step or images == self.end


def train(
    task: Task,
    samples: Samples,
    config: LoopConfig,
    folder: Path,
    settings: Any,
    processes: Processes,
    keep_average: bool = False,
) -> list[Path]:
    """Trains `task` in the run folder `folder`, resuming what is there, and returns the exported files.

    `settings`, a dataclass or a mapping of them, is the whole resolved configuration. It is written to `config.json`
    and handed to `Task.export`; a resume compares it, all but its `FREE` fields. With `keep_average` the averaged
    weights stay in the networks afterwards, for a further stage. Raises `Interrupted` after saving on one of
    `STOP_SIGNALS`, and `IcmsrError` when gradients stay non-finite.
    """
    run = start_run(task, samples, config, folder, settings, processes)
    position, step = run.state.position, run.state.step
    if run.records is not None and position.images and run.due(config.save_every) and not grid_file(run).exists():
        save_pictures(run, run.records)  # the run was ended between its checkpoint and these
    numbers = Resumable(position.images, run.end, config.batch, processes.rank, processes.count)
    loader = iter(make_loader(samples, numbers, config.workers, pins_memory(processes.device)))
    bar = tqdm(total=run.end, initial=position.images, unit="image", smoothing=0.05, disable=not processes.main)
    with stop_signals() as stopped, bar:
        while position.images < run.end:
            batches = next_batches(run, loader, stopped)
            if batches is None:
                if not checkpoint_folder(folder, position.images).exists():
                    save_everything(run, measure=False, pictures=False)
                raise Interrupted(stopped_at(position.images))
            rates = take_step(run, batches)
            position.images += step
            bar.update(step)
            if run.due(config.log_every):
                losses = log_line(run, rates)
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
            stop = processes.any(stopped())
            due = run.due(config.save_every)
            if due or stop:
                save_everything(run, measure=due, pictures=not stop)
            if stop:
                raise Interrupted(stopped_at(position.images))
    for name in processes.union(run.tally.unreadable):
        log.warning("%s: not a readable picture, skipped", name)
    exported: list[Path] = []
    with run.state.averaged():
        if processes.main:
            exported = task.export(folder, run.settings)
    if keep_average:
        run.state.use_averages()
    processes.wait()
    return exported


def start_run(
    task: Task, samples: Samples, config: LoopConfig, folder: Path, settings: Any, processes: Processes
) -> Run:
    """The run in `folder`: at its newest checkpoint, or at the beginning.

    Raises `IcmsrError` when the checkpoint belongs to other settings or other photographs.
    """
    plain, step = plain_settings(settings), config.batch * config.accumulate * processes.count
    if config.images < step:
        raise IcmsrError(f"loop.images is {config.images}, below one effective batch of {step}")
    model = processes.wrapped(task)
    mark = fingerprint({**compared_settings(settings), "effective batch": step})
    state = RunState(task.players(), config, step, mark)
    state.photographs = listing(samples.photographs)
    state.lengths = lengths_of(settings, config)
    folder.mkdir(parents=True, exist_ok=True)
    newest = processes.from_main(newest_checkpoint(folder) if processes.main else None)
    if newest is not None:
        state.load(newest / STATE_FILE)
    if processes.main:
        replace_file(folder / "config.json", (json.dumps(plain, indent=2, default=str) + "\n").encode())
    records = MetricsLog(folder, config.tensorboard) if processes.main else None
    if records is not None:
        records.truncate_after(state.position.images)
    return Run(task, model, samples, config, folder, plain, state, processes, records, Tally(samples))


def next_batches(run: Run, loader: Iterator[Batch], stopped: Callable[[], bool]) -> list[Batch] | None:
    """The batches of the next step; None when the data workers died of the signal that stops this run.

    Where Ctrl-C reaches every process of a console (Windows), it also reaches a worker that is just starting and does
    not ignore it yet.
    """
    try:
        return [next(loader) for _ in range(run.config.accumulate)]
    except RuntimeError:
        if stopped() and run.processes.count == 1:  # several processes must stop at the same step
            return None
        raise


def stopped_at(images: int) -> str:
    """What the user reads when a signal has stopped the run at that position."""
    return f"stopped at {images} images; the same command goes on from here"


def take_step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """One step of the loop: every player's turns on `batches`, one for each accumulated pass.

    Returns the learning rates by log key.
    """
    for batch in batches:
        run.tally.add(batch)
    transfers = [Transfer(run.processes.device) for _ in batches]
    for player in run.state.players:
        for turn in range(player.rounds):
            for number, (batch, transfer) in enumerate(zip(batches, transfers)):
                prepared = transfer(run.task.prepare(player.name, batch, run.state.position.images, turn))
                batches[number] = {**batch, **backward(run, player, prepared, number == len(batches) - 1)}
            norm = run.state.descend(player)
            if norm is not None:
                run.means.add({f"health/gradient/{player.name}": norm})
        run.state.update_average(player)
    return {f"lr/{player.name}": run.state.rate(player) for player in run.state.players}


def backward(run: Run, player: Player, prepared: Batch, last: bool) -> Batch:
    """Adds the gradient of a batch, as `Task.prepare` makes it, to those of `player`.

    Returns what the batch brings to the next player.
    `last` marks the last of the accumulated passes: under DDP, gradients are exchanged in that one only.
    """
    with exchanged(run.model, last):
        with autocast(run.processes.device, run.config.precision):
            losses, brings = run.model(player.name, prepared)
        (losses["loss"] / run.config.accumulate).backward()
    run.means.add({f"loss/{player.name}/{name}": value for name, value in losses.items()})
    return brings


def log_line(run: Run, rates: Mapping[str, float]) -> dict[str, float]:
    """Writes a line of the log: what was counted and averaged since the last one. Returns the players' losses."""
    values = run.means.take(run.processes) | dict(rates)
    values |= {f"data/{name}": value for name, value in run.processes.sum(run.tally.take()).items()}
    values["health/skipped"] = run.state.position.skipped
    if run.task.meter is not None:
        values |= {f"icm/{name}": value for name, value in run.task.meter.take(run.processes.accelerator).items()}
    if run.records is not None:
        run.records.write(run.state.position.images, values)
    return {name: value for name, value in values.items() if name.endswith("/loss")}


def save_everything(run: Run, measure: bool, pictures: bool) -> None:
    """Writes the checkpoint; before, with `measure`, what is measured of the averaged weights, so that the log does not
    depend on where a run was stopped; afterwards, with `pictures`, sample grid and plots."""
    images = run.state.position.images
    if run.records is not None:
        with run.state.averaged():
            measured = run.task.measure() if measure else {}
        if measured:  # before the checkpoint: a log cut back to the last checkpoint then has this line
            run.records.write(images, measured)
        write_checkpoint(run.folder, run.state, run.config.keep, lambda to: run.task.export(to, run.settings))
        if pictures:
            save_pictures(run, run.records)
    run.processes.wait()


def grid_file(run: Run) -> Path:
    """Where the sample grid of this position is, or would be."""
    return run.folder / "grids" / f"{run.state.position.images:09d}.png"


def save_pictures(run: Run, records: MetricsLog) -> None:
    """Sample grid and plots of this position."""
    with run.state.averaged():
        save_grid(run, grid_file(run))
    if records.path.exists():  # save_every may be below log_every
        plot_run(run.folder)


def save_grid(run: Run, path: Path) -> None:
    """The task's picture of six samples as a PNG, the same at every checkpoint; no training sample has their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    device = run.processes.device
    batch = {name: value.to(device) for name, value in last_samples(run.samples, GRID_SAMPLES).items()}
    with torch.no_grad(), autocast(device, run.config.precision):
        picture = run.task.grid(batch)
    write_picture(path, Picture(rgb=from_tensor(picture[None].float().cpu().clamp(0, 1))))


def exchanged(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """A block in which DDP exchanges gradients `now`, or leaves them for a later pass."""
    return nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()  # type: ignore[operator]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A function that tells whether one of `STOP_SIGNALS` has come; the old handlers are put back afterwards."""
    seen: list[int] = []
    old = {number: signal.signal(number, lambda got, _: seen.append(got)) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
