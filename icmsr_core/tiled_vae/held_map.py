"""A whole map of a VAE, held as a list of stripes. Source: ours."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Main memory that is allocated at a time for a large map. If stripes stayed where they were computed, between tensors
that are freed, the heap would be full of holes."""


class HeldMap:
    """Stripes [N, C, h, w] in order. Each is freed as soon as it has been taken.

    So a map and the map that is computed from it need hardly more memory than the larger of the two.
    """

    def __init__(self, axis: int) -> None:
        """`axis` is 2 for stripes of rows, 3 for stripes of columns."""
        self.moments: list[Tensor] = []
        """Mean and variance of every channel, [2, N, C] for each stripe, if they were measured on the way here."""
        self._axis = axis
        self._stripes: deque[Tensor] = deque()
        self._block: Tensor | None = None
        self._used = 0

    def append(self, stripe: Tensor) -> None:
        """Adds the next stripe."""
        self._stripes.append(stripe)

    def keep(self, stripe: Tensor, length: int) -> None:
        """Adds the next stripe of a map of `length` samples along the axis; it stays on its device.

        In main memory, stripes of a map of more than `BLOCK_BYTES` are copied into blocks of that size, which go back
        to the system when they are free.
        """
        whole = stripe.numel() // stripe.shape[self._axis] * length * stripe.element_size()
        if stripe.device.type == "cpu" and whole > BLOCK_BYTES:
            stripe = self._copied(stripe)
        self.append(stripe)

    def _copied(self, stripe: Tensor) -> Tensor:
        if self._block is None or self._used + stripe.numel() > self._block.shape[0]:
            size = stripe.element_size()
            self._block = _new_block(max(stripe.numel(), BLOCK_BYTES // size) * size).view(stripe.dtype)
            self._used = 0
        # The strides that a new tensor of the stripe's layout would have: without gaps.
        strides = torch.empty_like(stripe, device="meta").stride()
        place = self._block.as_strided(stripe.shape, strides, self._used)
        self._used += stripe.numel()
        return place.copy_(stripe)

    def read(self) -> Iterator[Tensor]:
        """The stripes, without taking them. None may be taken or added before the iteration ends."""
        return iter(self._stripes)

    def take_all(self) -> Iterator[Tensor]:
        """Takes all stripes, each when the iteration comes to it."""
        self._block = None  # its memory lives as long as the stripes in it
        while self._stripes:
            yield self._stripes.popleft()

    def take(self, count: int) -> Iterator[Tensor]:
        """Takes the next `count` samples along the axis, in the parts in which they are held."""
        self._block = None
        while count:
            size = self._stripes[0].shape[self._axis]
            if size > count:
                whole = self._stripes[0]
                self._stripes[0] = whole.narrow(self._axis, count, size - count)
                yield whole.narrow(self._axis, 0, count)
                return
            count -= size
            yield self._stripes.popleft()

    @property
    def device(self) -> torch.device:
        """Where the stripes are."""
        return self._stripes[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the map."""
        return sum(stripe.nbytes for stripe in self._stripes)

    def joined(self, entries: slice = slice(None)) -> Tensor:
        """The whole map, or these entries of its batch, in one tensor."""
        parts = [stripe[entries] for stripe in self._stripes]
        return torch.cat(parts, self._axis) if len(parts) > 1 else parts[0]


def _new_block(size: int) -> Tensor:
    """uint8 [`size`], straight from the system. Huge pages, where there are any, take a quarter of the time."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
