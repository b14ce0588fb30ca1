"""The dry run: what it says, what it checks, and its memory estimate against real steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from icmsr_core.train.networks.conditioning import ConditionConfig
from icmsr_core.train.networks.generator import NetworksConfig
from icmsr_core.train.run.memory import estimate_memory
from icmsr_core.train.tasks.building import build_generator_task
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.train.tasks.task import Batch, Player, Task
from icmsr_core.weights.base import open_base
from tests.support.script_process import ROOT, ScriptProcess

REAL_STEP = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from icmsr_core.weights.base import open_base
from icmsr_core.runtime.precision import autocast
from icmsr_core.train.run import launch  # everything that a run imports, before the first reading
from icmsr_core.train.tasks import building
from icmsr_core.train.networks.conditioning import ConditionConfig
from icmsr_core.train.tasks.generator_config import GeneratorConfig
from icmsr_core.train.networks.generator import NetworksConfig

def peak():
    fields = dict(line.split(":") for line in open("/proc/self/status", encoding="utf-8") if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024

def batch(side):
    return {"sharp": torch.randint(0, 255, (1, 3, side, side), dtype=torch.uint8), "index": torch.tensor([0]),
            "low": torch.randint(0, 255, (1, 3, side // 4, side // 4), dtype=torch.uint8), "caption": torch.tensor([0])}

torch.set_num_threads(2)
base, side = open_base(Path(sys.argv[2])), 256
config = GeneratorConfig(networks=NetworksConfig(base_dtype="bf16"))
parts = (base, config, ConditionConfig(kind="none"), ("",), 0, building.Loading())
imports = peak()
task = building.build_generator_task(*parts)
counts = {player.name: sum(p.numel() for p in player.parameters.values()) for player in task.players()}
optimizers = {p.name: torch.optim.AdamW(p.parameters.values(), lr=5e-5) for p in task.players()}
averages = [p.detach().clone() for p in task.players()[0].parameters.values()]
given = batch(side)
for player in task.players():
    prepared = task.prepare(player.name, given, 0, 0)
    with autocast(torch.device("cpu"), "bf16"):
        losses, brings = task(player.name, prepared)
    losses["loss"].backward()
    optimizers[player.name].step()
    optimizers[player.name].zero_grad()
    given |= brings
    print(player.name, float(losses["loss"]), counts[player.name])
print("PEAK", peak() - imports)
"""


class Product(Task):
    """One matrix, whose step is easily counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000, 1000))

    def players(self) -> list[Player]:
        return [Player("weights", {"weight": self.weight})]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        return batch

    def forward(self, player: str, batch: Batch) -> tuple[dict[str, torch.Tensor], Batch]:
        return {"loss": (batch["x"] @ self.weight).exp().sum()}, {}

    def grid(self, batch: Batch) -> torch.Tensor:
        return batch["x"]

    def export(self, folder: Path, settings: dict[str, object]) -> list[Path]:
        return []


def test_the_estimate_of_a_step_that_can_be_counted():
    memory, counts = estimate_memory(Product, {"x": torch.zeros(2000, 1000)}, "fp32")
    assert counts == {"weights": 1_000_000}
    assert memory.weights == 4_000_000
    assert memory.optimizers == 12_000_000
    # Product and exponential of 8 MB each; in the backward pass their gradient; then that of the matrix.
    assert memory.peak == pytest.approx(24e6, rel=0.2)
    assert memory.total == memory.weights + memory.optimizers + memory.peak


@pytest.mark.slow
def test_more_pictures_take_more_memory_and_checkpointing_less(base):
    folder = open_base(base)

    def estimate(count: int, **networks: object) -> int:
        batch = {
            "sharp": torch.zeros(count, 3, 64, 64, dtype=torch.uint8),
            "caption": torch.zeros(count, dtype=torch.long),
            "low": torch.zeros(count, 3, 16, 16, dtype=torch.uint8),
            "index": torch.arange(count),
        }
        config = GeneratorConfig(networks=NetworksConfig(**networks), losses=LossWeights(perceptual=0))
        parts = (folder, config, ConditionConfig(kind="none"), ("",), 0, None)
        return estimate_memory(lambda: build_generator_task(*parts), batch, "fp32")[0].peak

    one, two, recomputed = estimate(1), estimate(2), estimate(2, checkpointing=True)
    assert two > 1.7 * one
    assert recomputed < 0.6 * two


@pytest.mark.long
def test_the_dry_run_says_what_would_happen_and_writes_nothing(base, tmp_path):
    flags = [
        "--run",
        "run",
        "--base",
        base,
        "--condition.kind=none",
        "--data.synthetic=1",
        "--data.crop=64",
        "--loop.images=1000",
        "--loop.batch=5",
        "--loop.accumulate=2",
        "--dry_run=true",
    ]
    process = ScriptProcess("distill.py", *flags, folder=tmp_path)
    assert process.wait() == 0, process.output()
    text = process.output()
    for words in (
        "kind: none",
        "10 (5 x 2 accumulated x 1 processes)",
        "100 of 10 crops of 64 px",
        "trained, generator",
        "trained, auxiliary",
        "memory, in all",
    ):
        assert words in text, text
    assert not (tmp_path / "run").exists()
    wrong = ScriptProcess("distill.py", *flags, "--condition.kind=icm", folder=tmp_path)
    assert wrong.wait() == 1
    assert "icm needs 1 adapter" in wrong.output()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_step_at_the_size_of_sd21_takes_what_the_dry_run_said(tmp_path):
    """Random weights in the exact shapes, bf16, 256 px, on the CPU; the imports' own memory is not counted."""
    from tests.support.sd_files import write_sd_folder

    base = write_sd_folder(tmp_path / "sd21", "sd21", dtype=torch.bfloat16)
    if open_base(base).prompt_embedding() is None:
        from safetensors.torch import save_file

        save_file({"prompt_embedding": torch.randn(77, 1024)}, base / "prompt_embedding.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", REAL_STEP, ROOT, base],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], int(line[2])) for line in lines[:2]] == [("generator", 4_425_068), ("auxiliary", 4_055_712)]
    flags = [
        "--run",
        "run",
        "--base",
        base,
        "--condition.kind=none",
        "--data.synthetic=1",
        "--data.crop=256",
        "--loop.batch=1",
        "--generator.networks.base_dtype=bf16",
        "--dry_run=true",
    ]
    process = ScriptProcess("distill.py", *flags, folder=tmp_path)
    assert process.wait(600) == 0, process.output()
    said = next(line for line in process.output().splitlines() if "memory, in all" in line)
    predicted, measured = float(said.split()[3]) * 1e9, float(lines[-1][1])
    print(f"predicted {predicted / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert abs(measured - predicted) < 0.25 * measured
