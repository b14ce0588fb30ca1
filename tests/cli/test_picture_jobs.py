"""Folders of pictures: read ahead, computed and written at the same time, and still as if one by one."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.backbone.vae_steps import UnknownLayer, VaeHalf
from icmsr_core.cli import picture_jobs
from icmsr_core.cli.job_list import Job, plan_jobs
from icmsr_core.cli.picture_jobs import UntilItFits, upscale_jobs, upscale_picture
from icmsr_core.pictures.files import Picture, read_picture, write_picture
from icmsr_core.upscale.plan import UpscalePlan, plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.pictures import write_random_picture
from tests.support.places import ROOT
from tests.support.script_process import INTERRUPTED

SETTINGS = UpscaleSettings(scale=2, color_fix="none")
WAIT = 20.0


class Toy:
    """A backbone that gives the resized picture back; `before` runs when a picture is computed."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.descriptor = BackboneDescriptor("toy", 192, 8, 16, 200, "residual")
        self.before = before

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(image, 8)

    def predict_noise(self, latent, timestep, features=None) -> torch.Tensor:
        self.before()
        return torch.zeros_like(latent)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(latent, 8)

    def vae_half(self, part: str, pixels: int) -> VaeHalf:
        raise UnknownLayer("no steps")


def folder_of(folder: Path, number: int) -> list[Job]:
    """Jobs for `number` small pictures, all different, named in order."""
    (folder / "in").mkdir()
    for index in range(number):
        write_random_picture(folder / "in" / f"{index:02d}.png", 20 + index)
    return plan_jobs([folder / "in"], folder / "out").jobs


def run(jobs: list[Job], backbone: Toy | None = None, **functions) -> tuple[int, list[str]]:
    """What `upscale_jobs` returns, and the lines that it reported."""
    lines: list[str] = []
    fitting = UntilItFits(backbone or Toy(), plan_for)
    return upscale_jobs(fitting, jobs, report=lines.append, **functions), lines


def plan_for(height: int, width: int) -> UpscalePlan:
    return plan_upscale(Toy().descriptor, height, width, SETTINGS)


def upscaled(source: Picture) -> Picture:
    return upscale_picture(Toy(), source, plan_for(*source.rgb.shape[:2]))


def no_thread_is_left() -> bool:
    return not [thread.name for thread in threading.enumerate() if thread.name.startswith("icmsr-")]


def test_results_are_those_of_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index, mode in enumerate(("RGB", "RGBA", "L")):
        write_random_picture(tmp_path / "in" / f"{index}.png", 30 + index, 17, mode)
    wide = np.random.default_rng(0).random((9, 14, 3), np.float32)
    write_picture(tmp_path / "in" / "wide.tif", Picture(wide, bits=16))
    write_random_picture(tmp_path / "in" / "photo.webp", 40, 40)
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out").jobs
    assert run(jobs) == (0, [])
    assert len(jobs) == 5
    assert sorted(tmp_path.joinpath("out").iterdir()) == [job.target for job in jobs]
    for job in jobs:
        alone = tmp_path / job.target.name
        write_picture(alone, upscaled(read_picture(job.source)))
        assert job.target.read_bytes() == alone.read_bytes()
    assert no_thread_is_left()


def test_no_jobs_are_no_failure() -> None:
    assert run([]) == (0, [])


def test_the_next_is_read_and_the_last_is_written_while_one_is_computed(tmp_path: Path, monkeypatch) -> None:
    """Each waits for the other to have begun, which never happens one by one."""
    jobs = folder_of(tmp_path, 4)
    names = ["read", "compute", "write"]
    begun = {name: [threading.Event() for _ in jobs] for name in names}
    in_time: list[bool] = []
    numbers = iter(range(len(jobs)))

    def wait_for(name: str, index: int) -> None:
        if index < len(jobs):
            in_time.append(begun[name][index].wait(WAIT))

    def read(path: Path) -> Picture:
        begun["read"][int(path.stem)].set()
        return read_picture(path)

    def compute() -> None:
        index = next(numbers)
        begun["compute"][index].set()
        wait_for("read", index + 1)
        if index:
            wait_for("write", index - 1)

    def write(path: Path, result: Picture, quality: int) -> None:
        begun["write"][int(path.stem)].set()
        wait_for("compute", int(path.stem) + 1)
        write_picture(path, result, quality)

    monkeypatch.setattr(picture_jobs, "read_picture", read)
    monkeypatch.setattr(picture_jobs, "write_picture", write)
    assert run(jobs, Toy(compute)) == (0, [])
    assert len(in_time) == 9
    assert all(in_time)


@pytest.mark.parametrize("slow", ["read", "compute", "write"])
def test_memory_holds_two_pictures_and_two_results(tmp_path: Path, monkeypatch, slow: str) -> None:
    jobs = folder_of(tmp_path, 8)
    sources: list[weakref.ref] = []
    results: list[weakref.ref] = []
    most = {"sources": 0, "results": 0}

    def look() -> None:
        for name, pictures in (("sources", sources), ("results", results)):
            most[name] = max(most[name], sum(entry() is not None for entry in pictures))

    def work(name: str) -> None:
        time.sleep(0.03 if name == slow else 0)
        look()

    def read(path: Path) -> Picture:
        found = read_picture(path)
        sources.append(weakref.ref(found))
        work("read")
        return found

    def computed(*arguments) -> Picture:
        result = upscale_picture(*arguments)
        results.append(weakref.ref(result))
        work("compute")
        return result

    def write(path: Path, result: Picture, quality: int) -> None:
        work("write")
        write_picture(path, result, quality)
        look()

    for name, function in (("read_picture", read), ("upscale_picture", computed), ("write_picture", write)):
        monkeypatch.setattr(picture_jobs, name, function)
    assert run(jobs) == (0, [])
    assert len(sources) == len(results) == 8
    assert most["sources"] == 2
    assert most["results"] <= 2
    assert most["results"] == 2 or slow != "write"
    assert not any(entry() for entry in [*sources, *results])


def test_what_fails_is_told_in_order_and_the_rest_goes_on(tmp_path: Path) -> None:
    jobs = folder_of(tmp_path, 7)
    for index in (1, 4):
        jobs[index].source.write_bytes(b"not a picture")
    jobs[3].target.mkdir()  # cannot be written over
    turns: list[str] = []
    settled: list[str] = []

    def compute() -> None:
        if turns[-1] == "05":
            raise MemoryError

    failed, lines = run(
        jobs,
        Toy(compute),
        steps=lambda job: turns.append(job.source.stem),
        done=lambda job: settled.append(job.source.stem),
    )
    assert failed == 4
    assert [str(jobs[index].source) in line for index, line in zip((1, 4, 5), [lines[0], *lines[2:]])] == [True] * 3
    assert lines[1] == f"{jobs[3].source}: {jobs[3].target}: is a folder, not a file to write"
    assert lines[3] == (
        f"{jobs[5].source}: out of memory with tile 512, 1 at a time, vae auto, for 25 x 12 to 50 x 24 pixels: "
        "upscale to a smaller size, or close other programs (MemoryError)"
    )
    assert len(lines) == 4
    assert turns == settled == [f"{index:02d}" for index in range(7)]
    assert sorted(path.name for path in tmp_path.joinpath("out").glob("*") if path.is_file()) == [
        "00.png",
        "02.png",
        "06.png",
    ]


def test_the_last_failures_are_told_too(tmp_path: Path) -> None:
    jobs = folder_of(tmp_path, 2)
    for job in jobs:
        job.target.mkdir()
    failed, lines = run(jobs)
    assert failed == len(lines) == 2


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_full_disk_spoils_only_what_does_not_fit(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk: the operating system refuses in the middle of a write."""
    import resource

    jobs = folder_of(tmp_path, 4)
    write_random_picture(jobs[1].source, 200, 200)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        failed, lines = run(jobs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed == 1
    assert "01.png: cannot be written" in lines[0]
    assert sorted(path.name for path in tmp_path.joinpath("out").iterdir()) == ["00.png", "02.png", "03.png"]
    assert Image.open(jobs[2].target).size == (44, 24)


def test_an_interrupt_leaves_neither_thread_nor_half_file(tmp_path: Path, monkeypatch) -> None:
    """It comes while the first result is being written, which is finished; the second is not begun."""
    jobs = folder_of(tmp_path, 5)
    writing, interrupted = threading.Event(), threading.Event()
    calls: list[int] = []

    def compute() -> None:
        calls.append(1)
        if len(calls) == 2:
            assert writing.wait(WAIT)
            interrupted.set()
            raise KeyboardInterrupt

    def write(path: Path, result: Picture, quality: int) -> None:
        writing.set()
        assert interrupted.wait(WAIT)
        write_picture(path, result, quality)

    monkeypatch.setattr(picture_jobs, "write_picture", write)
    with pytest.raises(KeyboardInterrupt):
        run(jobs, Toy(compute))
    assert no_thread_is_left()
    assert [path.name for path in tmp_path.joinpath("out").iterdir()] == ["00.png"]
    assert Image.open(jobs[0].target).size == (40, 24)
    assert len(calls) == 2


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_the_middle_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(60):
        write_random_picture(tmp_path / "in" / f"{index:02d}.png", 64 + index % 3, 64)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "icmsr_core", "upscale", "in", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and so these tests if they are one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    print(f"ended {time.monotonic() - sent:.2f} s after the signal")
    assert process.returncode in INTERRUPTED, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    names = sorted(path.name for path in out.iterdir())
    assert 1 <= len(names) < 60
    assert names == [f"{index:02d}.png" for index in range(len(names))]
    for index, name in enumerate(names):
        with Image.open(out / name) as result:
            result.load()  # whole
            assert result.size == (256 + 4 * (index % 3), 256)


@pytest.mark.parametrize("hidden", [0, 255, "random"])
def test_hidden_colours_leave_no_rim(hidden) -> None:
    y, x = np.mgrid[:40, :48]
    alpha = ((x - 24) ** 2 + (y - 20) ** 2 < 225).astype(np.float32)
    colour = np.array([0.8, 0.2, 0.4], np.float32)
    below = np.random.default_rng(0).random((40, 48, 3), np.float32) if hidden == "random" else np.float32(hidden / 255)
    rgb = np.where(alpha[..., None] > 0, colour, below).astype(np.float32)
    result = upscaled(Picture(rgb, alpha))
    assert np.abs(result.rgb - colour).max() < 1e-5, "everywhere the subject's colour, also where nobody sees it"
    assert result.alpha is not None
    assert result.alpha.min() < 0.01
