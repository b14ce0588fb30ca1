"""Trains a one-step generator on a base model and writes its generator file.

    python train/distill.py --config train/configs/nano_distill.yaml
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from icmsr_core.base_folder import open_base
from icmsr_core.device import pick_device
from icmsr_core.diffusers_backbone import build_networks
from icmsr_core.embedded import embedded_base
from icmsr_core.errors import IcmsrError
from icmsr_core.train.data import DataConfig, TrainingPairs
from icmsr_core.train.generator import GeneratorConfig, GeneratorTask
from icmsr_core.train.loop import LoopConfig, train
from icmsr_core.train.script import parse_config, run_script, settings_of


@dataclass(frozen=True)
class Config:
    """A one-step generator: RUN/generator.safetensors is the result."""

    run: str
    """Run folder; the same command resumes it."""
    base: str = ""
    """Base folder, as train/prior.py writes it; empty for the embedded nano."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pictures."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The generator and its losses."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Training."""


def main() -> None:
    """Everything that can be wrong in the configuration is found before the data is read."""
    config = parse_config(Config)
    device, settings = pick_device(config.device), settings_of(config)
    base = open_base(Path(config.base) if config.base else embedded_base())
    context = base.prompt_embedding()
    if context is None:
        raise IcmsrError(f"{base.path}: the base holds no prompt embedding")
    pairs = TrainingPairs(config.data, config.loop.seed)
    torch.manual_seed(config.loop.seed)
    unet, vae = (network.to(device) for network in build_networks(base))
    task = GeneratorTask(unet, vae, base, context.to(device), config.generator, settings)
    logging.info("base %s, %d photographs, %s", base.info.name, len(pairs.photographs), device)
    for path in train(task, pairs, config.loop, Path(config.run), settings, device):
        logging.info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(run_script(main))
