"""Stand-ins for comfy_aimdo, core's library for DynamicVRAM, which itself needs a card.

A module has a page of the device's memory for its weights (`Pages`). Core asks for it with `vbar_fault` when the module
runs and fills it when its signature is another than last time; it copies the weights there through memory that it pins.
The interfaces are those of comfy_aimdo 0.4 (model_vbar.py, host_buffer.py, torch.py).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from types import SimpleNamespace
from unittest import mock

import comfy.model_management as management
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch

MOST_PINNED = 2**32
"""Bytes that core may pin."""


class Pages:
    """ModelVBAR: the memory of one network's weights on the device."""

    def __init__(self, loading: "DynamicLoading", size: float, index: int | None) -> None:
        self._loading, self._end = loading, 0
        self._signatures: dict[int, tuple[int, int]] = {}
        self._memory: dict[int, torch.Tensor] = {}
        self.in_use: dict[int, int] = {}
        """How often each page is pinned at present, by its address."""

    def alloc(self, size: int) -> tuple["Pages", int, int]:
        address, self._end = self._end, self._end + size
        return self, address, size

    def fault(self, address: int, size: int) -> tuple[int, int] | None:
        if address not in self._signatures:
            limit = self._loading.resident
            if limit is not None and self._loading.held + size > limit:
                return None
            self._loading.held += size
            self._signatures[address] = (next(self._loading.numbers), size)
            self._memory[address] = torch.empty(size, dtype=torch.uint8, device="pretend")
        self.in_use[address] = self.in_use.get(address, 0) + 1
        return self._signatures[address]

    def unpin(self, address: int) -> None:
        if self.in_use.get(address):
            self.in_use[address] -= 1

    def memory(self, address: int) -> torch.Tensor:
        return self._memory[address]

    def prioritize(self) -> None:
        pass

    def loaded_size(self) -> int:
        return sum(size for _, size in self._signatures.values())

    def free_memory(self, wanted: float) -> int:
        freed = self.loaded_size()
        self._loading.held -= freed
        self._signatures.clear()
        self._memory.clear()
        return freed


class HostBuffer:
    """Memory that grows at its end and that parts of are pinned."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self.size = 0
        self.memory = torch.empty(max(size, max_grow_size), dtype=torch.uint8)

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> None:
        if self.size + size > len(self.memory):
            raise RuntimeError("HostBuffer.extend failed")
        self.size += size

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = size


class DynamicLoading:
    """What the stand-ins share, and what they count."""

    def __init__(self, resident: int | None = None) -> None:
        """`resident` is the most bytes of weights that stay on the device, None for any number."""
        self.resident, self.held, self.numbers = resident, 0, count()
        self.networks: list[Pages] = []
        self.pinned = 0
        """How often memory was pinned."""

    @property
    def left_pinned(self) -> int:
        """Pages that are still in use: after a run there is none."""
        return sum(sum(pages.in_use.values()) for pages in self.networks)

    def _new_pages(self, size: float, index: int | None) -> Pages:
        self.networks.append(Pages(self, size, index))
        return self.networks[-1]

    def _register(self, *_: object) -> int:
        self.pinned += 1
        return 0

    @contextmanager
    def present(self) -> Iterator["DynamicLoading"]:
        """Core finds the stand-ins in comfy_aimdo's place for the length of the block."""
        vbar = comfy_aimdo.model_vbar
        changes = [
            (vbar, "ModelVBAR", self._new_pages),
            (vbar, "vbar_fault", lambda page: page[0].fault(*page[1:])),
            (vbar, "vbar_unpin", lambda page: None if page is None else page[0].unpin(page[1])),
            (vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b),
            (vbar, "vbars_analyze", lambda device=None: 0),
            (comfy_aimdo.torch, "aimdo_to_tensor", lambda page, device: page[0].memory(page[1])),
            (comfy_aimdo.torch, "hostbuf_to_tensor", lambda buffer: buffer.memory),
            (comfy_aimdo.host_buffer, "HostBuffer", HostBuffer),
            (management, "MAX_PINNED_MEMORY", MOST_PINNED),
            (
                torch.cuda,
                "cudart",
                lambda: SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=lambda *_: 0),
            ),
        ]
        with ExitStack() as stack:
            for module, name, value in changes:
                stack.enter_context(mock.patch.object(module, name, value))
            yield self
