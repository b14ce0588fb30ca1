"""The training scripts on the pretend device: three steps of each give the weights of the CPU."""

import copy
import runpy
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from icmsr_core.train.run import loop
from icmsr_core.train.run.checkpoint import STATE_FILE, newest_checkpoint
from icmsr_core.weights.embedded import embedded_adapter
from icmsr_core.weights.tensor_files import read_tensors
from tests.support.apart import apart
from tests.support.device_trace import Trace
from tests.support.places import ROOT
from tests.support.platform_rules import Platform
from tests.support.pretend_device import pretend_device
from tests.support.script_process import shorten_checkpoints

pytestmark = pytest.mark.long

STEPS = 3
DATA = ["--data.synthetic=1", "--data.crop=64"]


def three_steps(name: str = "loop") -> list[str]:
    """Flags for three steps of two pictures."""
    values = {
        "images": 2 * STEPS,
        "batch": 2,
        "warmup_images": 2,
        "workers": 0,
        "precision": "fp32",
        "save_every": 2 * STEPS,
        "log_every": 100,
        "tensorboard": "false",
    }
    return [f"--{name}.{key}={value}" for key, value in values.items()]


LOSSES = {
    "perceptual": 1,
    "charbonnier": 0.1,
    "gradient": 0.1,
    "fourier": 0.1,
    "spectrum": 0.1,
    "lattice": 0.1,
    "tone": 0.1,
}
DISTILL = [
    *DATA,
    *three_steps(),
    "--generator.timestep=200",
    "--generator.prediction=residual",
    "--generator.color_fix=true",
    *(f"--generator.losses.{name}={weight}" for name, weight in LOSSES.items()),
    "--condition.kind=icm",
    "--condition.cells=2",
    f"--condition.adapters=['{embedded_adapter()}']",
]
WHOLE = "distillation of whole weights"
RUNS: dict[str, tuple[str, list[str], Sequence[str]]] = {
    "distillation of LoRA": ("distill.py", DISTILL, [""]),
    WHOLE: (
        "distill.py",
        [*DISTILL, "--generator.networks.weights=whole", "--generator.networks.checkpointing=true"],
        [""],
    ),
    "an adapter": ("adapter.py", [*DATA, *three_steps(), "--adapter.kind=icm"], [""]),
    "a prior": (
        "prior.py",
        [
            *DATA,
            *three_steps("autoencoder"),
            *three_steps("prior"),
            "--networks.latent_channels=4",
            "--networks.vae_channels=[32,64]",
            "--networks.unet_channels=[32,64]",
        ],
        ["autoencoder", "prior"],
    ),
}
"""Script, flags, and the folders in the run's that hold checkpoints."""
EVERY_DAY: list[tuple[str, Platform]] = [("distillation of LoRA", "cuda"), ("an adapter", "mps")]
SELDOM: list[tuple[str, Platform]] = [
    ("distillation of LoRA", "mps"),
    (WHOLE, "cuda"),
    ("an adapter", "cuda"),
    ("a prior", "cuda"),
    ("a prior", "mps"),
]
"""Run with `-m slow`: their layers are those of the others, and they take as long."""


def train_on_both(run: str, platform: Platform, folder: Path) -> list[Trace]:
    """Runs the script on the CPU and under the rules of the platform; returns what the steps asked of the device."""
    script, flags, _ = RUNS[run]
    # Where a gradient is hardly more than its rounding error, the usual 1e-8 makes a full step of that error.
    torch.optim.AdamW = partial(torch.optim.AdamW, eps=1e-3)
    shorten_checkpoints()
    with pretend_device(platform) as device:
        run_script(script, folder / "cpu", "cpu", flags)
        with noted_steps(device.trace) as steps:
            run_script(script, folder / platform, "pretend", flags)
    return steps


def run_script(script: str, folder: Path, device: str, flags: list[str]) -> None:
    sys.argv = [script, f"--run={folder}", f"--device={device}", *flags]
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train" / script), run_name="__main__")
    assert end.value.code == 0, folder.name


@contextmanager
def noted_steps(trace: Trace) -> Iterator[list[Trace]]:
    """Collects what `trace` holds of every step of the loop in the block."""
    take_step, steps = loop.take_step, []

    def traced(*arguments: Any) -> Any:
        trace.clear()
        result = take_step(*arguments)
        steps.append(copy.deepcopy(trace))
        return result

    loop.take_step = traced
    yield steps
    loop.take_step = take_step


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and the optimisers' moments in the newest checkpoint of `folder`."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    return read_tensors(newest / STATE_FILE)[0]


def kind_of(name: str) -> str:
    """Whose values a tensor of a checkpoint holds, and which: weights, moments, ..."""
    return "/".join(name.split("/")[:2])


@pytest.mark.parametrize(
    ("run", "platform"), [*EVERY_DAY, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)]
)
def test_three_steps_give_the_weights_of_the_cpu(run: str, platform: Platform, tmp_path: Path) -> None:
    steps = apart(train_on_both, run, platform, tmp_path)
    for folder in RUNS[run][2]:
        expected, found = weights_of(tmp_path / "cpu" / folder), weights_of(tmp_path / platform / folder)
        assert set(found) == set(expected)
        scale: dict[str, float] = defaultdict(float)
        for name, value in expected.items():
            scale[kind_of(name)] = max(scale[kind_of(name)], float(value.abs().max()))
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5 * scale[kind_of(name)], (platform, name)
    if platform == "cuda":
        check_last_step(steps[-1], optimiser_steps=2 if run.startswith("distillation") else 1)


def check_last_step(step: Trace, optimiser_steps: int) -> None:
    """Each optimiser step waits once, to see whether its gradient is finite; what is copied does not wait."""
    assert step.synchronisations.total() == optimiser_steps, step.summary()
    assert all(one.direction == "to device" and one.pinned and not one.blocking for one in step.copies)
    assert step.copies
