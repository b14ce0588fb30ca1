"""The precision that is fastest on a device, and the way back to float32 where it is too narrow. Source: ours."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import IcmsrError

log = logging.getLogger(__name__)

WORTH_IT = 1.25
"""How many times faster half precision must be on a CPU: less is no reason to round, nor safely measured."""


def fastest_dtype(
    device: torch.device, width: int, allowed: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> torch.dtype:
    """The precision among `allowed` in which networks run fastest on `device`.

    `width` is the channels of the VAE's first level, where most of a step's work is done. CUDA: bfloat16 where the card
    multiplies it, else float16. CPU: bfloat16 where `measured_gain` finds it faster by a quarter or more. Elsewhere
    (MPS, XPU) bfloat16 if the device computes in it. float32 otherwise.
    """
    if device.type == "cpu":
        wanted = [torch.bfloat16] if torch.bfloat16 in allowed and measured_gain(width) >= WORTH_IT else []
    elif device.type == "cuda":
        # Not is_bf16_supported(), which is also true where bfloat16 is emulated.
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        wanted = [torch.bfloat16, torch.float16] if native else [torch.float16]
    else:
        wanted = [torch.bfloat16] if _computes(device, torch.bfloat16) else []
    return next((dtype for dtype in wanted if dtype in allowed), torch.float32)


@lru_cache
def measured_gain(width: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """How many times faster norm, activation and convolution of `width` channels are in `dtype` than in float32 here.

    Takes a fifth of a second, once for each `width` and `dtype`. What a CPU says of itself does not tell: of two with
    avx512_bf16, one ran Stable Diffusion's networks 2.5 times faster in bfloat16, the other (without AMX) its
    convolutions at 0.55 times the speed, and narrow ones 1.2 times faster at best. CPU time is counted, the least of a
    few runs in turns, so that other work on the machine does not decide.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, width, 64, 64, generator=random)
    weight = torch.randn(width, width, 3, 3, generator=random) / (3 * width**0.5)
    inputs = {kind: (x.to(kind), weight.to(kind)) for kind in (torch.float32, dtype)}
    seconds = {kind: float("inf") for kind in inputs}
    with torch.inference_mode():
        for _ in range(6):  # the first of them warms up
            for kind, (one, kernel) in inputs.items():
                started = time.process_time()
                F.conv2d(F.silu(F.group_norm(one, 1)), kernel, padding=1)
                seconds[kind] = min(seconds[kind], time.process_time() - started)
    return seconds[torch.float32] / max(seconds[dtype], 1e-9)


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        return float((ones @ ones).sum()) == 8
    except (RuntimeError, TypeError):
        return False


class PrecisionGuard:
    """Runs stages in one precision, and again in float32 where that gave NaN or infinite values."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the precision to try first."""
        self.dtype = dtype
        self._said: set[str] = set()

    def run(self, stage: str, compute: Callable[[torch.dtype], Tensor]) -> Tensor:
        """`compute` of this guard's dtype, or of float32 if that is not finite; a warning the first time for `stage`.

        `stage` names the part in messages ("the VAE's decoder"). Each call is judged on its own, so that a picture or a
        tile comes out the same whatever came before it. Raises `IcmsrError` when float32 is not finite either.
        """
        result = compute(self.dtype)
        if _is_finite(result):
            return result
        if self.dtype != torch.float32:
            if stage not in self._said:
                self._said.add(stage)
                log.warning(
                    "%s gave NaN or infinite values in %s: run again in float32, and so whenever it happens; "
                    "choosing fp32 from the start saves the attempt", stage, _name(self.dtype),
                )
            del result  # two maps of a stage may be more than fit
            result = compute(torch.float32)
            if _is_finite(result):
                return result
        raise IcmsrError(
            f"{stage} gave NaN or infinite values in float32: its weights are damaged, or made for another base: "
            "load them again from their source"
        )


@contextmanager
def weights_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lets `module` hold its floating-point weights and buffers in `dtype` for a while; then the very ones it had.

    In float32 that takes twice the memory of a half-precision module on top of it, and no time when nothing changes.
    """
    tensors = chain(module.parameters(), module.buffers())
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point() and tensor.dtype != dtype]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
