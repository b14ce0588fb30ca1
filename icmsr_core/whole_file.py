"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place next to `path` for the block to write a file to, which is then flushed to the disk and renamed to `path`.

    An error in the block, or an interruption, leaves what was at `path` and nothing else. The folder must be there.
    """
    temporary = path.parent / f".icmsr-{uuid.uuid4().hex}.part"
    try:
        # As readable as any new file: those of the tempfile module and of safetensors are for their owner only.
        with open(temporary, "xb") as made:
            mode = stat.S_IMODE(os.fstat(made.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already, unless something above failed or was interrupted


def replace_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` by `replacing` it. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
