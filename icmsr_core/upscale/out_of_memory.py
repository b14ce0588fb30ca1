"""When memory runs out: how to tell, and what is tried then."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from ..backbone.protocol import BackboneDescriptor
from ..errors import IcmsrError
from .plan import UpscalePlan, plan_upscale
from .settings import UpscaleSettings
from .tile_choice import smaller_tiles

Done = TypeVar("Done")

OWN_KIND: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
"""What CUDA, ROCm and XPU raise; torch 2.5 gave it its own name."""
TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",  # c10/core/impl/alloc_cpu.cpp
    "DefaultCPUAllocator: not enough memory: you tried to allocate",  # the same on Windows
    "MPS backend out of memory",  # aten/src/ATen/mps/MPSAllocator.mm
    "Invalid buffer size:",  # one array that is larger than Metal allows, also there
    "CUDA out of memory",  # a kind of its own, but other libraries raise the same text as a RuntimeError
    "CUDA error: out of memory",  # the driver's, outside of torch's allocator
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",  # XPU's driver
    "UR_RESULT_ERROR_OUT_OF_HOST_MEMORY",
    "not enough GPU video memory available",  # DirectML
)
"""Parts of the texts of RuntimeErrors, where they are the only sign."""
WINDOWS_CODES = (8, 14, 1455)
"""Windows' errors for main memory that is not there: not enough memory, out of memory, the paging file is too small."""


class TooLittleMemory(IcmsrError):
    """Memory ran out with everything that was tried."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: on any device, in main memory, in torch or NumPy."""
    if isinstance(error, (MemoryError, OWN_KIND)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in WINDOWS_CODES
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def until_it_fits(
    run: Callable[[UpscalePlan], Done],
    plan: UpscalePlan,
    retries: Iterator[UpscalePlan],
    again: Callable[[UpscalePlan, UpscalePlan], None],
    lacks_memory: Callable[[Exception], bool] = is_out_of_memory,
) -> Done:
    """The result of `run` with `plan`, or where memory runs out with the first of `retries` that fits.

    `again` is called with the plan that did not fit and the next one, once the tensors of the first are free. Raises
    `TooLittleMemory` with the sizes, and with what can be done, when memory ran out with the last plan. Raises other
    errors as they come.
    """
    while True:
        try:
            return run(plan)
        except Exception as error:
            if not lacks_memory(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
        # Out of the except block, where the error no longer holds the tensors that did not fit.
        following = next(retries, None)
        if following is None:
            raise TooLittleMemory(_last_words(plan, reason))
        again(plan, following)
        plan = following


def retries_of(descriptor: BackboneDescriptor, plan: UpscalePlan, tile_too: bool = True) -> Iterator[UpscalePlan]:
    """The plans to try in turn when memory ran out with `plan`. None takes the memory of an earlier one.

    One tile at a time; then, with `tile_too`, ever smaller tiles; then, if the VAE mode is auto and this plan exact,
    all of that with the bounded VAE.
    """
    first = replace(plan.settings, batch=1)
    sizes = [first, *(smaller_tiles(first) if tile_too else ())]
    modes = ("auto", "bounded") if plan.settings.vae == "auto" and plan.exact else (plan.settings.vae,)
    tried = {_work(plan)}
    for mode in modes:
        for settings in sizes:
            found = plan_upscale(descriptor, *plan.source, replace(settings, vae=mode))
            if _work(found) not in tried:
                tried.add(_work(found))
                yield found


def _work(plan: UpscalePlan) -> tuple[object, ...]:
    """What the memory of `plan` depends on."""
    exact = plan.exact or plan.stripes.number == 1  # one stripe is exact in every mode
    return plan.tiles, plan.settings.batch, exact, plan.stripes.axis, plan.stripes.cells


def words(settings: UpscaleSettings) -> str:
    """The settings that memory depends on, for messages."""
    return f"tile {settings.tile}, {settings.batch} at a time, vae {settings.vae}"


def _last_words(plan: UpscalePlan, reason: str) -> str:
    advice = ["upscale to a smaller size", "close other programs"]
    if plan.exact and plan.settings.vae == "exact" and plan.stripes.number > 1:
        advice.insert(0, "choose bounded instead of exact as the VAE's mode, which needs much less memory")
    if any(smaller.tile < max(plan.padded) for smaller in smaller_tiles(plan.settings)):
        advice.insert(0, "choose a smaller tile")
    height, width = plan.source
    return (
        f"out of memory with {words(plan.settings)}, for {width} x {height} to {plan.target[1]} x {plan.target[0]} "
        f"pixels: {', or '.join(advice)} ({reason})"
    )
