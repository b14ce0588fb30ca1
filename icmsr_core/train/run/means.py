"""Means of scalars between two lines of the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .processes import Processes


class Means:
    """Means of scalars over a logging interval and over the processes, without a synchronisation per step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one value of each. Values that are not finite, from a step that is skipped, do not count."""
        for name, value in values.items():
            value = value.detach().float()
            good = value.isfinite()
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + torch.where(good, value, 0.0)
            self._counts[name] = self._counts.get(name, torch.zeros_like(value)) + good

    def take(self, processes: Processes) -> dict[str, float]:
        """The means since the last call, by name; NaN where no value was finite."""
        found = processes.mean({name: self._sums[name] / self._counts[name] for name in sorted(self._sums)})
        self._sums.clear()
        self._counts.clear()
        return dict(zip(found, torch.stack(list(found.values())).tolist())) if found else {}
