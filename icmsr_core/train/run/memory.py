"""How much memory a step will take, found without weights: the step itself, run on tensors that hold no data.

The networks are built on torch's meta device and run in its fake-tensor mode; every operation of a forward and backward
pass is followed, and the storages alive at each moment are added up. What this cannot see is the allocator's
fragmentation and the libraries' workspaces; `tests/train/run/test_memory.py` holds the estimate against a real run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...runtime.precision import autocast
from ..tasks.task import Batch, Task


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at the worst moment, of all tensors made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on its device, by what they are for."""

    weights: int
    """The networks, frozen and trained."""
    optimizers: int
    """Moments of AdamW and running averages."""
    peak: int
    """What a step holds at its worst moment beyond both: activations and gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizers + self.peak


def estimate_memory(build: Callable[[], Task], batch: Batch, precision: str) -> tuple[MemoryEstimate, dict[str, int]]:
    """The memory of a training step of the task that `build` makes, and each player's number of trained parameters.

    `build` runs on the meta device, where tensors have no data: it makes its networks from their configurations alone.
    `batch` holds real tensors as the data loader gives them, at the size and number of the run.
    """
    with torch.device("meta"):
        task = build()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorages() as live:
        _without_data(task)
        players = task.players()
        weights = live.now
        for player in players:
            with _disable_current_modes():  # random numbers and OpenCV are real, as in a run
                batch = task.prepare(player.name, batch, 0, 0)
            with autocast(torch.device("cpu"), precision):
                losses, brings = task(player.name, batch)
            losses["loss"].backward()
            batch = {**batch, **brings}
            del losses, brings
            for parameter in player.parameters.values():
                parameter.grad = None
        peak = live.peak
    counts = {player.name: sum(p.numel() for p in player.parameters.values()) for player in players}
    moments = sum(counts[player.name] * (12 if player.averaged else 8) for player in players)
    return MemoryEstimate(weights, moments, peak - weights), counts


def _without_data(task: Task) -> None:
    """Every parameter and buffer of `task` on the CPU, without data; to be called in the fake-tensor mode."""
    made: dict[int, Tensor] = {}

    def replaced(old: Tensor) -> Tensor:
        new = made.get(id(old))
        if new is None:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            made[id(old)] = new
        return new

    for module in task.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    table[name] = replaced(old)  # type: ignore[assignment]
