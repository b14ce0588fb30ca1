"""The dry run: what a training script would do, found without reading a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from ..data.samples import Samples
from ..settings import plain_settings
from ..tasks.task import Task
from .loop_config import LoopConfig
from .memory import estimate_memory


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a training script, without its weights."""

    name: str
    loop: LoopConfig
    build: Callable[[], Task]
    """Builds the task on the default device; called with the meta device as the default."""
    folder: Path
    """Its run folder."""


def plan(settings: Any, stages: Sequence[PlannedStage], samples: Samples, processes: int) -> str:
    """What a run would do, in words: the resolved configuration, steps, parameters and memory. Loads no weights.

    `settings` is a dataclass; `processes` their number.
    """
    import yaml

    lines = [yaml.safe_dump(plain_settings(settings), sort_keys=False, allow_unicode=True).rstrip(), ""]
    lines.append(f"{'photographs':<22}{len(samples.photographs)}")
    for stage in stages:
        loop = stage.loop
        crop = samples.config.crop
        batch = default_collate([samples.blank()] * loop.batch)
        memory, counts = estimate_memory(stage.build, batch, loop.precision)
        step = loop.batch * loop.accumulate * processes
        rows = [
            ("effective batch", f"{step} ({loop.batch} x {loop.accumulate} accumulated x {processes} processes)"),
            ("steps", f"{loop.images // step} of {step} crops of {crop} px"),
            ("checkpoints", f"every {loop.save_every} images, {loop.keep} kept"),
            *((f"trained, {player}", f"{count:,} parameters") for player, count in counts.items()),
            ("memory, weights", _gigabytes(memory.weights)),
            ("memory, optimisers", _gigabytes(memory.optimizers)),
            ("memory, step", f"{_gigabytes(memory.peak)} (activations and gradients at the worst moment)"),
            ("memory, in all", f"{_gigabytes(memory.total)} on each device, and what the libraries take themselves"),
        ]
        lines += ["", stage.name, *(f"  {label:<20}{value}" for label, value in rows)]
    return "\n".join(lines)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
