"""Which pictures `icmsr upscale` reads and which files it writes, settled before any model is loaded."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import IcmsrError
from ..pictures.files import READ_EXTENSIONS, WRITE_EXTENSIONS, find_pictures, longest_side, stored_size
from ..pictures.folders import walk_folder
from ..pictures.storage import Place, RemotePath, place_of
from ..upscale.settings import UpscaleSettings

BYTES_PER_PIXEL = 12
"""Of a picture in memory, float32. An upscale holds three: the picture, the resized one and the result."""


@dataclass(frozen=True)
class Job:
    """One picture to upscale."""

    source: Place
    """The file to read."""
    target: Place
    """The file to write."""
    inside: str = field(default="", compare=False)
    """The source's path inside the folder that was named, with slashes; its name if it was named itself."""


@dataclass(frozen=True)
class NamingRules:
    """How results are named and which sources are taken."""

    extension: str = ""
    """Extension of all results, such as ".png"; empty for that of each source."""
    recursive: bool = False
    """Take sub-folders too; results keep their place in them."""
    skip_existing: bool = False
    """Leave out pictures whose result exists."""
    shard: tuple[int, int] | None = None
    """(number, count): only the pictures of that shard, 1 to count; see `shard_of`."""


@dataclass(frozen=True)
class JobList:
    """What there is to do, and what was passed over on the way."""

    jobs: list[Job]
    """Every picture, in order."""
    existing: int = 0
    """Pictures that are not in `jobs` because their result exists."""
    others: Counter[str] = field(default_factory=Counter)
    """Files in the folders that are not pictures, by extension in lower case."""
    folders: int = 0
    """Sub-folders that were not entered."""
    elsewhere: int = 0
    """Pictures that belong to other shards."""

    def passed_over(self) -> str:
        """What was passed over, in one line; empty if nothing was."""
        parts = []
        if self.elsewhere:
            parts.append(f"{self.elsewhere} of other shards")
        if self.existing:
            parts.append(f"{self.existing} whose result exists")
        if self.others:
            kinds = ", ".join(f"{kind or 'no extension'} {count}" for kind, count in sorted(self.others.items()))
            parts.append(f"{self.others.total()} that are not pictures ({kinds})")
        if self.folders:
            parts.append(f"{self.folders} sub-folders (--recursive takes them)")
        return "skipped: " + ", ".join(parts) if parts else ""


def shard_of(inside: str, count: int) -> int:
    """The shard, 1 to `count`, of the picture at the path `inside` its folder (ours: SHA-256 modulo the count).

    It depends on nothing else: every machine agrees on it, wherever the folder is mounted and whatever else is in it.
    """
    digest = hashlib.sha256(inside.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % count + 1


def plan_jobs(sources: Sequence[str | Path], target: str | Path, rules: NamingRules | None = None) -> JobList:
    """The files that ``upscale SOURCE ... TARGET`` reads and writes. Makes the target's folder if it is missing.

    A source is a picture, a folder of pictures, or a pattern (``*.jpg``) where the shell has not expanded it. Pictures
    and folders may be in a storage (``s3://bucket/folder``), on both sides. For one picture the target may be a file;
    it is a folder if it exists as one, ends with a slash, or if there are several sources. Results keep the names of
    their sources; formats that cannot be written become PNG. Raises `IcmsrError` when something is missing, cannot be
    written, would overwrite an input, or when two pictures would become one file.
    """
    rules = rules or NamingRules()
    paths = [path for source in sources for path in _expanded(source)]
    into_folder = len(paths) > 1 or paths[0].is_dir() or _means_folder(target)
    output = place_of(target)
    found = JobList([])
    if into_folder:
        if output.is_file() or (not output.is_dir() and output.suffix.lower() in WRITE_EXTENSIONS):
            raise IcmsrError(f"{output}: is not a folder: several pictures need a folder for their results")
        for path in paths:
            found = _with_source(found, path, output, rules)
    else:
        if rules.extension and output.suffix.lower() not in ("", rules.extension):
            raise IcmsrError(f"{output}: the output's extension is not that of --format {rules.extension.lstrip('.')}")
        named = output.with_suffix(rules.extension) if rules.extension else output
        found = JobList([Job(paths[0], named, paths[0].name)])
    _check(found.jobs)  # all of them, so that shards agree
    if rules.shard is not None:
        number, count = rules.shard
        own = [job for job in found.jobs if shard_of(job.inside, count) == number]
        found = replace(found, jobs=own, elsewhere=len(found.jobs) - len(own))
    if rules.skip_existing:
        existing = _existing(found.jobs, output)
        left = [job for job in found.jobs if job.target not in existing]
        found = replace(found, jobs=left, existing=len(found.jobs) - len(left))
    return found


def too_large_results(jobs: Sequence[Job], settings: UpscaleSettings) -> dict[Job, str]:
    """The jobs whose result their format cannot hold, with the reason; reads the pictures' headers only.

    A picture whose header cannot be read is no such job: reading it says why.
    """
    reasons = {}
    for job in jobs:
        size = None if longest_side(job.target) is None else stored_size(job.source)
        if size is not None:
            reasons[job] = why_too_large(job, size, settings)
    return {job: reason for job, reason in reasons.items() if reason}


def why_too_large(job: Job, size: tuple[int, int], settings: UpscaleSettings) -> str:
    """Why the format of the result cannot hold that of a picture of `size` (width, height); empty if it can."""
    longest = longest_side(job.target)
    result = settings.frame(size[1], size[0]).target
    if longest is None or max(result) <= longest:
        return ""
    return (
        f"{job.source}: the result has {result[1]} x {result[0]} pixels, {job.target.suffix} holds at most "
        f"{longest} per side: use --format png or tif"
    )


def too_much_memory(jobs: Sequence[Job], settings: UpscaleSettings, free: float | None) -> dict[Job, str]:
    """The jobs whose pictures alone take more than the `free` bytes of main memory, with the reason, from the headers.

    None for `free`: not known, so none.
    """
    reasons = {}
    for job in jobs:
        size = None if free is None else stored_size(job.source)
        if free is not None and size is not None:
            reasons[job] = why_too_much_memory(job, size, settings, free)
    return {job: reason for job, reason in reasons.items() if reason}


def why_too_much_memory(job: Job, size: tuple[int, int], settings: UpscaleSettings, free: float) -> str:
    """Why a picture of `size` (width, height) and its result do not fit into `free` bytes; empty if they may."""
    result = settings.frame(size[1], size[0]).target
    needed = BYTES_PER_PIXEL * (size[0] * size[1] + 2 * result[0] * result[1])
    if needed <= free:
        return ""
    return (
        f"{job.source}: from {size[0]} x {size[1]} to {result[1]} x {result[0]} pixels takes at least "
        f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: choose a smaller scale or size, cut "
        "the picture into parts, or close other programs"
    )


def check_writable(folder: Path) -> None:
    """Makes `folder` if it is missing and tries to write a file there; raises `IcmsrError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise IcmsrError(f"{folder}: cannot write to this folder ({error.strerror or error})") from error


def _expanded(source: str | Path) -> Iterator[Place]:
    """`source`, or the files that it matches if it is a pattern: Windows' shells leave that to the program."""
    path = place_of(source)
    if path.exists():
        yield path
        return
    if isinstance(path, RemotePath) or not glob.has_magic(os.fspath(source)):
        raise IcmsrError(f"{source}: no such file or folder")
    matches = sorted(glob.glob(os.fspath(source)))
    if not matches:
        raise IcmsrError(f"{source}: no file matches this pattern")
    yield from map(Path, matches)


def _means_folder(target: str | Path) -> bool:
    separators = tuple(filter(None, (os.sep, os.altsep, "/")))
    return os.fspath(target).endswith(separators) or place_of(target).is_dir()


def _with_source(found: JobList, source: Place, target: Place, rules: NamingRules) -> JobList:
    """`found` with the pictures of `source`, a picture or a folder, whose results go into the folder `target`."""
    if not source.is_dir():
        job = Job(source, target / result_name(Path(source.name), rules), source.name)
        return replace(found, jobs=[*found.jobs, job])
    others, folders = Counter(found.others), found.folders
    if rules.recursive or isinstance(source, RemotePath):
        if isinstance(source, RemotePath):
            files, entered_not = source.entries(rules.recursive, outside=target)
            folders += entered_not
        else:
            files = list(walk_folder(source, outside=target if isinstance(target, Path) else None))
        names = [name for name in files if name.suffix.lower() in READ_EXTENSIONS]
        others += Counter(name.suffix.lower() for name in files if name.suffix.lower() not in READ_EXTENSIONS)
    else:
        names = [Path(path.name) for path in find_pictures(source)]
        for entry in source.iterdir():
            if entry.name.startswith(".") or entry.name in {name.name for name in names}:
                continue
            if not entry.is_dir():
                others[entry.suffix.lower()] += 1
            elif entry.resolve() != target.resolve():
                folders += 1
    if not names:
        raise IcmsrError(
            f"{source}: no pictures in this folder{'' if rules.recursive or not folders else _SUB_FOLDERS}"
        )
    jobs = [Job(source / name, target / result_name(name, rules), name.as_posix()) for name in names]
    return JobList([*found.jobs, *jobs], 0, others, folders)


_SUB_FOLDERS = ", only sub-folders: use --recursive"


def result_name(name: Path, rules: NamingRules) -> Path:
    """The name of the result of the picture `name`: that name, in a format that can be written."""
    if rules.extension:
        return name.with_suffix(rules.extension)
    return name if name.suffix.lower() in WRITE_EXTENSIONS else name.with_suffix(".png")


def _check(jobs: list[Job]) -> None:
    taken: dict[Place, Place] = {}
    sources = {job.source.resolve() for job in jobs}
    for job in jobs:
        if job.target.suffix.lower() not in WRITE_EXTENSIONS:
            raise IcmsrError(f"{job.target}: cannot write this kind of file: use one of {', '.join(WRITE_EXTENSIONS)}")
        if job.target.resolve() in sources:
            raise IcmsrError(f"{job.target}: would overwrite an input: choose another output")
        other = taken.setdefault(job.target, job.source)
        if other is not job.source:
            raise IcmsrError(f"{other.name} and {job.source.name} would both be written to {job.target}: rename one")
    folders = dict.fromkeys(job.target.parent for job in jobs)
    for folder in folders:
        if isinstance(folder, Path):
            check_writable(folder)
    for remote in [folder for folder in folders if isinstance(folder, RemotePath)][:1]:  # folders are only names there
        remote.check_writable()


def _existing(jobs: Sequence[Job], target: Place) -> set[Place]:
    """The results of `jobs` that exist. A storage is asked once for all of its folder `target`."""
    if isinstance(target, Path):
        return {job.target for job in jobs if job.target.exists()}
    if target.suffix.lower() in WRITE_EXTENSIONS:
        return {target} if target.is_file() else set()
    return {target / name for name in target.entries(recursive=True)[0]} if target.exists() else set()
