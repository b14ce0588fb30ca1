"""Trains the T2I-Adapter that conditions teacher and auxiliary, on a frozen base.

python train/adapter.py --config train/configs/nano_adapter.yaml
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from icmsr_core.train.data.pairs import DataConfig, TrainingPairs
from icmsr_core.train.run.launch import parse_config, plan, run_script, settings_of
from icmsr_core.train.run.loop import train
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.processes import start_processes
from icmsr_core.train.tasks.adapter import AdapterConfig
from icmsr_core.train.tasks.building import build_adapter_task, check_run, training_base


@dataclass(frozen=True)
class Config:
    """A T2I-Adapter: RUN/adapter (a diffusers folder) and RUN/adapter.safetensors are the result."""

    run: str
    """Run folder; the same command resumes it."""
    base: str = ""
    """Base folder: a diffusers folder, or what train/prior.py writes; empty for the embedded nano."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ... (several processes: what accelerate gives each)."""
    dry_run: bool = False
    """Check everything, print the plan with parameters and memory, and load no weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pictures; they are not degraded here."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapter and its condition."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Training."""


def main() -> None:
    """Everything that can be wrong in the configuration is found before a weight is read."""
    config = parse_config(Config)
    settings, run, seed = settings_of(config), Path(config.run), config.loop.seed
    processes = start_processes(config.device)
    base = training_base(config.base)
    check_run(base, config.data, config.loop.precision, config.adapter.base_dtype)
    pairs = TrainingPairs(config.data, seed, degraded=False)
    parts = (base, config.adapter, seed, settings)
    if config.dry_run:
        stage = ("adapter", config.loop, lambda: build_adapter_task(*parts, weights=False))
        if processes.main:
            print(plan(settings, [stage], pairs, processes.count))
        return
    torch.manual_seed(seed)
    task = build_adapter_task(*parts, device=processes.device, prompt_cache=run / "prompts.safetensors")
    logging.info("base %s, %d photographs, %s", base.info.name, len(pairs.photographs), processes.device)
    for path in train(task, pairs, config.loop, run, settings, processes):
        logging.info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(run_script(main))
