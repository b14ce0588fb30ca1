"""The bus between main memory and the pretend device: copies that may not block, and page-locked memory for them."""

import weakref

import torch
from torch import Tensor

from tests.support.device_trace import Trace

_PINNED: set[int] = set()
"""Storages in page-locked memory."""


def pin(source: Tensor, device: object = None) -> Tensor:
    """A copy of `source` in page-locked memory, by name only: a torch for CPUs has no allocator for it."""
    pinned = source.clone()
    storage = pinned.untyped_storage()
    _PINNED.add(storage._cdata)
    weakref.finalize(storage, _PINNED.discard, storage._cdata)
    return pinned


def is_pinned(tensor: Tensor, device: object = None) -> bool:
    """Whether `tensor` lies in page-locked memory."""
    return tensor.untyped_storage()._cdata in _PINNED


class Bus:
    """Transfers, counted in a `Trace`, that arrive as late as they may.

    One to the host that does not block is there after the next synchronisation; until then its target holds NaN.
    One from page-locked memory reads it at any moment until then, so what is there must not change.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._arriving: list[tuple[Tensor, Tensor]] = []
        """Where to, and what."""
        self._leaving: list[tuple[Tensor, Tensor]] = []
        """Where from, and what was there."""

    def to_device(self, source: Tensor, non_blocking: bool = False) -> None:
        """`source`, a CPU tensor, is copied to the device."""
        pinned = is_pinned(source)
        self._trace.copy("to device", _size(source), not non_blocking, pinned)
        if not non_blocking:
            self.settle()
        elif pinned:
            self._leaving.append((source, source.clone()))

    def to_host(self, values: Tensor, target: Tensor, non_blocking: bool = False) -> None:
        """`values` of the device are written into `target`, a CPU tensor."""
        self._trace.copy("to host", _size(values), not non_blocking, non_blocking)
        if not non_blocking:
            self.settle()
            target.copy_(values)
            return
        self._arriving.append((target, values.to(target.dtype, copy=True)))
        with torch.inference_mode(target.is_inference()):
            target.fill_(float("nan") if target.is_floating_point() else 77)

    def settle(self) -> None:
        """Everything arrives. Raises RuntimeError where page-locked memory has changed under way."""
        for source, was in self._leaving:
            if not torch.equal(source.nan_to_num(), was.nan_to_num()):
                raise RuntimeError(
                    f"page-locked memory {tuple(source.shape)} was written into while it was being copied to the "
                    "device: synchronise first, or write elsewhere"
                )
        self._leaving.clear()
        for target, values in self._arriving:
            with torch.inference_mode(target.is_inference()):
                target.copy_(values)
        self._arriving.clear()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
