"""The processes of a run: one on each device, and what they tell each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn

from ...runtime.device import pick_device
from ..tasks.task import Task


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them. All of them must make the same calls in the same order."""

    accelerator: Accelerator
    device: torch.device
    """This process's device."""

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.accelerator.is_main_process

    def wrapped(self, task: Task) -> nn.Module:
        """`task` on this device, such that backward sums the gradients of all processes."""
        task = task.to(self.device)
        return self.accelerator.prepare_model(task) if self.count > 1 else task

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if self.count == 1:
            return flag
        found: Tensor = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(found > 0)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each scalar's mean over the processes."""
        if self.count == 1:
            return dict(values)
        return {name: self.accelerator.reduce(value, "mean") for name, value in values.items()}

    def sum(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Each count's sum over the processes."""
        if self.count == 1:
            return dict(counts)
        values = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.accelerator.device)
        summed: Tensor = self.accelerator.reduce(values, "sum")
        return {name: int(value) for name, value in zip(counts, summed.tolist())}

    def union(self, names: Sequence[str]) -> list[str]:
        """The names that any process has, each once."""
        return list(names) if self.count == 1 else sorted(set(gather_object(list(names))))

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.accelerator.wait_for_everyone()


def start_processes(device: str) -> Processes:
    """The processes that this run was launched with. `device` counts where there is one process only."""
    # In each player's turn the other player's parameters get no gradient: find_unused_parameters allows that.
    together = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    picked = torch.device("cpu") if several else pick_device(device)
    cpu = device == "cpu" or (not several and picked.type == "cpu")
    # The loop has its own autocast: one from accelerate's configuration would be wrapped around it, without a scaler.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[together])
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)
    return Processes(accelerator, accelerator.device if several else picked)
