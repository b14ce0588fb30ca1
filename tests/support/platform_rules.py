"""What CUDA and MPS can and cannot do, as far as it can be known without one: kernels, types, wording of errors.

Which operations have a kernel is read from the table that torch's own wheel carries for its code generator. Texts of
errors follow torch's sources (c10/core/impl/alloc_cpu.cpp, c10/cuda/CUDACachingAllocator.cpp,
aten/src/ATen/mps/MPSAllocator.mm, MPSFallback.mm, EmptyTensor.cpp).
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torchgen

Platform = Literal["cuda", "mps"]
PLATFORMS: tuple[Platform, ...] = ("cuda", "mps")

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
KEYS: dict[Platform, str] = {"cuda": "CUDA", "mps": "MPS"}
COMPOSITE_EXPLICIT = frozenset(
    {"CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd"}
)
"""Dispatch keys of kernels that are written in terms of other operations and so run on every device."""
MISSING_DTYPES: dict[Platform, frozenset[torch.dtype]] = {
    "cuda": frozenset(),
    "mps": frozenset({torch.float64, torch.complex128}),
}
MPS_LARGEST_BUFFER = 2**32
"""Bytes; macOS aborts the process on a larger array (MPSNDArray)."""


@lru_cache(maxsize=1)
def kernel_keys() -> dict[str, frozenset[str]]:
    """The dispatch keys under which each operation of ATen has a kernel, by its name such as ``add.Tensor``."""
    keys: dict[str, set[str]] = {}
    delegates: dict[str, str] = {}
    name = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if begun := re.match(r"- func: ([\w.]+)\(", line):
            name = begun[1]
            keys[name] = set()
        elif delegate := re.match(r"  structured_delegate: ([\w.]+)", line):
            delegates[name] = delegate[1]
        elif line == "  ufunc_inner_loop:":  # its kernels for these two are generated
            keys[name] |= {"CPU", "CUDA"}
        elif kernel := re.match(r"    ([A-Z][\w, ]*): [\w:]+", line):
            keys[name] |= set(re.split(", ?", kernel[1]))
    for name, delegate in delegates.items():
        keys[name] |= keys[delegate]
    return {name: frozenset(found or {"CompositeImplicitAutograd"}) for name, found in keys.items()}


def kernel_of(platform: Platform, operation: str) -> Literal["own", "composite", "missing"]:
    """Whether `operation` (``add.Tensor``) has a kernel on `platform`, is made of others there, or does not exist."""
    keys = kernel_keys().get(operation, frozenset())
    if KEYS[platform] in keys:
        return "own"
    return "composite" if keys & COMPOSITE_EXPLICIT else "missing"


@dataclass(frozen=True)
class Rules:
    """What a platform refuses, and how it says so."""

    platform: Platform

    @property
    def missing_dtypes(self) -> frozenset[torch.dtype]:
        """Types that no tensor of the device can have."""
        return MISSING_DTYPES[self.platform]

    def missing_dtype_error(self, dtype: torch.dtype) -> Exception:
        """What is raised for a tensor of such a type."""
        name = str(dtype).removeprefix("torch.")
        return TypeError(
            f"Cannot convert a MPS Tensor to {name} dtype as the MPS framework doesn't support {name}. "
            "Please use float32 instead."
        )

    def missing_kernel_error(self, operation: str) -> Exception:
        """What is raised for an operation without a kernel."""
        if self.platform == "mps":
            return NotImplementedError(
                f"The operator 'aten::{operation}' is not currently implemented for the MPS device. As a temporary fix,"
                " you can set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback."
            )
        return NotImplementedError(
            f"Could not run 'aten::{operation}' with arguments from the 'CUDA' backend. This could be because the "
            "operator doesn't exist for this backend."
        )

    def fuses_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether attention runs without holding the scores: on CUDA if every last stride is 1, on MPS never.

        As `check_last_dim_stride_equals_1_dense` of sdp_utils_cpp.h asks; a kernel for float32 and any width of the
        heads exists (memory-efficient attention). Which kernel a card takes cannot be known here.
        """
        return self.platform == "cuda" and all(one.shape[-1] == 1 or one.stride(-1) == 1 for one in (query, key, value))


def out_of_memory_error(
    platform: Literal["cuda", "mps", "cpu"], size: int, taken: int = 0, limit: int = 0
) -> RuntimeError:
    """The error of `platform` for `size` bytes that are not there, when `taken` of `limit` bytes are in use.

    Only CUDA (and ROCm and XPU) raise torch.OutOfMemoryError; the others raise a plain RuntimeError.
    """
    if platform == "cuda":
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {_binary(size)}. GPU 0 has a total capacity of {_binary(limit)} of "
            f"which {_binary(max(0, limit - taken))} is free. Including non-PyTorch memory, this process has "
            f"{_binary(taken)} memory in use. Of the allocated memory {_binary(taken)} is allocated by PyTorch, and "
            "0 bytes is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
        )
    if platform == "mps":
        return RuntimeError(
            f"MPS backend out of memory (MPS allocated: {_binary(taken)}, other allocations: 0 bytes, max allowed: "
            f"{_binary(limit)}). Tried to allocate {_binary(size)} on private pool. Use "
            "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may cause system "
            "failure)."
        )
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        f"allocate {size} bytes. Error code 12 (Cannot allocate memory)"
    )


def buffer_too_large_error(size: int) -> RuntimeError:
    """What MPS says to one array that is larger than it can be, however much memory is free."""
    return RuntimeError(f"Invalid buffer size: {_binary(size)}")


def _binary(size: int) -> str:
    """As c10's format_size writes it."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.2f} {unit}"
    return f"{size} bytes"
