"""Upscaling of picture files: what `icmsr upscale` and `icmsr demo` do with a loaded backbone."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..backbone.protocol import Backbone
from ..errors import IcmsrError
from ..pictures.files import (
    WRITE_EXTENSIONS,
    Picture,
    find_pictures,
    from_tensor,
    read_picture,
    to_tensor,
    write_picture,
)
from ..upscale.free_memory import free_memory
from ..upscale.one_step import Progress, upscale
from ..upscale.settings import UpscaleSettings
from ..upscale.sizes import resize
from ..upscale.tile_choice import TILES, fit_to_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One picture to upscale."""

    source: Path
    """The file to read."""
    target: Path
    """The file to write."""


def plan_jobs(source: Path, target: Path) -> list[Job]:
    """The files that ``upscale SOURCE TARGET`` reads and writes, checked before any model is loaded.

    A folder's pictures keep their names; a format that cannot be written (BMP) becomes PNG. For a single picture the
    target may be a file or an existing folder. The target folder is made if it is missing. Raises `IcmsrError` when
    something is missing, cannot be written, or would overwrite an input.
    """
    if source.is_dir():
        pictures = find_pictures(source)
        if not pictures:
            raise IcmsrError(f"{source}: no pictures in this folder")
        if target.is_file():
            raise IcmsrError(f"{target}: is a file; a folder of pictures needs a folder for its results")
        jobs = [Job(path, target / _writable_name(path)) for path in pictures]
    elif source.is_file():
        if target.is_dir():
            target = target / _writable_name(source)
        if target.suffix.lower() not in WRITE_EXTENSIONS:
            raise IcmsrError(f"{target}: cannot write this kind of file: use one of {', '.join(WRITE_EXTENSIONS)}")
        jobs = [Job(source, target)]
    else:
        raise IcmsrError(f"{source}: no such file or folder")
    taken: dict[Path, Path] = {}
    sources = {job.source.resolve() for job in jobs}
    for job in jobs:
        if job.target.resolve() in sources:
            raise IcmsrError(f"{job.target}: would overwrite an input: choose another output")
        other = taken.setdefault(job.target, job.source)
        if other is not job.source:
            raise IcmsrError(f"{other.name} and {job.source.name} would both be written to {job.target}: rename one")
    check_writable(jobs[0].target.parent)
    return jobs


def check_writable(folder: Path) -> None:
    """Makes `folder` if need be and proves that a file can be written there; raises `IcmsrError` when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise IcmsrError(f"{folder}: cannot write to this folder ({error.strerror or error})") from error


def _writable_name(path: Path) -> str:
    return path.name if path.suffix.lower() in WRITE_EXTENSIONS else f"{path.stem}.png"


def upscale_picture(
    backbone: Backbone, picture: Picture, settings: UpscaleSettings, progress: Progress | None = None
) -> Picture:
    """`picture` at its new size: colours through the model, alpha by bicubic resizing, all else kept."""
    result = from_tensor(upscale(backbone, to_tensor(picture.rgb), settings, progress=progress))
    alpha = picture.alpha
    if alpha is not None:
        alpha = from_tensor(resize(to_tensor(alpha), *result.shape[:2]))
    return replace(picture, rgb=result, alpha=alpha)


Fit = Callable[[UpscaleSettings, int, int], UpscaleSettings]
"""Settings for an input of that height and width."""


def memory_fit(backbone: Backbone, device: torch.device, dtype: torch.dtype, *, tile: bool, batch: bool) -> Fit:
    """Chooses tile and batch, or one of them, from what is free on the backbone's `device` when a picture's turn comes.

    Says so in the log where memory is too short for the first choice, because the result is then another.
    """

    def fit(settings: UpscaleSettings, height: int, width: int) -> UpscaleSettings:
        free = free_memory(device)
        chosen = fit_to_memory(
            backbone,
            height,
            width,
            settings,
            free,
            device.type,
            itemsize=dtype.itemsize,
            tile=tile,
            batch=batch,
        )
        if free is not None and (chosen.tile, chosen.vae) != (TILES[0] if tile else settings.tile, settings.vae):
            log.warning(
                "%d x %d: %.1f GB of memory are free: tile %d, vae %s",
                width,
                height,
                free / 1e9,
                chosen.tile,
                chosen.vae,
            )
        return chosen

    return fit


def run_jobs(
    backbone: Backbone,
    jobs: Sequence[Job],
    settings: UpscaleSettings,
    *,
    report: Callable[[str], None],
    fit: Fit | None = None,
    progress: Callable[[Job], Progress | None] = lambda _: None,
    done: Callable[[Job], object] = lambda _: None,
) -> int:
    """All of `jobs`, going on past pictures that fail; returns how many did.

    While a picture is computed, a thread reads the next one and another writes the last result. No more than that: the
    next but one is not read before the next begins, and a result waits until the one before it is written. So memory
    holds at most two pictures that were read and two results, however many jobs there are.

    The functions are called in this thread and in the order of the jobs: `fit` for the settings of a picture, given its
    height and width (see `memory_fit`), `progress` when a picture's turn comes,
    `report` with one line that names the file for each that failed, whatever the reason (a lack of memory for one
    picture, say), and `done` when a result stands under its name or has failed. An interrupt is no such failure and
    ends the run: what is being read or written at that moment is finished first, so that no half file is left.
    """
    failed = 0
    writing: deque[tuple[Job, Future[None]]] = deque()

    def fail(job: Job, error: Exception) -> None:
        nonlocal failed
        failed += 1
        message = str(error) or type(error).__name__
        report(message if os.fspath(job.source) in message else f"{job.source}: {message}")
        done(job)

    def settle() -> None:
        while writing:
            job, written = writing.popleft()
            try:
                written.result()
            except Exception as error:
                fail(job, error)
            else:
                done(job)

    with _thread("reader") as reader, _thread("writer") as writer:
        reading = deque(reader.submit(read_picture, job.source) for job in jobs[:1])
        for index, job in enumerate(jobs):
            advance = progress(job)
            picture = reading.popleft()
            reading.extend(reader.submit(read_picture, following.source) for following in jobs[index + 1 : index + 2])
            try:
                read = picture.result()
                fitted = settings if fit is None else fit(settings, read.rgb.shape[0], read.rgb.shape[1])
                result = upscale_picture(backbone, read, fitted, advance)
            except Exception as error:
                settle()  # what came before is told of before
                fail(job, error)
                continue
            settle()
            writing.append((job, writer.submit(write_picture, job.target, result)))
            del result  # the writer has it
        settle()
    return failed


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """One thread for work that is done in the order in which it was submitted; what has not begun is dropped."""
    executor = ThreadPoolExecutor(1, f"icmsr-{name}")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
