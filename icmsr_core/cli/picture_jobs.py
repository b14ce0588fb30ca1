"""Upscaling of picture files: what `icmsr upscale` and `icmsr demo` do with a loaded backbone."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbone.protocol import Backbone, BackboneDescriptor
from ..pictures.files import Picture, from_tensor, read_picture, to_tensor, write_picture
from ..pictures.transparency import fill_hidden
from ..steps import Steps
from ..upscale.free_memory import free_memory, free_system_memory
from ..upscale.masking import checked_mask
from ..upscale.one_step import run_plan
from ..upscale.out_of_memory import retries_of, until_it_fits, words
from ..upscale.plan import UpscalePlan, plan_upscale
from ..upscale.settings import UpscaleSettings
from ..upscale.sizes import resized_into
from ..upscale.tile_choice import UNIFIED, Automatic, DeviceMemory, change_for_memory, plan_for_memory
from .job_list import Job

log = logging.getLogger(__name__)


def upscale_picture(
    backbone: Backbone,
    picture: Picture,
    plan: UpscalePlan,
    steps: Steps | None = None,
    mask: torch.Tensor | None = None,
) -> Picture:
    """`picture` at the plan's target size: colours through the model, alpha by bicubic resizing, metadata kept.

    With `mask` [1, 1, H, W] only where that is 1 (`run_plan`). Colours under alpha 0 are replaced by those of visible
    pixels first (`fill_hidden`).
    """
    alpha = picture.alpha
    visible = picture.rgb if alpha is None else fill_hidden(picture.rgb, alpha)
    result = from_tensor(run_plan(backbone, to_tensor(visible), plan, steps=steps, mask=mask))
    if alpha is not None:
        alpha = from_tensor(resized_into(to_tensor(alpha), plan.frame))
    return replace(picture, rgb=result, alpha=alpha)


def read_mask(path: Path) -> torch.Tensor:
    """The mask [1, 1, H, W] in [0, 1] in a picture file: its brightness (BT.601), 0 where it is transparent.

    Raises `IcmsrError` for a file that cannot be read; logs it when the mask is all 0.
    """
    picture = read_picture(path)
    values = picture.rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    if picture.alpha is not None:
        values = values * picture.alpha
    # White is 1, whatever rounding says.
    return checked_mask(torch.from_numpy(np.ascontiguousarray(values)).mul(255).round().div(255), 1)


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

    They, and what the VAE mode auto stands for, follow the memory that is free then for networks in `dtype` on
    `device`. Logs a warning where it is too little for the first choice, because the result is then another. Where
    nothing is chosen, pictures of one size share a plan.
    """
    if not (automatic.tile or automatic.batch or settings.vae == "auto"):
        return lru_cache(maxsize=16)(lambda height, width: plan_upscale(descriptor, height, width, settings))

    def plan_for(height: int, width: int) -> UpscalePlan:
        main = None if device.type in UNIFIED else free_system_memory()
        memory = DeviceMemory(device.type, free_memory(device), dtype.itemsize, main)
        plan = plan_for_memory(descriptor, height, width, settings, memory, automatic)
        change = change_for_memory(descriptor, plan, settings, memory)
        if change is not None:
            log.warning(change)
        return plan

    return plan_for


class UntilItFits:
    """Upscales pictures; where memory runs out, once more with less, and so from then on for pictures of that size."""

    def __init__(
        self, backbone: Backbone, plan_for: PlanFor, *, tile_too: bool = True, mask: torch.Tensor | None = None
    ) -> None:
        """Smaller tiles are tried only with `tile_too`. `mask` is that of `upscale_picture`, for every picture."""
        self._backbone, self._plan_for, self._tile_too, self._mask = backbone, plan_for, tile_too, mask
        self._reduced: dict[tuple[int, int], UpscalePlan] = {}

    def upscale(self, name: str, picture: Picture, steps: Steps | None = None) -> Picture:
        """`upscale_picture` with a plan that fits; what does not fit is logged under `name`."""
        size = (picture.rgb.shape[0], picture.rgb.shape[1])
        plan = self._reduced.get(size) or self._plan_for(*size)

        def again(failed: UpscalePlan, following: UpscalePlan) -> None:
            tried, next_one = words(failed.settings), words(following.settings)
            log.warning("%s: out of memory with %s: trying again with %s", name, tried, next_one)
            empty_caches()
            self._reduced[size] = following

        def run(plan: UpscalePlan) -> Picture:
            return upscale_picture(self._backbone, picture, plan, steps, self._mask)

        return until_it_fits(run, plan, retries_of(self._backbone.descriptor, plan, self._tile_too), again)


def empty_caches() -> None:
    """Gives the memory that torch keeps for new tensors back to the accelerators, where it may be in pieces."""
    for name in ("cuda", "xpu", "mps"):
        module: Any = getattr(torch, name, None)
        with suppress(AttributeError):  # older versions of torch lack some of these
            if module.is_available():
                module.empty_cache()


def upscale_jobs(
    fitting: UntilItFits,
    jobs: Sequence[Job],
    *,
    report: Callable[[str], None],
    steps: Callable[[Job], Steps | None] = lambda _: None,
    done: Callable[[Job], object] = lambda _: None,
    read: Callable[[Job], Picture] = lambda job: read_picture(job.source),
    quality: int = 95,
) -> int:
    """Runs all of `jobs`, also when some fail; returns how many did.

    While a picture is computed, one thread reads the next picture and one writes the last result. They do not run
    further ahead or behind: memory holds at most two pictures that were read and two results, however many jobs there
    are. `fitting` upscales each of them.

    `read` is called in the reading thread. The other functions are called in this thread, in the order of the jobs:
    `steps` when a picture's turn comes, for the object that counts its steps; `report` for each picture that failed,
    for whatever reason (too little memory for it, say), with one line that names the file; `done` when a result has
    been written or has failed. An interrupt ends the run: what is being read or written at that moment is finished
    first, so that no file is left half written.
    """
    failed = 0
    writing: deque[tuple[Job, Future[None]]] = deque()

    def fail(job: Job, error: Exception) -> None:
        nonlocal failed
        failed += 1
        message = str(error) or type(error).__name__
        report(message if str(job.source) in message else f"{job.source}: {message}")
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
        reading = deque(reader.submit(read, job) for job in jobs[:1])
        for index, job in enumerate(jobs):
            counted = steps(job)
            picture = reading.popleft()
            reading.extend(reader.submit(read, following) for following in jobs[index + 1 : index + 2])
            try:
                result = fitting.upscale(job.source.name, picture.result(), counted)
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
