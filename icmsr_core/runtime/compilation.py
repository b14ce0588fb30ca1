"""torch.compile for the UNet, where the machine has a compiler.

The tiles of a picture are all of one size, so pictures of one size are compiled once, statically. The VAE runs in
stripes of changing heights and is not compiled.
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
"""Most tile sizes that one run compiles, for a folder of many sizes; for further ones the UNet runs uncompiled."""


def check_compiler(device: torch.device) -> None:
    """Raises `IcmsrError` where torch.compile cannot make code for `device`; called before anything is loaded."""
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
    """`forward`, compiled at the first call with each shape of input."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SIZES)
    return torch.compile(forward, dynamic=False, backend=BACKEND)
