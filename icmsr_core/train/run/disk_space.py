"""Whether a run's checkpoints fit on its disk, asked before it begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import IcmsrError
from ..tasks.task import Player
from .checkpoint import whole_checkpoints
from .plan import PlannedStage


def check_disk_space(stages: Sequence[PlannedStage], processes: int) -> None:
    """Raises `IcmsrError`, with the bytes that are needed and free, where the disk cannot take the checkpoints.

    Checkpoints that are there already count as taken; a stage that has ended needs none. `processes` is their number.
    """
    needed = sum(_missing_bytes(stage, processes) for stage in stages)
    folder = Path(os.path.commonpath([stage.folder.absolute() for stage in stages]))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise IcmsrError(
            f"{folder}: the checkpoints need {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free there: free some, "
            "choose a run folder on another disk, or keep fewer (keep of the loop)"
        )


def _missing_bytes(stage: PlannedStage, processes: int) -> int:
    loop, there = stage.loop, whole_checkpoints(stage.folder)
    step = loop.batch * loop.accumulate * processes
    if there and int(there[-1].name) >= loop.images // step * step:
        return 0
    with torch.device("meta"):
        players = stage.build().players()
    # The one that is being written stands beside those that are kept.
    return max(1, loop.keep + 1 - len(there)) * sum(map(checkpoint_bytes, players))


def checkpoint_bytes(player: Player) -> int:
    """What a checkpoint holds of `player`: its weights and two moments, its average, and the file that is made of it,
    which is in half precision or better."""
    weights = sum(parameter.numel() for parameter in player.parameters.values())
    return weights * (4 * 3 + (4 + 2 if player.averaged else 0))
