"""A whole map of a VAE, held as the stripes that it came in. Source: ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class HeldMap:
    """Stripes [N, C, h, w] in order, each freed as soon as it has been taken.

    So a map and what is computed from it need hardly more memory than the larger of the two, and nothing is copied.
    """

    def __init__(self, axis: int) -> None:
        """`axis` is 2 for stripes of rows, 3 for stripes of columns."""
        self._axis = axis
        self._stripes: deque[Tensor] = deque()

    @property
    def device(self) -> torch.device | None:
        """Where the stripes are; None while there are none."""
        return self._stripes[0].device if self._stripes else None

    def append(self, stripe: Tensor) -> None:
        """Adds the next stripe."""
        self._stripes.append(stripe)

    def read(self) -> Iterator[Tensor]:
        """The stripes, which stay. None may be taken or added meanwhile."""
        return iter(self._stripes)

    def take_all(self) -> Iterator[Tensor]:
        """The stripes, each held here until it is asked for."""
        while self._stripes:
            yield self._stripes.popleft()

    def take(self, count: int) -> Iterator[Tensor]:
        """The next `count` samples along the axis, in the parts that they are held in."""
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
