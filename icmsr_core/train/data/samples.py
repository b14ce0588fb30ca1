"""What a run trains on: samples by number, and the count of what was met while they were drawn."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import IcmsrError
from .data_config import DataConfig
from .sources import read_photograph

log = logging.getLogger(__name__)


class Samples(Dataset[dict[str, Tensor]]):
    """What a run trains on: endlessly many samples, each a function of the run's seed and its number alone."""

    config: DataConfig
    photographs: list[Path]
    """The photographs they come from; a sample's ``unreadable`` counts in this list."""

    def __len__(self) -> int:
        return 1 << 40  # the sampler says when to stop

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample number `index`."""

    @abstractmethod
    def blank(self) -> dict[str, Tensor]:
        """A sample of the same shapes, made without reading a photograph."""


def last_samples(samples: Samples, count: int) -> dict[str, Tensor]:
    """A batch of the last `count` samples, from the last one back: no run trains on them."""
    found = [samples[len(samples) - 1 - number] for number in range(count)]
    return {name: torch.stack([sample[name] for sample in found]) for name in found[0]}


class Tally:
    """What the samples of a run met, counted in the main process from its batches.

    Each unreadable photograph is logged as a warning, with the reason, when it is first seen.
    """

    unreadable: list[str]
    """The files that could not be read, sorted."""

    def __init__(self, pairs: Samples) -> None:
        self._photographs = pairs.photographs
        self._samples, self._events = 0, [0, 0]
        self.unreadable = []

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Counts one batch of `make_loader`'s (``events`` [batch, 2] and ``unreadable`` [batch, 4] of it)."""
        self._samples += len(batch["events"])
        for column, count in enumerate(batch["events"].sum(dim=0).tolist()):
            self._events[column] += count
        for number in set(batch["unreadable"].flatten().tolist()) - {-1}:
            path = self._photographs[number]
            if str(path) not in self.unreadable:
                self.unreadable = sorted([*self.unreadable, str(path)])
                log.warning("skipped in training: %s", _why_unreadable(path))

    def take(self) -> dict[str, int]:
        """How many samples there were since the last call, and how often an unreadable and a small photograph were met
        in them: the keys samples, unreadable and small."""
        unreadable, small = self._events
        counts = {"samples": self._samples, "unreadable": unreadable, "small": small}
        self._samples, self._events = 0, [0, 0]
        return counts


def _why_unreadable(path: Path) -> str:
    try:
        read_photograph(path)
    except IcmsrError as error:
        return str(error)
    return f"{path}: it could not be read by a data worker, though it can be now"
