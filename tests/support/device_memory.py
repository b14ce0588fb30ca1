"""The memory of the pretend device: which storages are alive, and what happens when there is no room for another."""

import weakref

from torch import Tensor

from tests.support.platform_rules import MPS_LARGEST_BUFFER, Rules, buffer_too_large_error, out_of_memory_error


class DeviceMemory:
    """Counts bytes. Temporary memory of the operations themselves is not seen, nor an allocator's reserve."""

    def __init__(self, rules: Rules, budget: int | None) -> None:
        self.budget = budget
        self.now = 0
        """Bytes in use."""
        self.peak = 0
        """The most that were in use at a time."""
        self._rules = rules
        self._known: set[int] = set()
        self._succeed: int | None = None

    def run_out_at(self, allocation: int) -> None:
        """Lets allocation number `allocation` from now on (0 is the next) fail, and that one only."""
        self._succeed = allocation

    def take(self, raw: Tensor) -> None:
        """Counts the storage of `raw` until it is freed. Raises the platform's error where it does not fit."""
        storage = raw.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self.check(size)
        if self._succeed is not None:
            self._succeed -= 1
            if self._succeed < 0:
                self._succeed = None
                raise out_of_memory_error(self._rules.platform, size, self.now, self.budget or self.now)
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._free, key, size)

    def check(self, size: int) -> None:
        """Counts `size` bytes that are needed for a moment. Raises the platform's error where they do not fit."""
        if self._rules.platform == "mps" and size > MPS_LARGEST_BUFFER:
            raise buffer_too_large_error(size)
        if self.budget is not None and self.now + size > self.budget:
            raise out_of_memory_error(self._rules.platform, size, self.now, self.budget)
        self.peak = max(self.peak, self.now + size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
