"""One training at a time in a run folder: a second start would clear away what the first one is writing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import IcmsrError

LOCK, HOLDER = ".lock", ".lock-holder"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of the run `folder`, which is made, in the block.

    The operating system releases it when the process ends, also by a crash. Raises `IcmsrError` if it is held, and says
    by whom and since when.
    """
    if folder.exists() and not folder.is_dir():
        raise IcmsrError(f"{folder}: is a file, a run needs a folder: choose another run")
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            held = holder.read_text(encoding="utf-8").strip()
        except OSError:
            held = "another process"
        raise IcmsrError(
            f"{folder}: {held} is training here: wait until it ends, stop it, or choose another run folder"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"process {os.getpid()} on {platform.node()}, since {since},\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
