"""Several processes are one process with a larger batch: real ranks on this machine's CPU, over gloo."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from icmsr_core.train.networks.adapters import make_adapter, save_adapter
from tests.support import script_process
from tests.support.model_files import TINY, write_base

pytestmark = pytest.mark.long

# Two tokens: attention over one is constant, and AdamW would make whole steps of what rounding leaves of its gradient.
TWO_TOKENS = replace(TINY, context_tokens=2)
SCRIPT = script_process.ROOT / "train" / "distill.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    script_process.start_server()
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    adapter = save_adapter(folder / "adapter", make_adapter(4, 8, TINY.unet_channels), {}, torch.float32)[0]
    return write_base(folder / "base", TWO_TOKENS), adapter


def arguments(parts: tuple[Path, Path], run: Path, batch: int, images: int = 12, **loop: object) -> list[str]:
    """ICM at every step, two auxiliary steps to one of the generator, all of it in float32."""
    values = {
        "images": images,
        "batch": batch,
        "precision": "fp32",
        "workers": 0,
        "warmup_images": 0,
        "save_every": 1000,
        "log_every": 1000,
        "schedule": "constant",
        "tensorboard": False,
        **loop,
    }
    return [
        f"--run={run}",
        f"--base={parts[0]}",
        "--device=cpu",
        "--data.synthetic=1",
        "--data.crop=32",
        f"--condition.adapters=['{parts[1]}']",
        "--generator.auxiliary_steps=2",
        *(f"--loop.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()),
    ]


def forget_one_player() -> None:
    """What the wrapper must not do: DDP synchronises what is trainable at the time of wrapping, and nothing later."""
    from accelerate import Accelerator

    wrap = Accelerator.prepare_model

    def prepare_model(self: Accelerator, task: torch.nn.Module) -> torch.nn.Module:
        late = list(task.networks.trained("auxiliary").values())
        for parameter in late:
            parameter.requires_grad_(False)
        model = wrap(self, task)
        for parameter in late:
            parameter.requires_grad_(True)
        return model

    Accelerator.prepare_model = prepare_model


def go_past_the_wrapper() -> None:
    """What the loop must not do: call the task itself."""
    from accelerate import Accelerator

    Accelerator.prepare_model = lambda self, task: task


def run_rank(environment: dict[str, str], before: Callable[[], None] | None, words: list[str], log: str) -> None:
    os.environ.update(environment)
    if before is not None:
        before()
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    script_process.shorten_checkpoints()
    sys.argv = [str(SCRIPT), *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Ranks:
    """The processes that a launcher starts, forked from the tests' server, which has the imports behind it."""

    def __init__(
        self, folder: Path, words: Sequence[str], count: int = 2, before: Callable[[], None] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.logs = [folder / f"rank{rank}-{time.monotonic_ns()}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            process = script_process.CONTEXT.Process(
                target=run_rank, args=(environment if count > 1 else {}, before, list(words), str(log))
            )
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Their exit codes."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def output(self) -> str:
        """What they wrote, the last of it."""
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs if log.exists())


def wait_for(path: Path, alive: Callable[[], bool], output: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert alive(), f"ended before {path} was there: {output()}"
        assert time.monotonic() < deadline, f"no {path}: {output()}"
        time.sleep(0.01)


def trained(folder: Path, words: Sequence[str], count: int = 2, before: Callable[[], None] | None = None) -> Path:
    """The run folder after `count` ranks have done their work."""
    ranks = Ranks(folder, words, count, before)
    assert ranks.wait() == [0] * count, ranks.output()
    return folder / "run"


def state_of(run: Path, position: int = 12) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"{position:09d}" / "state.safetensors")


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor], kind: str, player: str) -> float:
    """Norm of the difference over the norm of `wanted`, of all the player's tensors of that kind.

    Of weights only the second LoRA matrices are looked at: they start from 0, so their norm is how far training went.
    """
    chosen = ".lora_B." if kind in ("weight", "average") else ""
    names = [name for name in wanted if name.startswith(f"{kind}/{player}/") and chosen in name]
    assert names
    difference = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in names)
    return (difference / sum(float(wanted[name].double().square().sum()) for name in names)) ** 0.5


# The moments are what the gradients of all steps have made: sums over the samples, in another order and in batches of
# another size, for which the libraries choose other kernels. Float32 rounds each to about 1e-7, the networks make 1e-5
# of it, and AdamW, which divides by the gradient's own size, feeds it into the steps after: up to 8e-4 was measured,
# and 4e-3 in the weights, where entries of next to no gradient have moved as far as all others. A player that is not
# synchronised is 0.37 and more apart.
TOLERANCE = {"exp_avg": 5e-3, "exp_avg_sq": 5e-3, "weight": 2e-2, "average": 2e-2}


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> dict[str, Tensor]:
    """One process with the whole batch."""
    folder = tmp_path_factory.mktemp("whole")
    return state_of(trained(folder, arguments(parts, folder / "run", 4), 1))


@pytest.mark.parametrize(
    ("count", "batch", "accumulate"),
    [(2, 2, 1), (2, 1, 2), (1, 2, 2)],
    ids=["two processes", "two processes that accumulate", "one process that accumulates"],
)
def test_the_split_of_a_batch_does_not_matter(parts, whole, tmp_path, count, batch, accumulate):
    run = trained(tmp_path, arguments(parts, tmp_path / "run", batch, accumulate=accumulate), count)
    found = state_of(run)
    assert found.keys() == whole.keys()
    for player in ("generator", "auxiliary"):
        apart_by = {kind: apart(found, whole, kind, player) for kind in TOLERANCE if kind != "average"}
        assert all(value < TOLERANCE[kind] for kind, value in apart_by.items()), (player, apart_by)
        steps = {float(value) for name, value in found.items() if name.startswith(f"step/{player}/")}
        assert steps == {3.0 if player == "generator" else 6.0}
    assert apart(found, whole, "average", "generator") < TOLERANCE["average"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "lost"), [(forget_one_player, ["auxiliary"]), (go_past_the_wrapper, ["generator", "auxiliary"])]
)
def test_an_unsynchronised_player_would_be_seen(parts, whole, tmp_path, before, lost):
    found = state_of(trained(tmp_path, arguments(parts, tmp_path / "run", 2), 2, before))
    for player in lost:
        apart_by = {kind: apart(found, whole, kind, player) for kind in ("exp_avg", "exp_avg_sq", "weight")}
        assert min(apart_by.values()) > 0.1, (player, apart_by)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(parts, tmp_path):
    """The same command ends, bit for bit, where a run that nobody stopped ends."""

    def words(folder: Path) -> list[str]:
        return arguments(parts, folder / "run", 1, 16, save_every=4)

    stopped = tmp_path / "stopped"
    ranks = Ranks(stopped, words(stopped))
    wait_for(stopped / "run" / "checkpoints" / "000000004", ranks.processes[0].is_alive, ranks.output)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [130, 130], ranks.output()
    assert not (stopped / "run" / "generator.safetensors").exists()
    assert "the same command goes on from here" in ranks.output()
    trained(stopped, words(stopped))
    trained(tmp_path / "straight", words(tmp_path / "straight"))
    found, wanted = (state_of(tmp_path / name / "run", 16) for name in ("stopped", "straight"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.slow
def test_a_launcher_starts_the_ranks_and_hands_the_signal_on(parts, tmp_path):
    """As a user types it; --multi_gpu on a CPU too, because `accelerate launch --cpu` would start one process alone."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
        str(SCRIPT),
    ]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launcher, *arguments(parts, tmp_path / "run", 1, 100_000, save_every=2)],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        checkpoints = tmp_path / "run" / "checkpoints"
        wait_for(checkpoints / "000000002", lambda: process.poll() is None, log.read_text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert "the same command goes on from here" in text
    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert f"stopped at {last} images" in text
    assert last % 2 == 0, "every step is of two processes with one image each"
    assert not list(checkpoints.glob("*.partial"))
