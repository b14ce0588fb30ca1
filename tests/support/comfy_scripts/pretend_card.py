"""Lets core's model management take the pretend device for a card, in the ways that ComfyUI can be started in.

Import it after `comfy_process.start` and `comfy_process.find_support`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy.cli_args import args
from dynamic_loading import DynamicLoading

from tests.support.platform_rules import Platform
from tests.support.pretend_device import PretendDevice, pretend_device

PLENTY = 8 * 10**9
"""Bytes of free memory in which everything fits."""


@dataclass(frozen=True)
class Card:
    """A card and how ComfyUI was started on it."""

    platform: Platform = "cuda"
    options: tuple[str, ...] = ()
    """Command-line options, as comfy.cli_args names them."""
    state: str = "NORMAL_VRAM"
    """Core's VRAMState, which follows from options such as --novram."""
    free: int = PLENTY
    """Bytes that core finds free for weights, beyond what it reserves for computing."""
    dynamic: bool = False
    """Whether DynamicVRAM loads the weights."""
    resident: int | None = None
    """With `dynamic`: most bytes of weights that stay on the card, None for any number."""
    half: bool = False
    """Whether the card computes in float16 and bfloat16."""


@contextmanager
def card(given: Card) -> Iterator[tuple[PretendDevice, DynamicLoading | None]]:
    """`given` is the card of this process for the length of the block, with its device and its dynamic loading."""
    budget = given.free + management.minimum_inference_memory()

    def free_memory(dev: torch.device | None = None, torch_free_too: bool = False):
        free = budget if management.is_device_cpu(dev) else budget - presented.memory.now
        return (free, free) if torch_free_too else free

    changes = {
        "get_torch_device": lambda: torch.device("pretend", 0),
        "get_free_memory": free_memory,
        "get_total_memory": lambda dev=None, torch_total_too=False: (budget, budget) if torch_total_too else budget,
        "vram_state": management.VRAMState[given.state],
        "should_use_fp16": lambda device=None, *_, **__: given.half and not management.is_device_cpu(device),
        "should_use_bf16": lambda device=None, *_, **__: given.half and not management.is_device_cpu(device),
        "LORA_COMPUTE_DTYPES": {},
    }
    with ExitStack() as stack:
        presented = stack.enter_context(pretend_device(given.platform))
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(management, name, value))
        for option in given.options:
            stack.enter_context(mock.patch.object(args, option, True))
        loading = None
        if given.dynamic:
            loading = stack.enter_context(DynamicLoading(given.resident).present())
            patcher = comfy.model_patcher.ModelPatcherDynamic
            stack.enter_context(mock.patch.object(comfy.model_patcher, "CoreModelPatcher", patcher))
            stack.enter_context(mock.patch.object(comfy.memory_management, "aimdo_enabled", True))
        try:
            yield presented, loading
        finally:
            management.unload_all_models()
            management.free_memory(1e30, torch.device("cpu"))
