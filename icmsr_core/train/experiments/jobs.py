"""Jobs of an experiment, one after the other or in several processes."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def run_jobs(jobs: int, work: Sequence[tuple[Any, ...]], what: str) -> None:
    """Does `work` in `jobs` processes and logs the progress. The first error ends the rest.

    Each entry is a function of a module and its arguments; the function returns what the log calls it.
    """
    if jobs == 1:
        for done, (function, *arguments) in enumerate(work, 1):
            logging.info("%s %d of %d done (%s)", what, done, len(work), function(*arguments))
        return
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(function, *arguments) for function, *arguments in work]
        try:
            for done, job in enumerate(as_completed(running), 1):
                result = job.result()
                left = (time.monotonic() - started) / done * (len(running) - done)
                logging.info("%s %d of %d done (%s), %.0f min left", what, done, len(running), result, left / 60)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
