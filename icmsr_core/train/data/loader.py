"""Batches of samples for each process of a run: the same samples however they are divided, and after any resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ...errors import IcmsrError
from .samples import Samples


class Resumable(Sampler[int]):
    """The sample numbers of process `rank`, from `start` up to at most `stop`.

    Every step of all processes takes the next batch * processes numbers, of which process r has the r-th run of `batch`
    numbers; an incomplete last step is dropped.
    """

    def __init__(self, start: int, stop: int, batch: int = 1, rank: int = 0, processes: int = 1) -> None:
        if batch < 1 or not 0 <= rank < processes:
            raise IcmsrError(
                f"batch must be at least 1 and rank from 0 up to below processes, got batch {batch}, "
                f"rank {rank}, processes {processes}"
            )
        self.batch, self.step = batch, batch * processes
        self.first, self.steps = start + rank * batch, max(0, stop - start) // self.step

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            first = self.first + step * self.step
            yield from range(first, first + self.batch)

    def __len__(self) -> int:
        return self.steps * self.batch


def make_loader(
    samples: Samples, numbers: Resumable, workers: int, pin_memory: bool = False
) -> DataLoader[dict[str, Tensor]]:
    """Batches of `samples`: those that `numbers` names, the same for any number of workers.

    All processes together see, step by step and in their order, the samples that one process with the batch
    ``batch * processes`` sees. `pin_memory` puts the batches into page-locked memory (see `pins_memory`).
    """
    return DataLoader(
        samples,
        batch_size=numbers.batch,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    # A scheduler, `timeout` or Ctrl-C signals the whole process group, and a worker that died of it would take the loop
    # down before the state is saved. A group of its own, rather than ignoring all signals: the loop ends its workers
    # with SIGTERM. Windows has no such groups; there Ctrl-C reaches every process of the console.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGBREAK"):
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
