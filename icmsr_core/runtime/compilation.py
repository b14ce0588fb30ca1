"""torch.compile for the UNet, where the machine has a compiler.

The tiles of a picture are all of one size, so pictures of one size are compiled once, statically. The VAE runs in
stripes of changing heights and is left as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import IcmsrError

COMPILERS = ("g++", "clang++", "c++", "cl")
BACKEND = "inductor"
SIZES = 64
"""Sizes of tiles that are compiled in one run, for a folder of many sizes; beyond them the UNet runs as it is."""


def check_compiler(device: torch.device) -> None:
    """Raises `IcmsrError` where torch.compile could not make code for `device`; asked before anything is loaded."""
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise IcmsrError(
            "--compile needs a C++ compiler on a CPU and found none of "
            f"{', '.join(COMPILERS)}: install one, or run without --compile (on a CPU it gains little)"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise IcmsrError("--compile on CUDA needs the package triton: install it, or run without --compile")
    if device.type not in ("cpu", "cuda"):
        raise IcmsrError(f"--compile works with cpu and cuda, the device is {device.type}: run without --compile")


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` in compiled code, which is made at the first call with every shape."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SIZES)
    return torch.compile(forward, dynamic=False, backend=BACKEND)
