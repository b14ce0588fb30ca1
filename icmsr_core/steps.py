"""How far a long piece of work is: the work counts its steps, and whoever started it shows them."""

from __future__ import annotations

from collections.abc import Callable

Show = Callable[[int, int], None]
"""Called with (steps done, steps in all) after every step. May raise, which stops the work."""


class Steps:
    """The steps of a piece of work, such as the UNet's tiles and the VAE's stripes of one picture.

    The function that does the whole work calls `begin`, it and the functions that do parts of it call `advance`. A
    progress bar or a button that interrupts is the function `show`.
    """

    def __init__(self, show: Show | None = None) -> None:
        self.done, self.total = 0, 0
        self._show = show

    def begin(self, total: int) -> None:
        """Starts from 0 of `total` steps; shows nothing yet."""
        self.done, self.total = 0, total

    def advance(self, number: int = 1) -> None:
        """Counts `number` more steps and shows it. Raises what `show` raises."""
        self.done += number
        if self._show is not None:
            self._show(self.done, self.total)

    def portion(self, number: int) -> Portion:
        """`number` of the steps, for a part of the work that knows only which share of it is done."""
        return Portion(self, number)


class Portion:
    """Steps that are counted by the share of the work that is done. Repeated work counts no step twice."""

    def __init__(self, steps: Steps, number: int) -> None:
        self._steps, self._number, self._done = steps, number, 0

    def reach(self, share: float) -> None:
        """Counts the whole steps that lie between what was reached before and `share`, which is from 0 to 1."""
        new = int(share * self._number + 1e-6) - self._done
        if new > 0:
            self._done += new
            self._steps.advance(new)
