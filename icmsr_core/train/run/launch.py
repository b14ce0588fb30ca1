"""The main function of the training scripts: configuration, dry run, processes, training, log, exit code."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import logging as diffusers_logging

from ...console import escape_unprintable
from ...errors import IcmsrError
from ...runtime.precision import computes_bf16, use_full_float32
from ..data.pairs import TrainingPairs
from ..data.samples import Samples
from ..tasks.task import Task
from .disk_space import check_disk_space
from .loop import Interrupted, train
from .loop_config import LoopConfig
from .plan import PlannedStage, plan
from .processes import Processes, start_processes
from .run_lock import run_lock

Config = TypeVar("Config")


@dataclass(frozen=True)
class Stage:
    """One call of the loop: a task, what it is trained on, for how long, and where."""

    task: Task
    samples: Samples
    loop: LoopConfig
    folder: Path
    keep_average: bool = False
    """Whether the averaged weights stay in the networks, for the next stage."""


class Training(ABC):
    """What a training script does.

    Making one checks everything that can be checked without reading a weight.
    """

    pairs: TrainingPairs
    """The training data."""
    seed: int
    """Seed of the initial weights."""

    @abstractmethod
    def plan(self) -> Sequence[PlannedStage]:
        """The stages as the dry run describes them."""

    @abstractmethod
    def stages(self, processes: Processes) -> Iterator[Stage]:
        """The stages, with weights. Each is trained before the next one is asked for."""


def run_training(kind: type[Any], prepare: Callable[[Any], Training]) -> None:
    """The main function of a training script.

    `kind` is the dataclass of its configuration (with ``device`` and ``dry_run``), `prepare` makes the `Training`.
    """
    config = parse_config(kind)
    use_full_float32()
    processes = start_processes(config.device)
    training = prepare(config)
    if config.dry_run:
        if processes.main:
            sys.stdout.write(plan(config, training.plan(), training.pairs, processes.count) + "\n")
        return
    for planned in training.plan():
        check_precision(planned.loop.precision, processes.device)
    if processes.main:
        check_disk_space(training.plan(), processes.count)
    torch.manual_seed(training.seed)
    with run_lock(Path(config.run)) if processes.main else nullcontext():
        for stage in training.stages(processes):
            written = train(stage.task, stage.samples, stage.loop, stage.folder, config, processes, stage.keep_average)
            for path in written:
                logging.info("wrote %s", path)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises `IcmsrError` for bf16 on a device that would convert every operand to compute in it; a CPU may."""
    if precision == "bf16" and device.type != "cpu" and not computes_bf16(device):
        raise IcmsrError(
            f"precision must be fp32 on {device}, which has no instructions for bfloat16, got bf16: set precision to "
            "fp32 wherever the configuration has it (and base_dtype to fp32)"
        )


def parse_config(kind: type[Config], arguments: list[str] | None = None) -> Config:
    """A `kind` (a dataclass) from ``--config FILE`` and ``--key.sub=value``; wrong keys and types end with code 2."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    parser = ArgumentParser(description=kind.__doc__)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it override its keys")
    parser.add_class_arguments(kind, None)
    try:
        values = parser.parse_args(arguments)
        values.pop("config", None)
        # Named instantiate_classes before jsonargparse 4.49.
        instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
        config: Config = kind(**vars(instantiate(values)))
    except IcmsrError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # jsonargparse does not expect every value
        reason = " ".join(str(error).split())
        parser.error(f"a value cannot be read ({reason}): compare the file with those in train/configs")
    return config


def run_script(main: Callable[[], None]) -> int:
    """Runs a training script: 0 done, 1 failed (one line on stderr), 130 interrupted (the loop saves its state)."""
    escape_unprintable()
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
