"""Folders and what is below them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import IcmsrError


def walk_folder(folder: Path, outside: Path | None = None) -> Iterator[Path]:
    """The files below `folder` as paths relative to it, sorted folder by folder; hidden files and folders are skipped.

    Folders that are symbolic links are entered, but none twice, so that links in a circle end. The folder `outside` is
    not entered, for results inside `folder`. Raises IcmsrError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise IcmsrError(f"{error.filename}: cannot be read ({error.strerror}): fix its permissions or remove it")

    seen = {os.path.realpath(folder)} | ({os.path.realpath(outside)} if outside is not None else set())
    for here, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        entered = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(here, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                entered.append(name)
        below[:] = entered
        inside = Path(here).relative_to(folder)
        yield from (inside / name for name in sorted(files) if not name.startswith("."))
