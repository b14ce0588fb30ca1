"""Checks that the pack is ready for the Comfy registry, and publishes it only then.

    uv run --extra test python release/publish.py --check      # says what is missing, publishes nothing
    uv run --extra test python release/publish.py              # checks, then runs `comfy node publish`

`comfy node publish` asks for the publisher's key. docs/releasing.md has the steps. Exit codes: 0 done, 1 something
stands in the way (a line for each), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from icmsr_core.console import escape_unprintable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = "node.zip"
"""What `comfy node pack` writes."""
TO_FILL_IN = (
    ("project.urls.Repository", "the address of the public repository"),
    ("project.urls.Documentation", "the address of the documentation"),
    ("project.urls.Issues", "where problems are reported"),
    ("tool.comfy.PublisherId", "the publisher's id at registry.comfy.org"),
    ("tool.comfy.Icon", "the public address of release/icon.png"),
    ("tool.comfy.Banner", "the public address of release/banner.png"),
)
"""Keys of pyproject.toml that only the owner knows, and what they mean."""
LARGEST_ICON = 400
"""Pixels of a side."""
BANNER_RATIO = 21 / 9
LARGEST_PICTURE = 1_000_000
"""Bytes of a picture in the archive."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")
NOT_IN_THE_ARCHIVE = ("tests/", "train/", "benchmarks/", "release/", "docs/", ".")
"""How names in the archive never begin."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, publishes if nothing stands in the way and it was asked for, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Checks the pack for the Comfy registry, and publishes it.")
    parser.add_argument("--check", action="store_true", help="check only")
    options = parser.parse_args(arguments)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    problems = [
        *empty_fields(project),
        *unfinished_release(project, ROOT),
        *wrong_artwork(ROOT),
        *refused_by_comfy(ROOT),
    ]
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    if problems:
        print(f"release: not published, {len(problems)} to put right: see docs/releasing.md", file=sys.stderr)
        return 1
    print(f"ready: {project['project']['name']} {project['project']['version']}")
    return 0 if options.check else comfy("node", "publish", folder=ROOT).returncode


def empty_fields(project: dict[str, Any]) -> Iterator[str]:
    """A line for each of `TO_FILL_IN` that is empty in pyproject.toml, or holds no https address where one belongs."""
    for key, meaning in TO_FILL_IN:
        value: Any = project
        for part in key.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        if not value:
            yield f"{key} is empty: write {meaning} into pyproject.toml"
        elif key != "tool.comfy.PublisherId" and not _is_address(value):
            yield f"{key} must be an https:// address, got {value!r}: write {meaning}"


def unfinished_release(project: dict[str, Any], root: Path) -> Iterator[str]:
    """What of the version is not finished: its entry in the changelog, and changes that are not committed."""
    version = project["project"]["version"]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
    if entry is None:
        yield f'CHANGELOG.md has no heading "## {version} - YYYY-MM-DD": give the unreleased changes this version'
    elif re.search(r"^- ", changelog[: entry.start()], re.MULTILINE):
        yield f"CHANGELOG.md lists changes above {version}: raise it in pyproject.toml and icmsr_core/__init__.py"
    status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    if status.returncode:
        yield f"git cannot say what has changed: {status.stderr.strip()}"
    elif status.stdout:
        yield f"{len(status.stdout.splitlines())} files are not committed: the archive holds what git tracks"


def wrong_artwork(root: Path) -> Iterator[str]:
    """What the registry would refuse of release/icon.png and release/banner.png."""
    with Image.open(root / "release" / "icon.png") as icon:
        if icon.width != icon.height or icon.width > LARGEST_ICON:
            yield f"release/icon.png must be square, at most 400 x 400, got {icon.width} x {icon.height}"
    with Image.open(root / "release" / "banner.png") as banner:
        if abs(banner.width / banner.height - BANNER_RATIO) > 0.01:
            yield f"release/banner.png must be 21:9, got {banner.width} x {banner.height}"


def refused_by_comfy(root: Path) -> Iterator[str]:
    """What comfy-cli's validator says against the pack, and what does not belong into the archive that it packs."""
    if importlib.util.find_spec("comfy_cli") is None:
        yield "comfy-cli is not installed: uv sync --extra test"
        return
    answer = comfy("node", "validate", folder=root, quiet=True)
    said = answer.stdout + answer.stderr
    # Its exit code is 0 whatever its linter finds, and what it cannot use is a warning only.
    if "All validation checks passed" not in said or "Warning" in said:
        yield f"comfy node validate does not pass: {' '.join(said.split())[-500:]}"
    archive = root / ARCHIVE
    comfy("node", "pack", folder=root, quiet=True)
    try:
        yield from wrong_in_archive(archive)
    finally:
        archive.unlink(missing_ok=True)


def wrong_in_archive(archive: Path) -> Iterator[str]:
    """What does not belong into the registry's archive, a line each."""
    if not archive.is_file():
        yield f"comfy node pack wrote no {archive.name}"
        return
    with zipfile.ZipFile(archive) as packed:
        entries = packed.infolist()
    for entry in entries:
        if entry.filename.startswith(NOT_IN_THE_ARCHIVE):
            yield f"{entry.filename} is in the archive: name it in .comfyignore"
        if entry.filename.lower().endswith(PICTURES) and entry.file_size > LARGEST_PICTURE:
            yield f"{entry.filename} has {entry.file_size / 1e6:.1f} MB, a picture in the archive at most 1 MB"


def comfy(*arguments: str, folder: Path, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs comfy-cli in `folder`, without its questions and its reports home; with `quiet` its output is kept."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *arguments]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "NO_COLOR": "1", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, encoding="utf-8", capture_output=quiet, check=False
    )


def _is_address(value: object) -> bool:
    parts = urlparse(str(value))
    return parts.scheme == "https" and "." in (parts.hostname or "")


if __name__ == "__main__":
    escape_unprintable()
    sys.exit(main())
