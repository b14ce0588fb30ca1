"""What the regulariser's condition does to the generator: the ablation, at one budget for every arm.

The base's own prior is the teacher; every condition gets an adapter of its own, trained on it. From one common start,
a generator trained by reconstruction losses alone, every arm and seed goes on for the same number of images with the
real task and loop: by reconstruction alone, or with ICM under one of the conditions. Everything else is the same: the
losses and their weights, the images of a seed, the learning rates. Each result is then measured on whole pictures,
through the path that inference takes (`one_step.upscale`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import IcmsrError
from ...measures.metrics import metric
from ...weights.generator_file import holds_two_sets
from ...whole_file import replace_file
from ..data.data_config import DataConfig
from ..data.pairs import TrainingPairs
from ..networks.conditioning import ConditionConfig, StructureConfig
from ..run.logs import METRICS_FILE, read_metrics
from ..run.loop import train
from ..run.loop_config import LoopConfig
from ..run.processes import start_processes
from ..tasks.adapter import AdapterConfig
from ..tasks.building import (
    Loading,
    build_adapter_task,
    build_generator_task,
    check_generator,
    check_run,
    training_base,
)
from ..tasks.generator_config import GeneratorConfig
from .ablation_pictures import make_photographs, measure_pictures, pairs_of

START = "start"
BICUBIC = "bicubic"
REFERENCES = (BICUBIC, START)
"""Measured along with the arms: no network at all, and the start that the arms have in common."""
PHOTOGRAPHS, PAIRS = "photographs", "pairs"
CURVES = {
    "psnr": "loss/generator/psnr",
    "perceptual": "loss/generator/perceptual",
    "auxiliary": "loss/auxiliary/loss",
}
"""What a result keeps of the training log, besides the diagnostics."""
NOISE_BINS = ("0.2-0.4", "0.4-0.6", "0.6-0.8")
"""Bins of t / T at which the diagnostics say whether the regulariser has collapsed (see `icm.diagnostics`)."""


@dataclass(frozen=True)
class Arm:
    """One arm of the ablation."""

    name: str
    """What tables and plots call it."""
    structure: StructureConfig | None
    """What teacher and auxiliary see; None: without a regulariser."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("reconstruction", None),
        Arm("none", StructureConfig("none")),
        Arm("colormap", StructureConfig("colormap", cells=8)),
        Arm("edges", StructureConfig("edges")),
        Arm("icm", StructureConfig("icm", cells=8)),
        Arm("image", StructureConfig("image")),
    )
}
"""By name: no regulariser, one without a condition (what a text-free base has in place of text), and the conditions."""


@dataclass(frozen=True)
class AblationConfig:
    """The ablation of the regulariser's condition: table, plots and every value in RUN/report."""

    run: str
    """Run folder; the same command goes on with what is not yet there."""
    base: str = ""
    """Base folder: its prior is the teacher, its VAE the generator's decoder; empty for the embedded nano."""
    pairs: str = ""
    """Folder of real pairs, with lr/ and hr/ of the same file names, to measure on as well; empty: none."""
    every: int = 4
    """Every how many of the pairs, in the order of their names, is measured."""
    photographs: int = 12
    """Held-out photographs to measure on: the middle of each, degraded with the preset `light`."""
    side: int = 512
    """Side of these in pixels."""
    metrics: tuple[str, ...] = ("psnr", "ssim", "fsim", "dss", "srsim", "hf")
    """What is measured (see `icmsr evaluate`), besides the shift of the mean colour."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to run, by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the arms: their samples and noise."""
    jobs: int = 1
    """Processes, each on one core."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    data: DataConfig = field(default_factory=DataConfig)
    """Photographs; data.hold_out of them are kept for measuring, out of the adapters' and the arms' training."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The generator and its losses; losses.icm is the weight in the arms that have a regulariser. With networks.start,
    the arms begin from that file, and none is trained for them."""
    adapter: LoopConfig = field(default_factory=LoopConfig)
    """Training of every condition's adapter."""
    start: LoopConfig = field(default_factory=LoopConfig)
    """Training of the common start."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Training of every arm; its seed is not used."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms:
            raise IcmsrError(f"arms must be among {', '.join(ARMS)}, got {list(self.arms)}")
        if not self.seeds:
            raise IcmsrError("seeds is empty: name one or more")
        for name in ("jobs", "every", "photographs"):
            if getattr(self, name) < 1:
                raise IcmsrError(f"{name} must be at least 1, got {getattr(self, name)}")
        scale = self.data.scale
        if self.side < 64 or self.side % scale:
            raise IcmsrError(f"side must be a multiple of {scale} from 64 up, got {self.side}: try 512")
        if not self.data.hold_out:
            raise IcmsrError("data.hold_out is 0: nothing is left to measure on, set it to 0.15")
        if self.generator.networks.weights != "whole" or not self.generator.losses.icm:
            raise IcmsrError(
                "generator.networks.weights must be whole and generator.losses.icm above 0, got "
                f"{self.generator.networks.weights} and {self.generator.losses.icm:g}: use train/configs/ablation.yaml"
            )

    def folder(self, *parts: str) -> Path:
        """A place in the run folder."""
        return Path(self.run, *parts)

    def result_file(self, arm: str, seed: int) -> Path:
        """Where the values of one run of an arm are kept."""
        return self.folder("results", arm, f"{seed}.json")


def check_ablation(config: AblationConfig) -> None:
    """Raises `IcmsrError` for what can be seen to be wrong before a weight is read."""
    base = training_base(config.base)
    for loop in (config.adapter, config.start, config.loop):
        check_run(base, config.data, loop.precision, config.generator.networks.base_dtype)
    check_generator(base, config.generator, ConditionConfig("none"))
    TrainingPairs(config.data, 0, held_out=True)
    for name in config.metrics:
        metric(name).prepare()
    if config.pairs:
        pairs_of(Path(config.pairs), config.every)


def train_adapter(config: AblationConfig, arm: str) -> str:
    """Trains the adapter of an arm that has one, into RUN/adapters/ARM, if it is not there; returns the arm."""
    structure = ARMS[arm].structure
    assert structure is not None
    if not _adapter_file(config, arm).is_file():
        wanted = AdapterConfig(**{part.name: getattr(structure, part.name) for part in fields(StructureConfig)})
        settings = _settings(config, config.adapter, adapter=wanted)
        pairs = TrainingPairs(config.data, config.adapter.seed, degraded=False)
        processes = start_processes(config.device)
        torch.manual_seed(config.adapter.seed)
        base = training_base(config.base)
        task = build_adapter_task(base, wanted, config.adapter.seed, Loading(processes.device))
        folder = config.folder("adapters", arm)
        train(task, pairs, config.adapter, folder, settings, processes)
    return arm


def _adapter_file(config: AblationConfig, arm: str) -> Path:
    return config.folder("adapters", arm, "adapter.safetensors")


def train_start(config: AblationConfig) -> Path:
    """The generator file that all arms begin from: of reconstruction losses alone, trained if it is not there."""
    if config.generator.networks.start:
        return Path(config.generator.networks.start)
    file = config.folder(START, "generator.safetensors")
    if not file.is_file():
        _train(config, config.folder(START), config.start, _without_icm(config.generator), ConditionConfig("none"))
    return file


def run_arm(config: AblationConfig, name: str, seed: int) -> str:
    """Trains and measures one run of an arm, into its result file."""
    arm, folder = ARMS[name], config.folder("runs", name, str(seed))
    networks = replace(config.generator.networks, start=str(train_start(config)))
    generator, condition = replace(config.generator, networks=networks), ConditionConfig("none")
    if arm.structure is None:
        generator = _without_icm(generator)
    elif arm.structure.names:
        condition = ConditionConfig(**asdict(arm.structure), adapters=(str(_adapter_file(config, name)),))
    _train(config, folder, replace(config.loop, seed=seed), generator, condition)
    pictures = config.folder("pictures", name) if seed == config.seeds[0] else None
    values = evaluate(config, folder / "generator.safetensors", pictures) | read_training(folder)
    replace_file(config.result_file(name, seed), json.dumps(values).encode())
    return f"{name}, seed {seed}"


def run_reference(config: AblationConfig, name: str) -> str:
    """Measures one of `REFERENCES`, into its result file."""
    values = evaluate(config, train_start(config) if name == START else None, config.folder("pictures", name))
    replace_file(config.result_file(name, 0), json.dumps(values).encode())
    return name


def prepare_photographs(config: AblationConfig) -> Path:
    """The folder RUN/photographs with the held-out pictures to measure on, made if it is not there."""
    held_out = TrainingPairs(config.data, 0, held_out=True).photographs
    return make_photographs(config.folder(PHOTOGRAPHS), held_out, config.photographs, config.side)


def evaluate(config: AblationConfig, generator: Path | None, pictures: Path | None) -> dict[str, Any]:
    """The values of a generator, or of bicubic resizing, on the ``photographs`` and, if there are any, the ``pairs``.

    The results for the photographs are written into the folder `pictures`.
    """
    sets = {PHOTOGRAPHS: pairs_of(prepare_photographs(config))}
    if config.pairs:
        sets[PAIRS] = pairs_of(Path(config.pairs), config.every)
    # Of a start with two sets of weights, the arms go on from the faithful one.
    faithful = 0.0 if generator is not None and holds_two_sets(generator) else None
    base = training_base(config.base).path
    return dict(measure_pictures(base, generator, sets, config.metrics, PHOTOGRAPHS, pictures, faithful))


def read_training(run: Path) -> dict[str, Any]:
    """From a run's log: ``diagnostics``, means over `NOISE_BINS` and the last quarter, and ``curve``, line by line."""
    rows = read_metrics(run / METRICS_FILE)
    names = sorted({key.split("/")[1] for row in rows for key in row if key.startswith("icm/")})
    curve = []
    for row in rows:
        point: dict[str, Any] = {"images": row["images"]}
        point |= {name: row[key] for name, key in CURVES.items() if row.get(key) is not None}
        for name in names:
            found = [row[f"icm/{name}/{level}"] for level in NOISE_BINS if row.get(f"icm/{name}/{level}") is not None]
            if found:
                point[name] = sum(found) / len(found)
        curve.append(point)
    last = [point for point in curve if point["images"] > 0.75 * curve[-1]["images"]]
    diagnostics = {name: float(np.mean([point[name] for point in last if name in point])) for name in names}
    return {"diagnostics": diagnostics, "curve": curve}


def _train(
    config: AblationConfig, folder: Path, loop: LoopConfig, generator: GeneratorConfig, condition: ConditionConfig
) -> None:
    base = training_base(config.base)
    check_generator(base, generator, condition)
    pairs = TrainingPairs(config.data, loop.seed)
    settings = _settings(config, loop, condition=condition, generator=generator)
    processes = start_processes(config.device)
    torch.manual_seed(loop.seed)  # the auxiliary's first weights
    task = build_generator_task(base, generator, condition, pairs.captions, loop.seed, Loading(processes.device))
    train(task, pairs, loop, folder, settings, processes)


def _without_icm(generator: GeneratorConfig) -> GeneratorConfig:
    return replace(generator, losses=replace(generator.losses, icm=0.0))


def _settings(config: AblationConfig, loop: LoopConfig, **parts: Any) -> dict[str, Any]:
    """The settings of one training."""
    return {"base": config.base, "data": config.data, **parts, "loop": loop}
