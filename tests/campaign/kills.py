"""Kills runs at random moments, fills and breaks their disk, and runs the same command again to the end.

    python -m tests.campaign.kills --runs 10 --kills 20 --failures 4 --seed 0 --minutes 110

Every run is first done once without trouble. Then it is killed (SIGKILL to its process group), every second time after
a random part of the time that it took, else in the middle of one of its writes, flushes, renames or removals, and its
disk fails (ENOSPC or EIO) after a random part of the bytes that it wrote (both by `failing_disk.c`), time and again.
When it came to its end in spite of that, its results are compared and it begins again in an empty folder; at last it is
left alone. What came too late, to a run that was over, is not counted. A finding is: a result in its folder that is not
whole, or a checkpoint that the run itself calls damaged, at any time; a failing disk that ends in a traceback, in no
words or in exit code 0; another end than that of the run without trouble: weights and training states are compared bit
by bit, with what the files say of themselves, pictures byte by byte.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from icmsr_core.cli.main import main as icmsr
from icmsr_core.train.networks.adapters import make_adapter, save_adapter
from icmsr_core.train.run.checkpoint import DAMAGED
from icmsr_core.train.run.logs import METRICS_FILE, read_metrics
from tests.support.generators import TINY
from tests.support.model_files import write_base, write_generator
from tests.support.places import ROOT
from tests.support.script_process import CONTEXT

UNFINISHED = re.compile(r"\.partial(/|$)|\.part$|\.lock|(^|/)\.tmp[^/]*$")
"""What names a file that is not a result: it may be cut short."""
DISK_ERRORS = (errno.ENOSPC, errno.EIO)
DATA = ["--data.synthetic=1", "--data.crop=32", "--data.folders=[]", "--device=cpu"]
SHAPES = ["--networks.latent_channels=4", "--networks.vae_channels=[32,32]", "--networks.unet_channels=[32,32]"]
SLOWEST = 600
"""Seconds after which a run counts as hanging."""
MOST_LATE = 5
"""Times that a kill or a failing disk is tried when it comes too late."""


@dataclass(frozen=True)
class Command:
    """One of the runs."""

    name: str
    script: str
    """A script in train/, or ``icmsr``."""
    arguments: tuple[str, ...]
    """Its output goes into the folder ``run`` of the working folder."""


@dataclass
class Report:
    """What came of the campaign."""

    kills: int = 0
    """Of a run that was not over."""
    writing: int = 0
    """Those of them in the middle of a write, a flush, a rename or a removal."""
    failures: int = 0
    """Starts that the disk failed."""
    late: int = 0
    """Kills and failing disks that came after the end of the run, or to one that wrote less than there was room for."""
    runs: int = 0
    """Commands that came to their end."""
    compared: int = 0
    """Ends whose results were compared with those of the run without trouble."""
    findings: list[dict[str, Any]] = field(default_factory=list)


def commands(stock: Path) -> list[Command]:
    """The ten runs; `stock` gets the networks and pictures that they start from."""
    base = write_base(stock / "base", TINY)
    torch.manual_seed(3)
    adapter = save_adapter(stock / "adapter", make_adapter(4, 2, TINY.unet_channels), {}, torch.float32)[0]
    generator = write_generator(stock / "generator.safetensors", base)
    _write_pictures(stock / "pictures", (".png", ".png", ".png", ".jpg", ".webp", ".tif") * 2, 48)
    _write_pictures(stock / "photos", (".png",) * 6, 96)
    start = ("--run=run", f"--base={base}", *DATA)
    made = (*start, "--generator.timestep=200", "--generator.prediction=residual")
    icm = f"--condition.adapters=['{adapter}']"
    prior = ("--run=run", *DATA, *SHAPES, *_loop("autoencoder", 8))
    upscaled = ("upscale", str(stock / "pictures"), "run/out/", "--base", str(base), "--model", str(generator))
    ablation = {
        "run": "run",
        "base": base,
        "photographs": 1,
        "side": 64,
        "metrics": "['psnr']",
        "device": "cpu",
        "arms": "['reconstruction','none','image']",
        "seeds": "[0]",
        "data.folders": f"['{stock / 'photos'}']",
        "data.hold_out": 0.4,
        "data.crop": 32,
        "generator.networks.start": "",
        "generator.losses.icm": 0.5,
    }
    return [
        Command("adapter", "adapter.py", (*start, *_loop("loop", 12))),
        Command("distillation", "distill.py", (*made, "--generator.losses.icm=0", *_loop("loop", 12))),
        Command("distillation with ICM", "distill.py", (*made, icm, *_loop("loop", 12))),
        Command("prior", "prior.py", (*prior, *_loop("prior", 8))),
        Command("prior on cached latents", "prior.py", (*prior, "--latents.enabled=true", *_loop("prior", 8))),
        Command(
            "ablation",
            "ablation.py",
            (
                f"--config={ROOT / 'train' / 'configs' / 'ablation.yaml'}",
                *(f"--{name}={value}" for name, value in ablation.items()),
                *(flag for loop in ("adapter", "start", "loop") for flag in _loop(loop, 8, save_every=4, log_every=4)),
            ),
        ),
        Command("folder", "icmsr", (*upscaled, "--skip-existing", "--device", "cpu")),
        Command("folder, all again", "icmsr", (*upscaled, "--device", "cpu")),
        Command(
            "adapter with workers and plots",
            "adapter.py",
            (*start, *_loop("loop", 12, workers=1, log_every=4, tensorboard=True)),
        ),
        Command("distillation on latents", "distill.py", (*made, *_latents(), *_loop("loop", 12))),
    ]


def _latents() -> tuple[str, ...]:
    losses = {"l2": 0, "perceptual": 0, "icm": 0, "latent": 1}
    return (
        "--latents.pairs=12",
        *(f"--generator.losses.{name}={weight}" for name, weight in losses.items()),
        "--generator.networks.train_encoder=false",
    )


def _loop(name: str, images: int, **more: object) -> tuple[str, ...]:
    values = {"images": images, "batch": 2, "precision": "fp32", "workers": 0, "warmup_images": 4, "save_every": 4}
    values |= {"log_every": 1000, "tensorboard": False, **more}
    return tuple(f"--{name}.{key}={value}" for key, value in values.items())


def _write_pictures(folder: Path, endings: tuple[str, ...], side: int) -> None:
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for number, ending in enumerate(endings):
        coarse = Image.fromarray(numbers.integers(0, 256, (12, 12, 3), np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:02d}{ending}")


class Process:
    """A run in a process group of its own, forked from a Python that has imported everything."""

    def __init__(
        self, command: Command, folder: Path, disk: Mapping[str, int] | None = None, log: str = "log.txt"
    ) -> None:
        """`disk` are the variables that `failing_disk.c` reads, without their ``ICMSR_``."""
        self.log = folder / log
        self._process = CONTEXT.Process(target=_run, args=(command, str(folder), str(self.log), dict(disk or {})))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after `seconds`."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL to the whole group, and to the process itself where it has no group yet."""
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.join()

    def output(self) -> str:
        """What it said."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


def _run(command: Command, folder: str, log: str, disk: dict[str, int]) -> None:
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ["ICMSR_DISK_FOLDER"] = str(Path(folder, "run"))
    os.environ.update({f"ICMSR_{name}": str(value) for name, value in disk.items()})
    try:
        if command.script == "icmsr":
            sys.exit(icmsr(list(command.arguments)))
        sys.argv = [command.script, *command.arguments]
        runpy.run_path(str(ROOT / "train" / command.script), run_name="__main__")
    finally:
        Path(f"{log}.calls").write_text(str(_disk_calls()), "utf-8")


def _disk_calls() -> int:
    """How many calls `failing_disk.c` has counted in this process; 0 without it."""
    calls = getattr(ctypes.CDLL(None), "icmsr_disk_calls", None) if sys.platform == "linux" else None
    return int(calls()) if calls is not None else 0


def _nothing() -> None:
    """What the server of forks runs first, so that no run has to wait for its imports."""


def run_kills(
    runs: int, kills: int, failures: int, seed: int, minutes: float, say: Callable[[str], None], only: str = ""
) -> Report:
    """The campaign: `kills` and `failures` in each of the first `runs` commands, within `minutes`."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="icmsr-kills-") as place:
        stock = Path(place) / "stock"
        stock.mkdir()
        preloaded = _preload(Path(place))
        warm = CONTEXT.Process(target=_nothing)
        warm.start()
        warm.join()
        known, ends = commands(stock)[:runs], time.monotonic() + 60 * minutes
        for command in known:
            if time.monotonic() > ends or (only and command.name != only):
                continue
            victim = Victim(command, Path(place) / "runs", seed, report, preloaded)
            incidents = ["kill"] * kills + ["disk"] * (failures if preloaded else 0)
            victim.random.shuffle(incidents)
            for incident in incidents:
                for _ in range(MOST_LATE):
                    if time.monotonic() > ends or victim.meets(incident):
                        break
            victim.finish("all")
            report.runs += 1
            say(
                f"{command.name}: {victim.seconds:.1f} s, {victim.calls} calls; until here {report.kills} kills, "
                f"{report.writing} of them in a call, {report.failures} failing disks, {report.late} too late, "
                f"{report.compared} ends compared, {len(report.findings)} findings"
            )
            shutil.rmtree(victim.place)
    return report


class Victim:
    """A command that was run once without trouble, and now has it in a folder of its own."""

    def __init__(self, command: Command, place: Path, seed: int, report: Report, preloaded: bool) -> None:
        self.command, self.place, self.seed, self.report, self._preloaded = command, place, seed, report, preloaded
        self.random = Random(f"{seed}/{command.name}")
        whole, self._folder = place / "whole", place / "killed"
        for folder in (whole, self._folder):
            folder.mkdir(parents=True)
        started = time.monotonic()
        process = Process(command, whole)
        if process.wait(SLOWEST) != 0:
            process.kill()
            raise RuntimeError(f"{command.name} does not run: {process.output()}")
        self.seconds = time.monotonic() - started
        self.calls = int(Path(f"{process.log}.calls").read_text("utf-8"))
        """Writes, flushes, renames and removals of the whole run."""
        self._bytes = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        self._wanted = results(whole)
        if not self._wanted:
            raise RuntimeError(f"{command.name} has no results: {process.output()}")

    def meets(self, incident: str) -> bool:
        """Lets the run meet a ``kill`` or a failing ``disk``; False where that came too late: the run was over."""
        random, report = self.random, self.report
        if incident == "disk":
            error = random.choice(DISK_ERRORS)
            met = self._fails({"DISK_BYTES": int(random.uniform(0, 0.7) * self._bytes), "DISK_ERRNO": error})
            report.failures += met
        elif self._preloaded and random.random() < 0.5:
            met = self._killed(SLOWEST, {"KILL_CALL": random.randint(1, max(1, self.calls))})
            report.kills += met
            report.writing += met
        else:
            met = self._killed(random.uniform(0, self.seconds), {})
            report.kills += met
        report.late += not met
        self._find(incident, broken_files(self._folder))
        if not met:
            self.finish(incident)
        return met

    def finish(self, after: str) -> None:
        """Lets the run come to its end, compares its results, and empties the folder."""
        process = Process(self.command, self._folder)
        code = process.wait(SLOWEST)
        if code != 0:
            process.kill()
            self._find(after, [f"the last start ended with {code}: {process.output()[-2000:]}"])
        self._find(after, [*broken_files(self._folder), *differences(self._wanted, results(self._folder))])
        self.report.compared += 1
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def _killed(self, seconds: float, disk: Mapping[str, int]) -> bool:
        process = Process(self.command, self._folder, disk)
        code = process.wait(seconds)
        process.kill()
        if code not in (None, 0, -signal.SIGKILL) or (code is None and disk):
            self._find("kill", [f"ended with {code}: {process.output()[-2000:]}"])
        return code != 0

    def _fails(self, disk: Mapping[str, int]) -> bool:
        process = Process(self.command, self._folder, disk)
        code = process.wait(SLOWEST)
        output = process.output()
        process.kill()
        reason = os.strerror(disk["DISK_ERRNO"])
        if code == 0 and reason not in output:
            return False
        if code != 1 or "Traceback" in output or reason not in output:
            text = f"disk of {disk['DISK_BYTES']} bytes, {reason}: ended with {code}: {output[-3000:]}"
            self._find("disk", [text])
        return True

    def _find(self, after: str, texts: list[str]) -> None:
        self.report.findings += [
            {"run": self.command.name, "seed": self.seed, "after": after, "finding": text} for text in texts
        ]


def broken_files(folder: Path) -> list[str]:
    """Results in `folder` that cannot be read."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name.endswith(DAMAGED):
            found.append(f"{name}: the run itself found it damaged")
        if not path.is_file() or UNFINISHED.search(name):
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(str(path), framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        file.get_slice(key)
            elif path.suffix in (".png", ".jpg", ".webp", ".tif"):
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
        except Exception as error:
            found.append(f"{name} is not whole: {error}")
    return found


def results(folder: Path) -> dict[str, str]:
    """What must be the same after every trouble: digests of weights, pictures and measured values, by file."""
    found = {}
    for path in sorted((folder / "run").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if UNFINISHED.search(name) or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            found[name] = _weights_digest(path)
        elif path.suffix in (".png", ".jpg", ".webp", ".tif") and "plots" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == METRICS_FILE:
            found[name] = json.dumps([row["images"] for row in read_metrics(path)])
        elif "/results/" in name and path.suffix == ".json":
            values = json.loads(path.read_text("utf-8"))
            found[name] = json.dumps({key: value for key, value in values.items() if key != "seconds"}, sort_keys=True)
    return found


def _weights_digest(path: Path) -> str:
    """Of names, types, shapes, bits and metadata; the library writes the entries of the metadata in any order."""
    digest = hashlib.sha256()
    with safe_open(str(path), framework="pt") as file:
        digest.update(json.dumps(sorted((file.metadata() or {}).items())).encode())
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key).contiguous()
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(whole: dict[str, str], killed: dict[str, str]) -> list[str]:
    """The files in which two runs differ."""
    names = sorted(whole.keys() | killed.keys())
    where = {name: "is missing" if name not in killed else "is surplus" if name not in whole else "" for name in names}
    return [f"{name} {where[name] or 'differs'}" for name in names if whole.get(name) != killed.get(name)]


def _preload(place: Path) -> bool:
    """Compiles `failing_disk.c` and has it preloaded into all runs; False where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return False
    library = place / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)  # the server of forks, which starts with the first run, inherits it
    return True


def main() -> int:
    """The command line; 0 without findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20, help="in each run")
    parser.add_argument("--failures", type=int, default=4, help="starts on a disk that fails, in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=110, help="begin nothing new after this long")
    parser.add_argument("--only", default="", help="the run of this name alone")
    options = parser.parse_args()
    print(f"seed {options.seed}, at most {options.minutes:g} minutes", flush=True)
    started = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)

    report = run_kills(options.runs, options.kills, options.failures, options.seed, options.minutes, say, options.only)
    for finding in report.findings:
        print(json.dumps(finding))
    print(
        f"{report.runs} runs, {report.kills} kills ({report.writing} in a call), {report.failures} failing disks, "
        f"{report.late} too late, {report.compared} ends compared in "
        f"{(time.monotonic() - started) / 60:.1f} minutes, {len(report.findings)} findings"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
