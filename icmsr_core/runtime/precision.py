"""The precision that networks run in: the fastest safe one, and float32 instead where 16 bits overflow.

bfloat16 has float32's range at 8 bits; float16 has 11 bits and ends at 65504, which the activations of some VAEs
exceed. So every result is checked, and a part that overflowed runs in float32 from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backbone.protocol import BackboneDescriptor
from ..backbone.vae_steps import Widened
from ..errors import IcmsrError
from ..weights.sd_families import SD_FAMILIES

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The names in `recipe.DTYPES`, except ``auto``."""

LARGE_FAMILIES = frozenset(SD_FAMILIES.values())
"""Families that run in bfloat16 on a CPU with instructions for it: Stable Diffusion's sizes take half the time there
(docs/performance.md). nano takes half a second anyway and stays in float32, where no rounding shows."""
NATIVE_BF16_CPU = ("avx512_bf16", "amx_bf16")
"""Instruction sets that multiply in bfloat16; without one of them torch converts each operand and is slower."""
FIRST_BF16_CUDA = (8, 0)
"""Ampere, the first NVIDIA cards that compute in bfloat16; older ones convert."""


def choose_dtype(device_type: str, descriptor: BackboneDescriptor, native_bf16: bool) -> torch.dtype:
    """The precision that ``auto`` stands for: the backbone of `descriptor` on a device of type "cpu", "cuda", ...

    `native_bf16`: whether the device has instructions for bfloat16 (`computes_bf16`).
    """
    if device_type == "cpu":
        return torch.bfloat16 if native_bf16 and descriptor.family in LARGE_FAMILIES else torch.float32
    return torch.bfloat16 if native_bf16 else torch.float16


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16; False where torch cannot tell."""
    if device.type == "cpu":
        found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11
        return any(bool(found.get(name)) for name in NATIVE_BF16_CPU)
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= FIRST_BF16_CUDA
    return device.type != "mps"


def use_full_float32() -> None:
    """From now on, float32 in this process is float32: not TF32, which rounds what is multiplied to 11 bits.

    From Ampere on torch runs convolutions in TF32 unless told otherwise. Float32 is what a user asks for who wants it
    exact, and what takes over where 16 bits overflow; for speed there is bfloat16.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The `precision` of a forward pass in training on `device`: bf16, or fp32 for everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def lay_out(encoder: nn.Module, precision: str) -> None:
    """Puts the weights of an `encoder` that does not train into channels_last for bf16; their values stay.

    Matrix units (AMX of a CPU, tensor cores of a card) take convolutions in that layout. Not for networks that train:
    on a CPU the backward pass of group norm is slow in it. For fp32 nothing changes: torch's group norm is less exact
    in that layout.
    """
    if precision == "bf16":
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class GuardedPart:
    """The encoder, the UNet or the decoder: its layers and their present precision."""

    def __init__(self, name: str, modules: Sequence[nn.Module | None], dtype: torch.dtype) -> None:
        """`name` is for messages; `modules` are the part's layers in `dtype`, with None for layers that it lacks."""
        self.name, self.dtype = name, dtype
        self._modules = [module for module in modules if module is not None]

    def run(self, compute: Callable[[torch.dtype], Tensor]) -> Tensor:
        """``compute(dtype)`` in the part's precision, repeated in float32 when the result is not finite.

        Raises `IcmsrError` when it is not finite in float32 either.
        """
        result = compute(self.dtype)
        if not self._overflowed(result):
            return result
        del result
        return self._checked(compute(self.dtype))

    def check(self, result: Tensor) -> Tensor:
        """`result`, a piece of the part's output in a stream, when it is finite.

        Otherwise the part switches to float32 and `Widened` is raised; `IcmsrError` when it was in float32 already.
        """
        if self._overflowed(result):
            raise Widened(self.name)
        return result

    def _overflowed(self, result: Tensor) -> bool:
        """Whether `result` is not finite; if so, the part is now in float32. Errors as in `run`."""
        if bool(result.isfinite().all()):
            return False
        if self.dtype == torch.float32:
            self._checked(result)
        log.warning(
            "%s gave NaN or infinite values in %s and runs in fp32 from here on (--dtype fp32 starts with it)",
            self.name,
            dtype_name(self.dtype),
        )
        for module in self._modules:
            # A tensor made in inference mode cannot replace one that was made outside of it, nor the reverse.
            with torch.inference_mode(next(module.parameters()).is_inference()):
                nn.Module.to(module, torch.float32)
        self.dtype = torch.float32
        return True

    def _checked(self, result: Tensor) -> Tensor:
        if not bool(result.isfinite().all()):
            raise IcmsrError(
                f"{self.name} gave NaN or infinite values in fp32: the weights of the generator or of its base are "
                "damaged or do not belong together: choose others, or download them again"
            )
        return result


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of `dtype`, as the command line takes it."""
    short = {own: name for name, own in PRECISIONS.items()}
    return short.get(dtype, str(dtype).removeprefix("torch."))
