"""Kills runs at random moments, fills and breaks their disk, and runs the same command again to the end.

    python -m tests.campaign.kills --runs 10 --kills 20 --failures 4 --seed 0 --minutes 110

Every run is first done once without trouble. Then it is killed (SIGKILL to its process group) after a random part of
the time that it took, and its disk fails (ENOSPC or EIO, `failing_disk.c`) after a random part of the bytes that it
wrote, time and again; at last it is left alone. A finding is: a result in its folder that is not whole, at any time; a
failing disk that ends in a traceback, in no words or in exit code 0; another end than that of the run without trouble:
weights are compared bit by bit, pictures byte by byte.
"""

import argparse
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
from collections.abc import Callable
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
from tests.support.generators import TINY
from tests.support.model_files import write_base, write_generator
from tests.support.places import ROOT
from tests.support.script_process import CONTEXT

UNFINISHED = re.compile(r"\.partial(/|$)|\.part$|\.lock|\.damaged(/|$)")
"""What names a file that is not a result: it may be cut short."""
DISK_ERRORS = (errno.ENOSPC, errno.EIO)
DATA = ["--data.synthetic=1", "--data.crop=32", "--data.folders=[]", "--device=cpu"]
SHAPES = ["--networks.latent_channels=4", "--networks.vae_channels=[32,32]", "--networks.unet_channels=[32,32]"]
SLOWEST = 600
"""Seconds after which a run counts as hanging."""


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
    failures: int = 0
    """Starts on a disk that fails."""
    runs: int = 0
    """Runs that came to their end."""
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
                *(flag for loop in ("adapter", "start", "loop") for flag in _loop(loop, 8, save_every=4)),
            ),
        ),
        Command("folder", "icmsr", (*upscaled, "--skip-existing", "--device", "cpu")),
        Command("folder, all again", "icmsr", (*upscaled, "--device", "cpu")),
        Command("adapter with workers and plots", "adapter.py", (*start, *_loop("loop", 12, workers=1, log_every=4))),
        Command("distillation on latents", "distill.py", (*made, *_latents(), *_loop("loop", 12))),
    ]


def _latents() -> tuple[str, ...]:
    return ("--generator.losses.icm=0", "--generator.losses.latent=1", "--generator.networks.train_encoder=false")


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
        self, command: Command, folder: Path, disk: tuple[int, int] | None = None, log: str = "log.txt"
    ) -> None:
        """`disk` is the number of bytes that can be written, and the error after them."""
        self.log = folder / log
        self._process = CONTEXT.Process(target=_run, args=(command, str(folder), str(self.log), disk))
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


def _run(command: Command, folder: str, log: str, disk: tuple[int, int] | None) -> None:
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if disk is not None:
        os.environ["ICMSR_DISK_BYTES"], os.environ["ICMSR_DISK_ERRNO"] = map(str, disk)
        os.environ["ICMSR_DISK_FOLDER"] = str(Path(folder, "run"))
    if command.script == "icmsr":
        sys.exit(icmsr(list(command.arguments)))
    sys.argv = [command.script, *command.arguments]
    runpy.run_path(str(ROOT / "train" / command.script), run_name="__main__")


def run_kills(
    runs: int, kills: int, failures: int, seed: int, minutes: float, say: Callable[[str], None], only: str = ""
) -> Report:
    """The campaign: `kills` and `failures` in each of the first `runs` commands, within `minutes`."""
    report, ends = Report(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="icmsr-kills-") as place:
        stock = Path(place) / "stock"
        stock.mkdir()
        preloaded = _preload(Path(place))
        for command in commands(stock)[:runs]:
            if time.monotonic() > ends or (only and command.name != only):
                continue
            random = Random(f"{seed}/{command.name}")
            whole = Path(place) / "whole"
            whole.mkdir()
            started = time.monotonic()
            process = Process(command, whole)
            if process.wait(SLOWEST) != 0:
                process.kill()
                raise RuntimeError(f"{command.name} does not run: {process.output()}")
            seconds = time.monotonic() - started
            folder = Path(place) / "killed"
            folder.mkdir()
            incidents = ["kill"] * kills + ["disk"] * (failures if preloaded else 0)
            random.shuffle(incidents)
            written = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
            for incident in incidents:
                if time.monotonic() > ends:
                    break
                if incident == "kill":
                    found = _kill(command, folder, random.uniform(0, 1) ** 1.5 * seconds)
                    report.kills += 1
                else:
                    disk = int(random.uniform(0, 0.7) * written), random.choice(DISK_ERRORS)
                    found = _fail(command, folder, disk)
                    report.failures += 1
                for text in [*found, *broken_files(folder)]:
                    report.findings.append({"run": command.name, "seed": seed, "after": incident, "finding": text})
            process = Process(command, folder)
            code = process.wait(SLOWEST)
            if code != 0:
                process.kill()
                text = f"the last start ended with {code}: {process.output()[-2000:]}"
                report.findings.append({"run": command.name, "seed": seed, "after": "all", "finding": text})
            for text in [*broken_files(folder), *differences(results(whole), results(folder))]:
                report.findings.append({"run": command.name, "seed": seed, "after": "all", "finding": text})
            report.runs += 1
            say(f"{command.name}: {seconds:.0f} s; {report.kills} kills and {report.failures} failing disks until here")
            shutil.rmtree(whole)
            shutil.rmtree(folder)
    return report


def _kill(command: Command, folder: Path, seconds: float) -> list[str]:
    process = Process(command, folder)
    code = process.wait(seconds)
    process.kill()
    return [] if code in (None, 0) else [f"ended with {code}: {process.output()[-2000:]}"]


def _fail(command: Command, folder: Path, disk: tuple[int, int]) -> list[str]:
    process = Process(command, folder, disk)
    code = process.wait(SLOWEST)
    output = process.output()
    process.kill()
    reason = os.strerror(disk[1])
    if code == 0 and reason not in output:
        return []  # it wrote less than there was room for
    if code != 1 or "Traceback" in output or reason not in output:
        return [f"disk of {disk[0]} bytes, {reason}: ended with {code}: {output[-3000:]}"]
    return []


def broken_files(folder: Path) -> list[str]:
    """Results in `folder` that cannot be read."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
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
        f"{report.runs} runs, {report.kills} kills, {report.failures} failing disks in "
        f"{(time.monotonic() - started) / 60:.1f} minutes, {len(report.findings)} findings"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
