"""Compares generators trained with the regulariser under different conditions, and without it, at one budget.

python train/ablation.py --config train/configs/ablation.yaml --data.folders="['PHOTOS']" --pairs PAIRS
"""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.train.experiments.ablation import (
    ARMS,
    REFERENCES,
    check_ablation,
    prepare_photographs,
    run_arm,
    run_reference,
    train_adapter,
    train_start,
)
from icmsr_core.train.experiments.ablation import AblationConfig as Config
from icmsr_core.train.experiments.ablation_report import load_results, markdown, write_report
from icmsr_core.train.experiments.jobs import run_jobs
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.train.settings import plain_settings
from icmsr_core.whole_file import replace_file

FREE_KEYS = ("run", "jobs", "device", "arms", "seeds")
"""Settings that a run folder may be taken up again with: they change none of the results that are there."""


def run_one(config: Config, name: str, seed: int) -> str:
    """One run of an arm, in a process of its own or not."""
    torch.set_num_threads(1)
    return run_arm(config, name, seed)


def adapt(config: Config, name: str) -> str:
    """The adapter of an arm, in a process of its own or not."""
    torch.set_num_threads(1)
    return train_adapter(config, name)


def main() -> None:
    """Adapters, the common start, then every run that has no result yet, then the report."""
    config = parse_config(Config)
    check_ablation(config)
    settings = {key: value for key, value in plain_settings(config).items() if key not in FREE_KEYS}
    mark, known = json.dumps(settings, default=str, sort_keys=True, indent=1), config.folder("config.json")
    if known.exists() and known.read_text(encoding="utf-8") != mark:
        raise IcmsrError(f"{config.run}: was started with another configuration: choose another run folder")
    replace_file(known, mark.encode())
    prepare_photographs(config)
    seeing = [name for name in config.arms if (structure := ARMS[name].structure) is not None and structure.names]
    run_jobs(config.jobs, [(adapt, config, name) for name in seeing], "adapters:")
    logging.info("adapters and photographs are there")
    logging.info("the common start is %s", train_start(config))
    references = [(run_reference, config, name) for name in REFERENCES if not config.result_file(name, 0).exists()]
    run_jobs(1, references, "references:")
    # Seed by seed: what is there when a run is stopped compares all arms.
    arms = [
        (run_one, config, name, seed)
        for seed in config.seeds
        for name in config.arms
        if not config.result_file(name, seed).exists()
    ]
    run_jobs(config.jobs, arms, "runs:")
    results = load_results(config)
    written = write_report(results, config)
    print(markdown(results))
    for path in written:
        logging.info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(run_script(main))
