"""Averages the weights of several generators of one base: a generator between them (icmsr_core/weights/averaging.py).

python train/average.py --out between.safetensors --files="['BEFORE.safetensors', 'AFTER.safetensors']" \
    --weights="[0.25, 0.75]"
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.train.tasks.building import training_base
from icmsr_core.weights.averaging import averaged, with_realistic
from icmsr_core.weights.generator_file import Generator, load_generator, save_generator


@dataclass(frozen=True)
class Config:
    """Averages generator files of one base, each merged at a fidelity; the realistic set of one can go on top."""

    out: str
    """The generator file to write; one that is there is not replaced."""
    files: tuple[str, ...]
    """Generator files, two or more."""
    weights: tuple[float, ...] = ()
    """How much each file counts; they add up to 1. Empty: all count the same."""
    fidelities: tuple[float, ...] = ()
    """For each file with two sets, in their order, the fidelity at which it is merged, 0 to 2. Empty: 1 for all."""
    realistic: str = ""
    """Generator file with two sets, whose realistic set is laid on the average. Empty: the result has one set."""
    strength: float = 1.0
    """How much of that set fidelity 1 applies: 1 is what it was trained as."""
    base: str = ""
    """Folder of the base that they belong to; empty for the embedded nano."""


def at_fidelities(generators: Sequence[Generator], fidelities: Sequence[float]) -> list[Generator]:
    """`generators`, those with two sets at one of `fidelities` each, or all at 1.

    Raises `IcmsrError` for a wrong count.
    """
    two = sum(entry.has_two_sets for entry in generators)
    if fidelities and len(fidelities) != two:
        raise IcmsrError(f"fidelities needs one value for each file with two sets, {two}, got {list(fidelities)}")
    left = iter(fidelities or (1.0,) * two)
    return [entry.at_fidelity(next(left)) if entry.has_two_sets else entry for entry in generators]


def main() -> None:
    """Everything is checked before the file is written."""
    config = parse_config(Config)
    out = Path(config.out)
    if out.exists():
        raise IcmsrError(f"{out} is there already: name another file")
    if len(config.files) < 2:
        raise IcmsrError(f"files needs two or more generator files, got {list(config.files)}")
    if config.strength != 1 and not config.realistic:
        raise IcmsrError(f"strength is for a realistic set, got {config.strength}: name its file with --realistic")
    generators = at_fidelities([load_generator(Path(file)) for file in config.files], config.fidelities)
    weights = config.weights or (1 / len(generators),) * len(generators)
    made = averaged(generators, weights, training_base(config.base))
    if config.realistic:
        made = with_realistic(made, load_generator(Path(config.realistic)), config.strength)
    save_generator(out, made)
    logging.info("wrote %s", out)


if __name__ == "__main__":
    sys.exit(run_script(main))
