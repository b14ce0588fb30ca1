"""A run asks for room for its checkpoints before it begins."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.disk_space import check_disk_space, checkpoint_bytes
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.plan import PlannedStage
from icmsr_core.train.run.state import RunState
from icmsr_core.train.tasks.task import Player


class Network:
    """A task as far as it is asked: its players."""

    def __init__(self) -> None:
        self.layer = nn.Linear(500, 500)

    def players(self) -> list[Player]:
        return [Player("weights", dict(self.layer.named_parameters()))]


def planned(folder: Path, images: int = 16, keep: int = 2) -> PlannedStage:
    return PlannedStage("stage", LoopConfig(images=images, batch=4, keep=keep), Network, folder)


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_the_size_of_a_checkpoint_is_known_without_it(tmp_path):
    task = Network()
    players = task.players()
    state = RunState(players, LoopConfig(), 4, "{}")
    task.layer(torch.ones(2, 500)).sum().backward()
    state.descend(players[0])
    state.save(tmp_path / "state.safetensors")
    exported = 2 * sum(parameter.numel() for parameter in task.layer.parameters())
    size = (tmp_path / "state.safetensors").stat().st_size + exported
    assert size == pytest.approx(checkpoint_bytes(players[0]), rel=0.01)


def test_a_disk_that_is_too_full_is_said_before_anything_is_made(tmp_path, monkeypatch):
    one = checkpoint_bytes(Network().players()[0])
    with_free(monkeypatch, 3 * one - 1)  # two are kept while the third is written
    with pytest.raises(
        IcmsrError, match=rf"^{tmp_path}: the checkpoints need 13\.5 MB, 13\.5 MB are free there: free some"
    ):
        check_disk_space([planned(tmp_path / "runs" / "new")], 1)
    assert not (tmp_path / "runs").exists()
    with_free(monkeypatch, 3 * one)
    check_disk_space([planned(tmp_path / "runs" / "new")], 1)
    with pytest.raises(IcmsrError, match=r"need 27\.1 MB"):
        check_disk_space([planned(tmp_path / "run" / "first"), planned(tmp_path / "run" / "second")], 1)


def test_what_is_there_already_needs_no_more_room(tmp_path, monkeypatch):
    one = checkpoint_bytes(Network().players()[0])
    for images in (4, 8):
        (tmp_path / "checkpoints" / f"{images:09d}").mkdir(parents=True)
    with_free(monkeypatch, one)
    check_disk_space([planned(tmp_path)], 1)
    with_free(monkeypatch, one - 1)
    with pytest.raises(IcmsrError, match="are free there"):
        check_disk_space([planned(tmp_path)], 1)
    check_disk_space([planned(tmp_path, images=11)], 1)  # ended at 8: no whole step of 4 is left
