"""A whole map of a VAE, held as the stripes that it came in. Source: ours."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Main memory that a large map takes at a time. Stripes that stay where they were computed, among what does not stay,
leave a heap full of holes."""


class HeldMap:
    """Stripes [N, C, h, w] in order, each freed as soon as it has been taken.

    So a map and what is computed from it need hardly more memory than the larger of the two.
    """

    def __init__(self, axis: int) -> None:
        """`axis` is 2 for stripes of rows, 3 for stripes of columns."""
        self._axis = axis
        self._stripes: deque[Tensor] = deque()
        self._block: Tensor | None = None
        self._used = 0

    def append(self, stripe: Tensor) -> None:
        """Adds the next stripe."""
        self._stripes.append(stripe)

    def keep(self, stripe: Tensor, length: int) -> None:
        """Adds the next stripe of a map of `length` samples along the axis, on its device.

        In main memory that of a map of more than `BLOCK_BYTES` is copied into blocks that go back to the system.
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
        # Strides as the stripe's own memory would have them: in its layout, without gaps.
        strides = torch.empty_like(stripe, device="meta").stride()
        place = self._block.as_strided(stripe.shape, strides, self._used)
        self._used += stripe.numel()
        return place.copy_(stripe)

    def read(self) -> Iterator[Tensor]:
        """The stripes, which stay. None may be taken or added meanwhile."""
        return iter(self._stripes)

    def take_all(self) -> Iterator[Tensor]:
        """The stripes, each held here until it is asked for."""
        self._block = None  # lives as long as its stripes
        while self._stripes:
            yield self._stripes.popleft()

    def take(self, count: int) -> Iterator[Tensor]:
        """The next `count` samples along the axis, in the parts that they are held in."""
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

    def joined(self, index: int | None = None) -> Tensor:
        """The whole map, or entry `index` of its batch, copied into one tensor."""
        batch = slice(None) if index is None else slice(index, index + 1)
        return torch.cat([stripe[batch] for stripe in self._stripes], self._axis)


def _new_block(size: int) -> Tensor:
    """uint8 [`size`] of memory fresh from the system, in huge pages where it has them, a quarter of the time to get."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
