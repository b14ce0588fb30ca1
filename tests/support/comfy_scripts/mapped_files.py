"""Which files are mapped into this process's memory: such a file can be neither replaced nor deleted under Windows."""

from pathlib import Path

MAPS = Path("/proc/self/maps")
"""Linux's list of mappings; the sixth column is the file."""


def mapped_files(*folders: Path) -> list[str]:
    """Files below `folders` (all, without any) that are mapped now, program libraries and deleted files aside."""
    lines = [line.split(maxsplit=5) for line in MAPS.read_text(encoding="utf-8").splitlines()]
    names = {Path(fields[5]) for fields in lines if len(fields) == 6 and fields[5].startswith("/")}
    places = [folder.resolve() for folder in folders] or [Path("/")]
    return sorted(str(name) for name in names if name.is_file() and any(name.is_relative_to(p) for p in places))
