"""Training scripts in processes of their own, forked from a server that has imported the heavy libraries already.

Starting Python anew takes five to fifteen seconds of imports for every run; a fork of the server takes none. All else
is as from a shell: own process group, own arguments, working folder and streams, exit codes and signals.
"""

import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.places import ROOT

SCRIPTS = ROOT / "train"
INTERRUPTED = (130, -signal.SIGINT)
"""How a command ends after Ctrl-C; a shell shows 130 for both. Python chooses the second when the signal met code that
is made at run time (`exec` of a text, as in a dataclass that is being imported), even if the interrupt was handled."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "diffusers",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "accelerate",
        "peft",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "torch.utils.tensorboard",
        "jsonargparse",
        "cv2",
        "tqdm",
    ]
)


def start_server() -> None:
    """Lets the server begin its imports now, beside whatever comes next; else the first `ScriptProcess` does."""
    multiprocessing.forkserver.ensure_running()


def shorten_checkpoints() -> None:
    """Checkpoints of trainings in this process draw no plots and ask the teacher about one sample, not about eight.

    Both take longer than a toy's steps. test_training.py has the plots once, test_latent_stage.py the samples.
    """
    from icmsr_core.train.run import loop  # the server's list has no module of ours
    from icmsr_core.train.tasks import generator

    loop.plot_run = lambda run: []
    generator.TEACHER_SAMPLES = 1


def _stall_fsync(at: int, mark: str) -> None:
    """Makes flush number `at` of a file in an unfinished checkpoint write the file `mark` and hang there for good."""
    calls = iter(range(1, 1 << 30))
    fsync = os.fsync

    def stalling(descriptor: int) -> None:
        if ".partial/" in os.readlink(f"/proc/self/fd/{descriptor}") and next(calls) == at:
            Path(mark).touch()
            time.sleep(600)
        fsync(descriptor)

    os.fsync = stalling


def _run(
    script: str,
    arguments: list[str],
    folder: str,
    log: str,
    stall: tuple[int, str] | None = None,
    groups: bool = True,
) -> None:
    shorten_checkpoints()
    os.setsid()
    if not groups:
        del os.setpgrp
    if stall is not None:
        _stall_fsync(*stall)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # this platform's own again, for the script's data workers
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module train/`name`.py, imported into this process for the length of a test."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    return script


class ScriptProcess:
    """``python train/NAME ARGUMENTS`` in `folder`, running."""

    def __init__(
        self,
        name: str,
        *arguments: object,
        folder: Path,
        stall: tuple[int, Path] | None = None,
        groups: bool = True,
    ) -> None:
        """With `stall` = (N, file), flush number N makes the file and hangs, in the middle of writing. Without `groups`
        the script finds no function for process groups, as under Windows."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{name}-{time.monotonic_ns()}.log"
        self._process = CONTEXT.Process(
            target=_run,
            args=(
                str(SCRIPTS / name),
                [str(entry) for entry in arguments],
                str(folder),
                str(self._log),
                None if stall is None else (stall[0], str(stall[1])),
                groups,
            ),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        """Returns when `path` exists; fails when the process ends before."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert self._process.is_alive(), f"ended before {path} was there: {self.output()}"
            assert time.monotonic() < deadline, f"no {path}: {self.output()}"
            time.sleep(0.005)

    def wait(self, seconds: float = 240) -> int:
        """Its exit code, or minus the signal that killed it."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running after {seconds} s: {self.output()}"
        return code

    def output(self) -> str:
        """What it wrote to stdout and stderr, the last of it."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""
