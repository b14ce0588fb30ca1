"""What a run asks of a device: kernels, waits and copies across the bus, by line of the project's code."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tests.support.places import ROOT

FOLDERS = tuple(f"{ROOT / name}/" for name in ("icmsr_core", "nodes", "train"))
"""Where a line belongs to the project."""

Direction = Literal["to device", "to host"]


@dataclass(frozen=True)
class Copy:
    """One transfer between main memory and the device."""

    direction: Direction
    bytes: int
    blocking: bool
    """Whether the program waited for it."""
    pinned: bool
    """Whether its end in main memory is page-locked; only then can the device copy on its own."""
    place: str
    """The line that asked for it, as ``upscale/tiling.py:170``."""


@dataclass
class Trace:
    """Everything since the start, or since `clear`."""

    launches: Counter[str] = field(default_factory=Counter)
    """Kernels by the line that launched them. An operation counts as one, however many a real device takes for it."""
    synchronisations: Counter[str] = field(default_factory=Counter)
    """Times that the program waited for the device, by line; blocking copies in either direction included."""
    copies: list[Copy] = field(default_factory=list)
    """Transfers, in order."""
    operations: Counter[str] = field(default_factory=Counter)
    """Kernels by the operation's name."""

    def clear(self) -> None:
        """Forgets everything so far."""
        for record in (self.launches, self.synchronisations, self.copies, self.operations):
            record.clear()

    def copied(self, direction: Direction) -> int:
        """Bytes that crossed the bus in `direction`."""
        return sum(copy.bytes for copy in self.copies if copy.direction == direction)

    def launch(self, operation: str) -> None:
        """Records a kernel."""
        self.launches[project_line()] += 1
        self.operations[operation] += 1

    def synchronise(self) -> None:
        """Records a wait."""
        self.synchronisations[project_line()] += 1

    def copy(self, direction: Direction, size: int, blocking: bool, pinned: bool) -> None:
        """Records a transfer."""
        self.copies.append(Copy(direction, size, blocking, pinned, project_line()))
        if blocking:
            self.synchronise()

    def summary(self, lines: int = 8) -> str:
        """The numbers in words, with the busiest lines: for messages of failed tests."""
        parts = [
            f"{self.launches.total()} launches",
            f"{self.synchronisations.total()} synchronisations",
            f"{len(self.copies)} copies ({self.copied('to device')} bytes to the device, "
            f"{self.copied('to host')} to the host)",
        ]
        for name, record in (("launches", self.launches), ("synchronisations", self.synchronisations)):
            parts += [f"  {name} {count} at {place}" for place, count in record.most_common(lines)]
        return "\n".join(parts)

    def launched_during(self, function: Callable[..., object]) -> int:
        """Kernels that `function()` launches."""
        before = self.launches.total()
        function()
        return self.launches.total() - before


def project_line() -> str:
    """File and number of the innermost line of the project that is running; "elsewhere" without one."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(FOLDERS):
            return f"{name[len(str(ROOT)) + 1 :].removeprefix('icmsr_core/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
