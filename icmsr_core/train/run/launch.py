"""What the scripts in `train/` share: configuration from YAML and flags, processes, the dry run, exit codes."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from diffusers.utils import logging as diffusers_logging
from torch.utils.data import default_collate

from ...errors import IcmsrError
from ..data.pairs import Samples
from ..tasks.task import Task
from .loop import Interrupted
from .loop_config import LoopConfig
from .memory import estimate_memory

Config = TypeVar("Config")


def parse_config(kind: type[Config], arguments: list[str] | None = None) -> Config:
    """A `kind` (a dataclass) from ``--config FILE`` and ``--key.sub=value``; wrong keys and types end with code 2."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    parser = ArgumentParser(description=kind.__doc__)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it override its keys")
    parser.add_class_arguments(kind, None)
    values = parser.parse_args(arguments)
    values.pop("config", None)
    # Named instantiate_classes before jsonargparse 4.49.
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    config: Config = kind(**vars(instantiate(values)))
    return config


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain values, for JSON, without ``dry_run``."""
    return {key: value for key, value in asdict(config).items() if key != "dry_run"}


Stage = tuple[str, LoopConfig, Callable[[], Task]]
"""A stage's name, its loop and a function that builds its task."""


def plan(
    settings: dict[str, Any],
    stages: Sequence[Stage],
    pairs: Samples,
    processes: int,
) -> str:
    """What a run would do, in words: the resolved configuration, steps, parameters and memory. Loads no weights.

    A stage is its name, its loop and a function that builds its task on the meta device.
    """
    import yaml

    lines = [yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True).rstrip(), ""]
    lines.append(f"{'photographs':<22}{len(pairs.photographs)}")
    for name, loop, build in stages:
        crop = pairs.config.crop
        batch = default_collate([pairs.blank()] * loop.batch)
        memory, counts = estimate_memory(build, batch, loop.precision)
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
        lines += ["", name, *(f"  {label:<20}{value}" for label, value in rows)]
    return "\n".join(lines)


def run_jobs(jobs: int, work: Sequence[tuple[Any, ...]], what: str) -> None:
    """Does `work`, a function of a module and its arguments each, in `jobs` processes, and says how far it is.

    Functions return what to call them in the log. The first error ends the rest.
    """
    if jobs == 1:
        for done, (function, *arguments) in enumerate(work, 1):
            logging.info("%s %d of %d done (%s)", what, done, len(work), function(*arguments))
        return
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(function, *arguments) for function, *arguments in work]
        try:
            for done, job in enumerate(as_completed(running), 1):
                result = job.result()
                left = (time.monotonic() - started) / done * (len(running) - done)
                logging.info("%s %d of %d done (%s), %.0f min left", what, done, len(running), result, left / 60)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_script(main: Callable[[], None]) -> int:
    """Runs a training script: 0 done, 1 failed (one line on stderr), 130 interrupted (the loop saves its state)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers_logging.set_verbosity_error()
    try:
        main()
    except Interrupted as stop:
        logging.info("%s", stop)
        return 130
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (IcmsrError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
