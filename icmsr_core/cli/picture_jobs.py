"""Upscaling of picture files: what `icmsr upscale` and `icmsr demo` do with a loaded backbone."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch

from ..backbone.protocol import Backbone, BackboneDescriptor
from ..pictures.files import Picture, from_tensor, read_picture, to_tensor, write_picture
from ..pictures.transparency import fill_hidden
from ..steps import Steps
from ..upscale.free_memory import free_memory
from ..upscale.one_step import run_plan
from ..upscale.plan import UpscalePlan, plan_upscale
from ..upscale.settings import UpscaleSettings
from ..upscale.sizes import resize
from ..upscale.tile_choice import TILES, Automatic, DeviceMemory, plan_for_memory
from .job_list import Job

log = logging.getLogger(__name__)


def upscale_picture(backbone: Backbone, picture: Picture, plan: UpscalePlan, steps: Steps | None = None) -> Picture:
    """`picture` at the plan's target size: colours through the model, alpha by bicubic resizing, metadata kept.

    Colours under alpha 0 are replaced by those of visible pixels first (`fill_hidden`).
    """
    alpha = picture.alpha
    visible = picture.rgb if alpha is None else fill_hidden(picture.rgb, alpha)
    result = from_tensor(run_plan(backbone, to_tensor(visible), plan, steps=steps))
    if alpha is not None:
        alpha = from_tensor(resize(to_tensor(alpha), *result.shape[:2]))
    return replace(picture, rgb=result, alpha=alpha)


PlanFor = Callable[[int, int], UpscalePlan]
"""Gives the plan for a picture of that height and width in pixels."""


def planner(
    descriptor: BackboneDescriptor,
    settings: UpscaleSettings,
    automatic: Automatic,
    device: torch.device,
    dtype: torch.dtype,
) -> PlanFor:
    """Plans with `settings`, of which those that `automatic` names are chosen when a picture's turn comes.

    They follow the memory that is free on `device` then, for networks in `dtype`. Logs a warning where it is too little
    for the first choice, because the result is then another. Without automatic settings pictures of one size share a
    plan.
    """
    if not (automatic.tile or automatic.batch):
        return lru_cache(maxsize=16)(lambda height, width: plan_upscale(descriptor, height, width, settings))

    def plan_for(height: int, width: int) -> UpscalePlan:
        memory = DeviceMemory(device.type, free_memory(device), dtype.itemsize)
        plan = plan_for_memory(descriptor, height, width, settings, memory, automatic)
        first = TILES[0] if automatic.tile else settings.tile
        if memory.free is not None and (plan.settings.tile, plan.settings.vae) != (first, settings.vae):
            log.warning(
                "%d x %d: %.1f GB of memory are free: tile %d, vae %s",
                width,
                height,
                memory.free / 1e9,
                plan.settings.tile,
                plan.settings.vae,
            )
        return plan

    return plan_for


def upscale_jobs(
    backbone: Backbone,
    jobs: Sequence[Job],
    plan_for: PlanFor,
    *,
    report: Callable[[str], None],
    steps: Callable[[Job], Steps | None] = lambda _: None,
    done: Callable[[Job], object] = lambda _: None,
    quality: int = 95,
) -> int:
    """Runs all of `jobs`, also when some fail; returns how many did.

    While a picture is computed, one thread reads the next picture and one writes the last result. They do not run
    further ahead or behind: memory holds at most two pictures that were read and two results, however many jobs there
    are.

    The functions are called in this thread, in the order of the jobs: `steps` when a picture's turn comes, for the
    object that counts its steps; `plan_for` for its plan; `report` for each picture that failed, for whatever reason
    (too little memory for it, say), with one line that names the file; `done` when a result has been written or has
    failed. An interrupt ends the run: what is being read or written at that moment is finished first, so that no file
    is left half written.
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
            counted = steps(job)
            picture = reading.popleft()
            reading.extend(reader.submit(read_picture, following.source) for following in jobs[index + 1 : index + 2])
            try:
                read = picture.result()
                plan = plan_for(read.rgb.shape[0], read.rgb.shape[1])
                result = upscale_picture(backbone, read, plan, counted)
            except Exception as error:
                settle()  # the pictures before this one are reported first
                fail(job, error)
                continue
            settle()
            writing.append((job, writer.submit(write_picture, job.target, result, quality)))
            del result  # the writer has it
        settle()
    return failed


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """One thread that does what is submitted, in that order. Work that has not begun at the end is dropped."""
    executor = ThreadPoolExecutor(1, f"icmsr-{name}")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
