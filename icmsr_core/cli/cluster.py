"""Upscaling of many pictures on a Ray cluster: `icmsr upscale IN OUT --ray`.

Ray Data hands out the numbers of pictures to actors, each of which holds the networks, and starts a dead one again.
What an actor does with its pictures is what a folder run does (`upscale_jobs`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import IcmsrError
from ..pictures.files import Picture, read_picture
from ..upscale.free_memory import free_system_memory
from ..upscale.settings import UpscaleSettings
from .job_list import Job, why_too_large, why_too_much_memory
from .picture_jobs import UntilItFits, upscale_jobs

THREADS = 4
"""Processors of a worker without a card, at most. Each worker holds the networks: fewer workers take less memory."""
TOGETHER = 16
"""Pictures that a worker is handed at once, at most: it reads and writes while it computes, but not beyond these."""
TRIES = 4
"""How often a worker may die over the same pictures, once together and once one by one."""


@dataclass(frozen=True)
class Workers:
    """How a cluster is used."""

    count: int
    cards: int
    """Graphics cards of each, 0 or 1."""
    threads: int
    """Processors of each."""

    def words(self) -> str:
        """For a message."""
        each = "a graphics card" if self.cards else f"{self.threads} processor{'s' if self.threads > 1 else ''}"
        return f"{self.count} worker{'s' if self.count > 1 else ''} with {each} each"


def workers_of(machines: Sequence[Mapping[str, float]], device: str) -> Workers:
    """The workers for machines with these resources of Ray (``CPU``, ``GPU``): one for each card, else `THREADS` each.

    `device` is auto, cpu or cuda. Raises `IcmsrError` where there is nothing to work on.
    """
    cards = int(sum(machine.get("GPU", 0) for machine in machines))
    if cards and device != "cpu":
        return Workers(cards, 1, 1)
    if device == "cuda":
        raise IcmsrError("--device cuda: no machine of the cluster has a graphics card that Ray knows of: use cpu")
    processors = [int(machine.get("CPU", 0)) for machine in machines if machine.get("CPU", 0) >= 1]
    if not processors:
        raise IcmsrError("the cluster has no processors to work on: start its machines with ray start --num-cpus N")
    threads = min(THREADS, *processors)
    return Workers(sum(count // threads for count in processors), 0, threads)


class Worker:
    """An actor: holds the networks and upscales the pictures whose numbers it is given."""

    def __init__(
        self, jobs: Sequence[Job], prepare: Callable[[], UntilItFits], settings: UpscaleSettings, quality: int
    ) -> None:
        """`jobs` are those of all workers; `prepare` loads the networks."""
        self._warnings = _Collected(logging.WARNING)
        logging.getLogger(__name__.partition(".")[0]).addHandler(self._warnings)
        self._jobs, self._settings, self._quality = jobs, settings, quality
        self._fitting = prepare()

    def __call__(self, batch: Mapping[str, Iterable[int]]) -> dict[str, list[Any]]:
        """A row for each picture of `batch`, with its number and why it failed; and rows for warnings, number -1."""
        numbers = [int(number) for number in batch["item"]]
        failures: list[str] = []
        lines: list[str] = []

        def done(_: Job) -> None:
            lines.append(failures.pop() if failures else "")

        upscale_jobs(
            self._fitting,
            [self._jobs[number] for number in numbers],
            report=failures.append,
            done=done,
            read=self._read,
            quality=self._quality,
        )
        warnings = self._warnings.taken()
        return {"number": [*numbers, *(-1 for _ in warnings)], "line": [*lines, *warnings]}

    def _read(self, job: Job) -> Picture:
        """The picture, unless its result is too large: what a folder run reads from the headers before."""
        picture = read_picture(job.source)
        size, free = (picture.rgb.shape[1], picture.rgb.shape[0]), free_system_memory()
        reason = why_too_large(job, size, self._settings)
        if not reason and free is not None:
            reason = why_too_much_memory(job, size, self._settings, free)
        if reason:
            raise IcmsrError(reason)
        return picture


class _Collected(logging.Handler):
    """Keeps the log's lines until they are taken."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def taken(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class Cluster:
    """What a connection to Ray can do; see `connected`."""

    def __init__(self, machines: int, workers: Workers) -> None:
        self.machines, self.workers = machines, workers

    def upscale(
        self, jobs: Sequence[Job], prepare: Callable[[], UntilItFits], settings: UpscaleSettings, quality: int
    ) -> Iterator[tuple[Job | None, str]]:
        """Upscales `jobs`; gives each as soon as it is known, with why it failed, empty if it did not; and warnings.

        `prepare` is called in each worker. A warning comes once, without a job. Raises `IcmsrError` when no worker gets
        ready.
        """
        arguments = (list(jobs), prepare, settings, quality)
        left = dict(enumerate(jobs))
        told: set[str] = set()
        together = max(1, min(TOGETHER, len(jobs) // (4 * self.workers.count)))
        for size in dict.fromkeys((together, 1)):
            for number, line in self._rows(list(left), size, arguments) if left else ():
                if number in left:
                    yield left.pop(number), line
                elif number < 0 and line not in told:
                    told.add(line)
                    yield None, line
        for job in left.values():
            yield job, f"{job.source}: its worker died each time: too little memory, or see the logs of Ray"

    def _rows(self, numbers: list[int], size: int, arguments: tuple[Any, ...]) -> Iterator[tuple[int, str]]:
        """The rows that workers return for `numbers`, `size` at a time; none for those that workers died over."""
        import ray

        parts = -(-len(numbers) // size)
        rows = ray.data.from_items(numbers, override_num_blocks=parts).map_batches(
            Worker,
            fn_constructor_args=arguments,
            batch_size=None,
            concurrency=min(self.workers.count, parts),
            num_cpus=self.workers.threads,
            num_gpus=self.workers.cards,
            max_task_retries=TRIES - 1,
        )
        try:
            for row in rows.iter_rows():
                yield int(row["number"]), str(row["line"])
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise IcmsrError(f"a worker of the cluster cannot begin: {reason}") from error


def _knock(address: str) -> None:
    """Raises `OSError` where nobody listens at HOST:PORT. Ray itself would try for minutes."""

    async def connect(host: str, port: int) -> None:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout=10)
        writer.close()

    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        asyncio.run(connect(host, int(port)))


@contextmanager
def connected(address: str, device: str) -> Iterator[Cluster]:
    """The cluster at `address`: auto, local, or HOST:PORT. Raises `IcmsrError` where there is none.

    Empty: the one of $RAY_ADDRESS, else the one that runs on this machine, else one that is made of this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` the folder would be sent around
    import ray
    import ray.data

    try:
        _knock(address)
        ray.init(address or None, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, ...
        reason = " ".join(str(error).split())
        raise IcmsrError(f"--ray {address}: no cluster there ({reason}): start one with ray start --head") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # what is lost with a worker does not end the run: see `upscale`
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Cluster(len(machines), workers_of(machines, device))
    finally:
        ray.shutdown()
