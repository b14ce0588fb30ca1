"""Photographs for training: found in folders and lists, captioned, split, drawn at random, read and kept in memory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ...errors import IcmsrError
from ...pictures.files import READ_EXTENSIONS, read_picture
from ...pictures.folders import walk_folder

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """One folder or list of photographs."""

    where: str
    """The folder or list, as the configuration names it."""
    root: Path
    """The folder that the names are relative to."""
    names: tuple[str, ...]
    """Paths below `root`, with slashes, in a fixed order."""


def folder_source(folder: str) -> Source:
    """The pictures below `folder` (`READ_EXTENSIONS`), sorted by path; hidden files and folders are skipped.

    Linked folders are entered. How many files of which kinds are not pictures is logged. Raises IcmsrError for a folder
    that is missing, cannot be read, or holds no picture.
    """
    if not Path(folder).is_dir():
        raise IcmsrError(f"{folder}: {'not a folder' if Path(folder).exists() else 'no such folder'} (data.folders)")
    found = list(walk_folder(Path(folder)))
    names = [name.as_posix() for name in found if name.suffix.lower() in READ_EXTENSIONS]
    if 0 < len(names) < len(found):
        others = Counter(name.suffix.lower() for name in found if name.suffix.lower() not in READ_EXTENSIONS)
        kinds = ", ".join(f"{kind or 'no extension'} {count}" for kind, count in sorted(others.items()))
        log.info("%s: %d files are not pictures and are skipped (%s)", folder, others.total(), kinds)
    if not names:
        raise IcmsrError(f"{folder}: no pictures here (looked for {', '.join(READ_EXTENSIONS)})")
    return Source(folder, Path(folder), tuple(sorted(names, key=lambda name: name.split("/"))))


def list_source(file: str) -> Source:
    """The pictures that the text file `file` names: one path a line, relative to the list's own folder.

    Blank lines and lines that begin with # are skipped. Raises IcmsrError for a list that is missing, is not UTF-8
    text or names nothing, and for a line whose file does not exist (with the line's number).
    """
    root, names = Path(file).parent, []
    for number, line in _lines(file, "data.lists"):
        name = line.strip()
        if name.startswith("#"):
            continue
        if not (root / name).is_file():
            raise IcmsrError(f"{file}, line {number}: the file {root / name} does not exist: fix or remove the line")
        names.append(Path(os.path.normpath(name)).as_posix())
    if not names:
        raise IcmsrError(f"{file}: the list names no picture")
    return Source(file, root, tuple(names))


def read_captions(file: str) -> dict[str, str]:
    """Captions by the name of their picture, in the order of the file: lines NAME<tab>CAPTION, blank ones are skipped.

    Raises IcmsrError for a file that is missing or no UTF-8 text, a line without a tab, and a name that comes twice
    (with the line's number).
    """
    captions: dict[str, str] = {}
    for number, line in _lines(file, "data.captions"):
        name, tab, caption = line.partition("\t")
        name = Path(os.path.normpath(name.strip())).as_posix()
        if not tab:
            raise IcmsrError(f"{file}, line {number}: no tab in {line[:60]!r}: write NAME<tab>CAPTION")
        if name in captions:
            raise IcmsrError(f"{file}, line {number}: {name} has a caption already: keep one of them")
        captions[name] = caption.strip()
    return captions


def _lines(file: str, field: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise IcmsrError(f"{file}: no such file ({field})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise IcmsrError(f"{file}: cannot be read as UTF-8 text ({error}) ({field})") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def falls_into_hold_out(name: str, share: float) -> bool:
    """Whether the photograph `name` belongs to the held-out `share`, 0 to 1, of all names: by a hash of the name alone.

    It stays where it is when others come and go, and what a share holds a larger one holds too. Ours.
    """
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class Photographs:
    """The photographs of all sources in one half of the split, each with a number, from 0 up to `len(paths)`."""

    paths: list[Path]
    """The file of each photograph; the files of one source follow each other."""
    captions: tuple[str, ...]
    """The distinct captions of the photographs in both halves; entry 0 is the empty string, for those without one."""

    def __init__(
        self,
        sources: list[Source],
        weights: tuple[float, ...] = (),
        captions: dict[str, str] | None = None,
        hold_out: float = 0.0,
        held_out: bool = False,
    ) -> None:
        """`weights`: how often each source is drawn; empty: every photograph is equally likely.

        `captions` are looked up by a photograph's name in its source, then by its file name. With `hold_out`, the share
        that `falls_into_hold_out`, only the photographs outside it are kept, and with `held_out` only those inside.
        A file that two sources hold under different names is held out when one of the names is.
        Raises IcmsrError where nothing is left of a source (of all sources, with `held_out`), and where `captions`
        has no entry for any photograph.
        """
        files = [[Path(os.path.abspath(source.root / name)) for name in source.names] for source in sources]
        kept_back = {
            path
            for source, paths in zip(sources, files)
            for name, path in zip(source.names, paths)
            if hold_out and falls_into_hold_out(name, hold_out)
        }
        known: dict[str, int] = {"": 0}
        self.paths, counts = [], []
        self._captions: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        for source, paths in zip(sources, files):
            texts = [_caption(name, captions or {}) for name in source.names]
            numbers = [known.setdefault(text, len(known)) for text in texts]
            kept = [index for index, path in enumerate(paths) if (path in kept_back) == held_out]
            if not kept and not held_out:
                raise IcmsrError(f"{source.where}: data.hold_out {hold_out:g} leaves nothing to train on: lower it")
            self.paths += [source.root / source.names[index] for index in kept]
            self._captions = np.append(self._captions, np.array(numbers, dtype=np.int64)[kept])
            counts.append(len(kept))
        self.captions = tuple(known)
        if captions and len(known) == 1:
            raise IcmsrError(
                f"data.captions names none of the photographs: it has {next(iter(captions))}, "
                f"the first source has {sources[0].names[0]}"
            )
        if not self.paths:
            raise IcmsrError(
                f"data.hold_out {hold_out:g} holds out none of {sum(map(len, files))} photographs: "
                "raise it, or add photographs"
            )
        self._ends = np.cumsum(counts)
        shares = np.where(np.array(counts) > 0, weights, 0.0) if weights else np.array(counts, dtype=np.float64)
        if not shares.sum() > 0:
            raise IcmsrError(f"data.weights {weights}: no source with photographs in this half has a weight above 0")
        self._shares = np.cumsum(shares) / np.cumsum(shares)[-1] if weights else None

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a random photograph."""
        if self._shares is None:
            return int(rng.integers(len(self.paths)))
        source = int(np.searchsorted(self._shares, rng.random(), side="right"))
        start = int(self._ends[source - 1]) if source else 0
        return start + int(rng.integers(self._ends[source] - start))

    def caption(self, number: int) -> int:
        """Where the caption of photograph `number` stands in `captions`."""
        return int(self._captions[number])


def _caption(name: str, captions: dict[str, str]) -> str:
    return captions.get(name, captions.get(name.rpartition("/")[2], ""))


def read_photograph(path: Path) -> Pixels:
    """The picture in a file as uint8 RGB [H, W, 3], upright; grey is repeated, transparency laid on white.

    Raises IcmsrError for what `read_picture` refuses: a file that is missing, no picture, damaged or cut short.
    """
    picture = read_picture(path)
    rgb = picture.rgb
    if picture.alpha is not None:
        rgb = rgb * picture.alpha[..., None] + (1 - picture.alpha[..., None])
    return np.asarray(cv2.convertScaleAbs(rgb, alpha=255.0), dtype=np.uint8)  # rounds to the nearest level


class PictureCache:
    """Decoded photographs by number; the least recently used leave when `limit` bytes are full.

    It travels empty to another process: each worker fills its own.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._pictures: OrderedDict[int, Pixels] = OrderedDict()

    def get(self, number: int, read: Callable[[], Pixels]) -> Pixels:
        """Picture `number`, from `read` where it is not here; one larger than `limit` is not kept."""
        if number in self._pictures:
            self._pictures.move_to_end(number)
            return self._pictures[number]
        picture = read()
        if picture.nbytes <= self.limit:
            while self.size + picture.nbytes > self.limit:
                self.size -= self._pictures.popitem(last=False)[1].nbytes
            self._pictures[number] = picture
            self.size += picture.nbytes
        return picture

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "size": 0, "_pictures": OrderedDict()}
