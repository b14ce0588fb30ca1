"""Trains the T2I-Adapter that conditions teacher and auxiliary, on a frozen base.

python train/adapter.py --config train/configs/nano_adapter.yaml
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.run.launch import Stage, Training, run_script, run_training
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.plan import PlannedStage
from icmsr_core.train.run.processes import Processes
from icmsr_core.train.settings import FREE, UNRECORDED
from icmsr_core.train.tasks.adapter import AdapterConfig, AdapterTask
from icmsr_core.train.tasks.building import Loading, build_adapter_task, check_run, training_base


@dataclass(frozen=True)
class Config:
    """A T2I-Adapter: RUN/adapter (a diffusers folder) and RUN/adapter.safetensors are the result."""

    run: str = field(metadata=FREE)
    """Run folder; the same command resumes it."""
    base: str = ""
    """Base folder: a diffusers folder, or what train/prior.py writes; empty for the embedded nano."""
    device: str = field(default="auto", metadata=FREE)
    """auto, cpu, cuda, cuda:1, ... (several processes: what accelerate gives each)."""
    dry_run: bool = field(default=False, metadata=UNRECORDED)
    """Check everything, print the plan with parameters and memory, and load no weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pictures; they are not degraded here."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapter and its condition."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Training."""


class AdapterTraining(Training):
    """The one stage of this script."""

    def __init__(self, config: Config) -> None:
        self.config, self.seed = config, config.loop.seed
        self.base = training_base(config.base)
        check_run(self.base, config.data, config.loop.precision, config.adapter.base_dtype)
        self.pairs = TrainingPairs(config.data, self.seed, degraded=False)

    def plan(self) -> Sequence[PlannedStage]:
        """See `Training`."""
        return [PlannedStage("adapter", self.config.loop, lambda: self._task(None), Path(self.config.run))]

    def stages(self, processes: Processes) -> Iterator[Stage]:
        """See `Training`."""
        run = Path(self.config.run)
        task = self._task(Loading(processes.device, run / "prompts.safetensors"))
        logging.info("base %s, %d photographs, %s", self.base.info.name, len(self.pairs.photographs), processes.device)
        yield Stage(task, self.pairs, self.config.loop, run)

    def _task(self, loading: Loading | None) -> AdapterTask:
        return build_adapter_task(self.base, self.config.adapter, self.seed, loading)


def main() -> None:
    """Trains what the command line asks for."""
    run_training(Config, AdapterTraining)


if __name__ == "__main__":
    sys.exit(run_script(main))
