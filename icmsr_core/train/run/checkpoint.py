"""The checkpoints of a run: whole folders that appear at once, of which the newest few are kept.

A checkpoint ``checkpoints/000016000`` holds ``state.safetensors`` (`RunState`) and what the task exports. It is written
under another name and then renamed: after a kill at any moment there is either the whole folder, or a leftover that the
next start clears away.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ...errors import IcmsrError
from ...weights.tensor_files import open_tensors
from .state import RunState

log = logging.getLogger(__name__)
STATE_FILE = "state.safetensors"
PARTIAL = ".partial"
DAMAGED = ".damaged"


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; clears away what a kill left unfinished.

    One whose state is damaged is renamed with a logged warning, and the one before is taken. Raises `IcmsrError` where
    all are damaged.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    for leftover in folder.glob(f"*{PARTIAL}"):
        _remove(leftover)
    found = whole_checkpoints(run)
    for path in reversed(found):
        try:
            with open_tensors(path / STATE_FILE):
                return path
        except IcmsrError as error:
            log.warning("the checkpoint %s is damaged and renamed: going on from the one before (%s)", path, error)
            os.replace(path, path.with_name(path.name + DAMAGED))
    if found:
        raise IcmsrError(
            f"{folder}: every checkpoint is damaged (they are renamed to *{DAMAGED}): the same command now begins "
            "again, or choose another run folder"
        )
    return None


def checkpoint_folder(run: Path, images: int) -> Path:
    """Where the checkpoint of a run at that position is, or would be."""
    return run / "checkpoints" / f"{images:09d}"


def write_checkpoint(run: Path, state: RunState, keep: int, export: Callable[[Path], object]) -> Path:
    """Writes the checkpoint of `state`, then removes all but the newest `keep`.

    `export` writes the task's files into the folder that it is given. It sees the averaged weights; the state holds the
    live ones, from which training goes on.
    """
    final = checkpoint_folder(run, state.position.images)
    partial = final.with_name(final.name + PARTIAL)
    if partial.exists():
        _remove(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with state.averaged():
            export(partial)
        state.save(partial / STATE_FILE)
    except (IcmsrError, OSError):
        _remove(partial)  # on a full disk its space is needed
        raise
    os.replace(partial, final)
    for old in whole_checkpoints(run)[:-keep]:
        _remove(old)
    return final


def whole_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that are not being written, the oldest first; empty where there are none."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _remove(folder: Path) -> None:
    """Removes a checkpoint, or says why it stays: under Windows a file in it may be open in another program.

    It is renamed first: one of which only a part could be removed never looks whole, and the next start tries again.
    """
    leftover = folder if folder.name.endswith(PARTIAL) else folder.with_name(folder.name + PARTIAL)
    try:
        if leftover != folder:
            os.replace(folder, leftover)
        shutil.rmtree(leftover)
    except OSError as error:
        log.warning("%s stays: it cannot be removed (%s): close what has it open", folder, error.strerror or error)
