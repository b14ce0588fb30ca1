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
    """A temporary path in the folder of `path`: the block writes it, then it is flushed to disk and renamed to `path`.

    After an error in the block, or an interruption, `path` is as it was and the temporary file is gone. The folder must
    exist. Where `path` is a symbolic link, the file that it leads to is replaced, and the link stays.
    """
    path = Path(os.path.realpath(path))
    temporary = path.parent / f".icmsr-{uuid.uuid4().hex}.part"
    try:
        # Readable like any new file: tempfile and safetensors make files that only their owner can read.
        with open(temporary, "xb") as made:
            mode = stat.S_IMODE(os.fstat(made.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only after an error or an interruption


def replace_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` by `replacing`; creates the folder. A pipe or a device is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
