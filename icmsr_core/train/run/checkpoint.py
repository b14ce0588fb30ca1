"""The checkpoints of a run: whole folders that appear at once, of which the newest few are kept.

A checkpoint ``checkpoints/000016000`` holds ``state.safetensors`` (`RunState`) and what the task exports. It is written
under another name and then renamed: after a kill at any moment there is either the whole folder, or a leftover that the
next start clears away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .state import RunState

STATE_FILE = "state.safetensors"
PARTIAL = ".partial"


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; clears away what a kill left unfinished."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = _checkpoints(folder)
    return found[-1] if found else None


def write_checkpoint(run: Path, state: RunState, keep: int, export: Callable[[Path], object]) -> Path:
    """Writes the checkpoint of `state`, then removes all but the newest `keep`.

    `export` writes the task's files into the folder that it is given. It sees the averaged weights; the state holds the
    live ones, from which training goes on.
    """
    final = run / "checkpoints" / f"{state.position.images:09d}"
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with state.averaged():
        export(partial)
    state.save(partial / STATE_FILE)
    os.replace(partial, final)
    for old in _checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, the oldest first."""
    return sorted(path for path in folder.iterdir() if path.name.isdigit())
