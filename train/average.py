"""Averages the weights of several generators of one base: a generator between them (icmsr_core/weights/averaging.py).

python train/average.py --out between.safetensors --files="['BEFORE.safetensors', 'AFTER.safetensors']" \
    --weights="[0.25, 0.75]"
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.train.tasks.building import training_base
from icmsr_core.weights.averaging import averaged
from icmsr_core.weights.generator_file import load_generator, save_generator


@dataclass(frozen=True)
class Config:
    """Averages generator files of one base, each merged at its fidelity, into one with a single set of weights."""

    out: str
    """The generator file to write; one that is there is not replaced."""
    files: tuple[str, ...]
    """Generator files, two or more."""
    weights: tuple[float, ...] = ()
    """How much each file counts; they add up to 1. Empty: all count the same."""
    fidelity: float = 1.0
    """The fidelity at which files with two sets are merged, 0 to 2."""
    base: str = ""
    """Folder of the base that they belong to; empty for the embedded nano."""


def main() -> None:
    """Everything is checked before the file is written."""
    config = parse_config(Config)
    out = Path(config.out)
    if out.exists():
        raise IcmsrError(f"{out} is there already: name another file")
    if len(config.files) < 2:
        raise IcmsrError(f"files needs two or more generator files, got {list(config.files)}")
    read = (load_generator(Path(file)) for file in config.files)
    generators = [entry.at_fidelity(config.fidelity) if entry.has_two_sets else entry for entry in read]
    weights = config.weights or (1 / len(generators),) * len(generators)
    save_generator(out, averaged(generators, weights, training_base(config.base)))
    logging.info("wrote %s", out)


if __name__ == "__main__":
    sys.exit(run_script(main))
