"""Trains a one-step generator on a base model and writes its generator file.

python train/distill.py --config train/configs/nano_distill.yaml
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.precision import autocast, lay_out
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.latent_pairs import LatentPairs, LatentPairsConfig
from icmsr_core.train.data.latents import weights_hash
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.samples import Samples, last_samples
from icmsr_core.train.networks.conditioning import ConditionConfig
from icmsr_core.train.run.launch import Stage, Training, run_script, run_training
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.plan import PlannedStage
from icmsr_core.train.run.processes import Processes
from icmsr_core.train.settings import ADDED, FREE, UNRECORDED
from icmsr_core.train.tasks.building import (
    Loading,
    build_generator_task,
    check_generator,
    check_latent_pairs,
    check_run,
    training_base,
)
from icmsr_core.train.tasks.generator import GeneratorTask
from icmsr_core.train.tasks.generator_config import GeneratorConfig
from icmsr_core.train.tasks.teacher_test import TeacherTest

PROBE_SAMPLES = 32
"""Samples on which the generator's latents are compared with the truth's at every checkpoint."""


@dataclass(frozen=True)
class Config:
    """A one-step generator: RUN/generator.safetensors is the result."""

    run: str = field(metadata=FREE)
    """Run folder; the same command resumes it."""
    base: str = ""
    """Base folder: a diffusers folder, or what train/prior.py writes; empty for the embedded nano."""
    device: str = field(default="auto", metadata=FREE)
    """auto, cpu, cuda, cuda:1, ... (several processes: what accelerate gives each)."""
    dry_run: bool = field(default=False, metadata=UNRECORDED)
    """Check everything, print the plan with parameters and memory, and load no weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pictures."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """What teacher and auxiliary see."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The generator, its losses and the auxiliary."""
    latents: LatentPairsConfig = field(default_factory=LatentPairsConfig, metadata=ADDED)
    """Train on pairs of latents that are encoded once, before it starts: many more samples an hour."""
    teacher_test: bool = field(default=False, metadata=ADDED)
    """Leave the generator as it is, train the auxiliary alone, and write RUN/teacher_test.md: whether the teacher knows
    the generator's latents and asks for more detail. Try it before training with ICM."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Training."""


class Distillation(Training):
    """The one stage of this script."""

    def __init__(self, config: Config) -> None:
        self.config, self.seed = config, config.loop.seed
        self.base = training_base(config.base)
        check_run(self.base, config.data, config.loop.precision, config.generator.networks.base_dtype)
        check_generator(self.base, config.generator, config.condition)
        if config.teacher_test and not config.generator.losses.icm:
            raise IcmsrError("teacher_test needs a teacher: set generator.losses.icm above 0")
        if config.latents.pairs:
            check_latent_pairs(config.generator, config.condition)
        self.pairs = TrainingPairs(config.data, self.seed)

    def plan(self) -> Sequence[PlannedStage]:
        """See `Training`."""
        return [PlannedStage("distillation", self.config.loop, lambda: self._task(None), Path(self.config.run))]

    def stages(self, processes: Processes) -> Iterator[Stage]:
        """See `Training`."""
        run = Path(self.config.run)
        task = self._task(Loading(processes.device, run / "prompts.safetensors"))
        logging.info("base %s, %d photographs, %s", self.base.info.name, len(self.pairs.photographs), processes.device)
        samples = self._samples(task.to(processes.device), processes)
        if processes.main:
            task.probe = last_samples(samples, PROBE_SAMPLES)
        yield Stage(task, samples, self.config.loop, run)

    def _samples(self, task: GeneratorTask, processes: Processes) -> Samples:
        """What the generator is trained on: pairs of pictures, or of latents."""
        if not self.config.latents.pairs:
            return self.pairs
        networks, device, precision = task.networks, processes.device, self.config.latents.precision

        def encode(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with autocast(device, precision):
                return task.latents_of({name: value.to(device) for name, value in batch.items()})

        def latent_pairs() -> LatentPairs:
            for vae in (networks.generator_vae, networks.vae):
                lay_out(vae, precision)
            encoders = weights_hash(networks.generator_vae) + weights_hash(networks.vae)
            encoders += "" if precision == "fp32" else precision
            file = Path(self.config.run) / "latents" / "pairs.safetensors"
            workers = self.config.loop.workers
            return LatentPairs(self.pairs, self.config.latents.pairs, file, encode, encoders, workers)

        if processes.main:
            latent_pairs()
        processes.wait()  # the others read the file that the main process has written
        return latent_pairs()

    def _task(self, loading: Loading | None) -> GeneratorTask:
        config = self.config
        kind = TeacherTest if config.teacher_test else GeneratorTask
        return build_generator_task(
            self.base, config.generator, config.condition, self.pairs.captions, self.seed, loading, kind
        )


def main() -> None:
    """Trains what the command line asks for."""
    run_training(Config, Distillation)


if __name__ == "__main__":
    sys.exit(run_script(main))
