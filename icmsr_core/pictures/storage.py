"""Files in storages that fsspec reaches, such as s3://bucket/folder/photo.png, beside those in folders."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import IcmsrError

URL = re.compile(r"[a-z][a-z0-9+.-]+://")
"""How the address of a file in a storage begins; a drive of Windows has one letter only."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder in a storage, with what pictures need of `pathlib.Path`. All methods raise `IcmsrError`."""

    system: Any
    """The storage, a filesystem of fsspec. It can be sent to another process."""
    key: str
    """The path inside it, without a slash at its end."""

    def __str__(self) -> str:
        return str(self.system.unstrip_protocol(self.key))

    def __truediv__(self, inside: str | Path) -> RemotePath:
        return RemotePath(self.system, f"{self.key}/{Path(inside).as_posix()}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The extension with its dot; empty if there is none."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder around it."""
        return RemotePath(self.system, self.key.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same path with another extension."""
        return self.parent / PurePosixPath(self.name).with_suffix(suffix).name

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    resolve = absolute

    def exists(self) -> bool:
        """Whether there is a file or a folder. Raises when the storage does not answer."""
        with self._named():
            return bool(self.system.exists(self.key))

    def is_dir(self) -> bool:
        """Whether it is a folder: for object stores, whether there is an object below it."""
        with self._named():
            return bool(self.system.isdir(self.key))

    def is_file(self) -> bool:
        """Whether it is a file."""
        with self._named():
            return bool(self.system.isfile(self.key))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading; only what is read is fetched, in small blocks, for headers."""
        with self._named():
            opened: BinaryIO = self.system.open(self.key, mode, block_size=2**16)
            return opened

    def read_bytes(self) -> bytes:
        """All of the file."""
        with self._named():
            return bytes(self.system.cat_file(self.key))

    def write_bytes(self, data: bytes) -> None:
        """Writes the file in one go: in an object store it appears whole or not at all."""
        with self._named():
            self.system.pipe_file(self.key, data)

    def check_writable(self) -> None:
        """Tries to write a file into this folder, and removes it."""
        trial = self / f".icmsr-{uuid.uuid4().hex}.part"
        trial.write_bytes(b"-")
        with self._named():
            self.system.rm_file(trial.key)

    def entries(self, recursive: bool, outside: Place | None = None) -> tuple[list[Path], int]:
        """The files in this folder, relative to it and sorted, and the number of sub-folders that were not entered.

        As `folders.walk_folder`: hidden ones are left out, the folder `outside` too.
        """
        with self._named():
            found = self.system.find(
                self.key, maxdepth=None if recursive else 1, withdirs=not recursive, detail=True, refresh=True
            )
        other = isinstance(outside, RemotePath) and outside.system == self.system and outside.key != self.key
        left_out = f"{outside.key}/" if isinstance(outside, RemotePath) and other else None
        files, folders = [], 0
        for key, about in found.items():
            inside = key.removeprefix(self.key).strip("/")
            hidden = any(part.startswith(".") for part in inside.split("/"))
            if not inside or hidden or (left_out is not None and f"{key}/".startswith(left_out)):
                continue
            if about["type"] == "directory":
                folders += 1
            elif not key.endswith("/"):  # an empty object that stands for a folder
                files.append(Path(inside))
        return sorted(files), folders

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says which file it was when something in the block fails."""
        try:
            yield
        except FileNotFoundError:
            raise IcmsrError(f"{self}: no such file or folder") from None
        except Exception as error:  # each storage has its own: no credentials, no connection, ...
            raise IcmsrError(f"{self}: {' '.join(str(error).split()) or type(error).__name__}") from error


Place = Path | RemotePath
"""Where a picture is."""


def place_of(place: str | os.PathLike[str] | RemotePath) -> Place:
    """The path, or the file in a storage, that a text such as s3://bucket/photo.png names.

    Raises `IcmsrError` for a storage that is unknown, or whose package is not installed.
    """
    if isinstance(place, RemotePath):
        return place
    text = os.fspath(place)
    if not URL.match(text):
        return Path(text)
    try:
        from fsspec.core import url_to_fs  # comes with torch

        system, key = url_to_fs(text, use_listings_cache=False)  # others write there, too
    except ImportError as error:
        raise IcmsrError(f"{text}: {error} (for s3:// pip install 'icm-sr[ray]')") from error
    except ValueError as error:
        raise IcmsrError(f"{text}: {error}: use a path, or an address such as s3://bucket/folder") from error
    return Path(key) if "file" in _protocols(system) else RemotePath(system, key.rstrip("/"))


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
