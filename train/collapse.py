"""Measures whether dense conditions collapse the regulariser and sparse ones do not (the paper's Lemma 1).

python train/collapse.py --config train/configs/collapse.yaml --data.folders="['PHOTOS']"
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.experiments.collapse import Bench
from icmsr_core.train.experiments.collapse_config import COLLAPSE_ARMS, CollapseArm, CollapseConfig, adapter_stem
from icmsr_core.train.experiments.collapse_crops import load_crops
from icmsr_core.train.experiments.collapse_report import markdown, write_report
from icmsr_core.train.experiments.jobs import run_jobs
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.train.settings import plain_settings
from icmsr_core.whole_file import replace_file


@dataclass(frozen=True)
class Config:
    """The collapse experiment: table and plots in RUN/report."""

    run: str
    """Run folder; the same command goes on with what is not yet there."""
    jobs: int = 2
    """Processes, each on one core."""
    data: DataConfig = field(default_factory=DataConfig)
    """Photographs; data.hold_out of them are kept for the diagnostics."""
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    """Size of the experiment."""


def train_adapter(config: Config, name: str) -> str:
    """The adapter of one condition."""
    torch.set_num_threads(1)
    structure = arm_named(name).structure
    bench(config, 0).features(structure, adapter_file(config, name))
    return name


def run_arm(config: Config, seed: int, name: str) -> str:
    """One condition with one seed, into its result file."""
    torch.set_num_threads(1)
    arm, made = arm_named(name), bench(config, 1 + seed)
    values = made.run(arm, made.features(arm.structure, adapter_file(config, name)))
    replace_file(result_file(config, seed, name), json.dumps(values).encode())
    return f"{name}, seed {seed}"


def bench(config: Config, seed: int) -> Bench:
    """Crops and networks, made if they are not there."""
    run = Path(config.run)
    made = Bench(config.collapse, *load_crops(config.collapse, config.data, run / "crops.safetensors"), seed)
    made.prepare(run / "networks.safetensors")
    return made


def arm_named(name: str) -> CollapseArm:
    """The arm of that name."""
    return next(arm for arm in COLLAPSE_ARMS if arm.name == name)


def adapter_file(config: Config, name: str) -> Path:
    """Where the adapter of a condition is kept; the two "image" arms share one, trained on the truth."""
    return Path(config.run) / "adapters" / f"{adapter_stem(arm_named(name).structure)}.safetensors"


def result_file(config: Config, seed: int, name: str) -> Path:
    """Where the values of an arm are kept."""
    return Path(config.run) / "results" / str(seed) / f"{name.replace(' ', '_')}.json"


def main() -> None:
    """Crops, teacher and generator, adapters, then every arm that has no result yet, then the report."""
    config = parse_config(Config)
    run, collapse = Path(config.run), config.collapse
    if config.jobs < 1:
        raise IcmsrError(f"jobs must be at least 1, got {config.jobs}")
    if config.data.crop != collapse.crop or config.data.synthetic or not config.data.hold_out:
        raise IcmsrError(
            f"data.crop must be collapse.crop ({collapse.crop}), data.synthetic 0 and data.hold_out above 0, got "
            f"{config.data.crop}, {config.data.synthetic} and {config.data.hold_out}: use train/configs/collapse.yaml"
        )
    TrainingPairs(config.data, 0, held_out=True)
    settings = {key: value for key, value in plain_settings(config).items() if key not in ("run", "jobs")}
    mark, known = json.dumps(settings, default=str, sort_keys=True, indent=1), run / "config.json"
    if known.exists() and known.read_text(encoding="utf-8") != mark:
        raise IcmsrError(f"{run}: was started with another configuration: choose another run folder")
    replace_file(known, mark.encode())
    load_crops(collapse, config.data, run / "crops.safetensors")
    logging.info("crops are there")
    bench(config, 0)
    logging.info("teacher and generator are there")
    wanted = {adapter_file(config, name): name for name in collapse.conditions if arm_named(name).structure.names}
    work = [(train_adapter, config, name) for file, name in wanted.items() if not file.exists()]
    run_jobs(config.jobs, work, "adapters:")
    arms = [
        (run_arm, config, seed, name)
        for seed in collapse.seeds
        for name in collapse.conditions
        if not result_file(config, seed, name).exists()
    ]
    run_jobs(config.jobs, arms, "arms:")
    results = {
        name: {seed: json.loads(result_file(config, seed, name).read_text(encoding="utf-8")) for seed in collapse.seeds}
        for name in collapse.conditions
    }
    written = write_report(results, run / "report")
    print(markdown(results))
    for path in written:
        logging.info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(run_script(main))
