"""The loop on a task whose every step is known: guards, averages, schedules, records."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.run import loop
from icmsr_core.train.run.checkpoint import newest_checkpoint
from icmsr_core.train.run.logs import read_metrics
from icmsr_core.train.run.loop import train
from icmsr_core.train.run.loop_config import LoopConfig, lengths_of
from icmsr_core.train.run.processes import Processes
from icmsr_core.train.run.state import RunState, fingerprint
from icmsr_core.train.settings import compared_settings
from icmsr_core.train.tasks.task import Batch, Player, Task
from tests.support.pictures import write_random_picture


class Points(Task):
    """Two numbers, pulled towards 3 and -1; the first one's gradient is not a number for samples in `poison`."""

    def __init__(self, poison: Sequence[int] = ()) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.poison = set(poison)
        self.turns: list[tuple[str, int, int]] = []

    def players(self) -> list[Player]:
        return [
            Player("first", {"x": self.first}),
            Player("second", {"x": self.second}, 2, 0.5, averaged=False),
        ]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        self.turns.append((player, images, turn))
        return batch

    def forward(self, player: str, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        if player == "first":
            loss = (self.first - 3).square().mean()
            bad = any(int(number) in self.poison for number in batch["index"])
            return {"loss": loss * (float("nan") if bad else 1.0)}, {"seen": self.first.detach().clone()}
        return {"loss": (self.second + 1).square().mean() + 0 * batch["seen"].sum()}, {}

    def grid(self, batch: Batch) -> Tensor:
        return batch["sharp"][0].float() / 255

    def export(self, folder: Path, settings: dict[str, object]) -> list[Path]:
        path = folder / "points.json"
        path.write_text(json.dumps([float(self.first.detach()), float(self.second.detach())]))
        return [path]


def run(task: Points, folder: Path, **options: object) -> list[Path]:
    values = {
        "images": 16,
        "batch": 2,
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_images": 0,
        "precision": "fp32",
        "workers": 0,
        "save_every": 8,
        "log_every": 2,
        "tensorboard": False,
        **options,
    }
    config = LoopConfig(**values)
    pairs = TrainingPairs(DataConfig(synthetic=1, crop=32), 0)
    return train(task, pairs, config, folder, {"loop": config}, Processes(Accelerator(cpu=True), torch.device("cpu")))


def test_each_player_takes_its_turns(tmp_path):
    task = Points()
    run(task, tmp_path, images=4, accumulate=2)
    # One step of four images: the first player twice for the two accumulated batches, the second in two turns.
    assert task.turns == [("first", 0, 0)] * 2 + [("second", 0, 0)] * 2 + [("second", 0, 1)] * 2
    # AdamW's first steps have the length of the learning rate; the second player has half of it, twice.
    assert float(task.first) == pytest.approx(0.1, rel=1e-4)
    assert float(task.second) == pytest.approx(-0.1, rel=1e-2)
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert row["lr/first"] == pytest.approx(0.1)
    assert row["lr/second"] == pytest.approx(0.05)


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path):
    good, bad = Points(), Points(poison=[4])
    run(good, tmp_path / "good", images=6)
    run(bad, tmp_path / "bad", images=8)
    rows = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    assert [row["health/skipped"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["loss/first/loss"] is None
    assert rows[3]["loss/first/loss"] > 0
    assert float(bad.first) == pytest.approx(float(good.first), rel=1e-6), "three good steps of the first player each"
    assert float(bad.second) < float(good.second), "the other player went on"


def test_too_many_of_them_in_a_row_stop_the_run(tmp_path):
    """Counted for each player: the good steps of the other do not hide them."""
    with pytest.raises(IcmsrError, match=r"3 optimiser steps of first in a row .* at 8 images.*precision fp32"):
        run(Points(poison=range(4, 99)), tmp_path, images=64, patience=3)
    # One good step in between starts the count anew.
    run(Points(poison=[0, 4, 8, 12]), tmp_path / "other", patience=2)


class StoppedBetween(Points):
    """Gets Ctrl-C between two steps, at a moment when a data worker dies of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int, signalled: bool = True) -> None:
        super().__init__()

        def batches(samples, numbers, *_):
            planned = list(numbers)
            for first in range(0, steps * numbers.batch, numbers.batch):
                yield default_collate([samples[number] for number in planned[first : first + numbers.batch]])
            if signalled:
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

        monkeypatch.setattr(loop, "make_loader", batches)


@pytest.mark.parametrize(("steps", "checkpoints"), [(3, ["000000006"]), (4, ["000000008"])])
def test_ctrl_c_that_ends_the_data_workers_too_saves_the_state(tmp_path, monkeypatch, steps, checkpoints):
    """After four steps the checkpoint is there already."""
    monkeypatch.setattr(loop, "save_grid", lambda *_: None)
    with pytest.raises(loop.Interrupted, match=f"stopped at {2 * steps} images; the same command goes on"):
        run(StoppedBetween(monkeypatch, steps), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == checkpoints
    monkeypatch.undo()
    run(Points(), tmp_path)
    run(Points(), tmp_path / "whole")
    assert (tmp_path / "points.json").read_bytes() == (tmp_path / "whole" / "points.json").read_bytes()


def test_data_workers_that_die_of_something_else_end_the_run(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        run(StoppedBetween(monkeypatch, 1, signalled=False), tmp_path)


def test_a_checkpoint_that_cannot_be_removed_is_named_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    """Under Windows, one with a file that is open elsewhere: it can be neither renamed nor deleted."""
    replace = os.replace

    def held(source, target):
        if Path(source).name == "000000004":
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    run(Points(), tmp_path, save_every=4, log_every=100, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000000004", "000000016"]
    warnings = [record.message for record in caplog.records if "cannot be removed" in record.message]
    assert len(warnings) == 3
    assert "000000004 stays: it cannot be removed (The process cannot access the file" in warnings[0]


def test_a_checkpoint_of_which_a_part_is_left_never_looks_whole(tmp_path, monkeypatch):
    def half(folder):
        next(folder.iterdir()).unlink()
        raise PermissionError(13, "in use")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        run(Points(), tmp_path, save_every=8, log_every=100, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000000008.partial", "000000016"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "000000016"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000016"]


def on_photographs(task: Points, run_folder: Path, photographs: Path, **options: object) -> list[Path]:
    """As `run`, on the photographs of a folder."""
    config = LoopConfig(images=8, batch=2, precision="fp32", workers=0, save_every=4, tensorboard=False, **options)
    pairs = TrainingPairs(DataConfig(folders=(str(photographs),), synthetic=0.5, crop=32), 0)
    settings = {"loop": config}
    return train(task, pairs, config, run_folder, settings, Processes(Accelerator(cpu=True), torch.device("cpu")))


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "renamed"])
def test_photographs_that_changed_since_a_run_began_are_not_taken_silently(tmp_path, change):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("a.png", "b.png"):
        write_random_picture(photographs / name, 40, 40)
    on_photographs(Points(), tmp_path / "run", photographs)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000008")
    moved = tmp_path / "elsewhere"
    shutil.copytree(photographs, moved)
    on_photographs(Points(), tmp_path / "run", moved)  # the same ones at another place
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000008")
    if change == "added":
        write_random_picture(moved / "c.png", 40, 40)
    elif change == "removed":
        (moved / "b.png").unlink()
    elif change == "replaced":
        write_random_picture(moved / "b.png", 41, 40)
    else:
        (moved / "b.png").rename(moved / "c.png")
    with pytest.raises(IcmsrError, match="photographs were added, removed or replaced since this run began"):
        on_photographs(Points(), tmp_path / "run", moved)
    on_photographs(Points(), tmp_path / "run", moved, changed_photographs=True)
    assert (tmp_path / "run" / "checkpoints" / "000000008").is_dir()


def cut_state(folder: Path) -> None:
    """Cuts a checkpoint's state short, as a full disk or a pulled plug may leave it."""
    state = folder / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog):
    straight, other = Points(), Points()
    run(straight, tmp_path / "straight", save_every=4, log_every=100, keep=4)
    run(Points(), tmp_path / "cut", save_every=4, log_every=100, keep=4)
    cut_state(tmp_path / "cut" / "checkpoints" / "000000016")
    run(other, tmp_path / "cut", save_every=4, log_every=100, keep=4)
    assert "000000016 is damaged and renamed: going on from the one before" in caplog.text
    for one, two in zip(straight.parameters(), other.parameters()):
        assert torch.equal(one, two)
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert names == ["000000004", "000000008", "000000012", "000000016", "000000016.damaged"]


def test_damage_to_every_checkpoint_is_said_and_the_run_can_begin_again(tmp_path):
    run(Points(), tmp_path, save_every=8, log_every=100, keep=2)
    for folder in (tmp_path / "checkpoints").iterdir():
        cut_state(folder)
    with pytest.raises(IcmsrError, match="every checkpoint is damaged"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_the_one_before(tmp_path, monkeypatch):
    written = []

    def filling(tensors, path, metadata):
        if written:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("icmsr_core.weights.tensor_files.save_file", filling)
    with pytest.raises(
        IcmsrError, match=r"cannot be written \(I/O error: No space left .*it needs [\d.]+ MB, [\d.]+ MB are"
    ):
        run(Points(), tmp_path, save_every=8, log_every=100)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000008"]
    monkeypatch.undo()
    straight, resumed = Points(), Points()
    run(resumed, tmp_path, save_every=8, log_every=100)
    run(straight, tmp_path / "straight", save_every=8, log_every=100)
    assert torch.equal(straight.first, resumed.first)


def test_another_split_of_the_batch_may_resume_and_another_batch_may_not(tmp_path):
    run(Points(), tmp_path / "a", images=16, batch=4)
    run(Points(), tmp_path / "a", images=16, batch=2, accumulate=2)
    with pytest.raises(IcmsrError, match=r"another configuration \(effective batch was 4, is 2\)"):
        run(Points(), tmp_path / "a", images=16, batch=2)
    with pytest.raises(IcmsrError, match=r"loop\.images is 3, below one effective batch of 4"):
        run(Points(), tmp_path / "b", images=3, batch=4)


def test_a_run_with_a_constant_schedule_goes_on_for_more_images(tmp_path):
    """To the weights that it would have had, had more been asked for at once."""
    longer, straight = Points(), Points()
    run(Points(), tmp_path / "run", images=8, log_every=100)
    run(longer, tmp_path / "run", images=20, log_every=100)
    run(straight, tmp_path / "straight", images=20, log_every=100)
    for one, two in zip(straight.parameters(), longer.parameters()):
        assert torch.equal(one, two)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loop"]["images"] == 20
    with pytest.raises(IcmsrError, match=r"loop\.images was 20, is 10: it is at 20 already: put 20 back"):
        run(Points(), tmp_path / "run", images=10, log_every=100)


def test_another_schedule_says_how_to_go_on(tmp_path):
    run(Points(), tmp_path, images=8, log_every=100, schedule="cosine")
    words = (
        r"loop\.images was 8, is 20: its cosine schedule ends at 8, only a constant one .*generator\.networks\.start"
    )
    with pytest.raises(IcmsrError, match=words):
        run(Points(), tmp_path, images=20, log_every=100, schedule="cosine")
    with pytest.raises(IcmsrError, match=r"another configuration \(loop\.clip was 1\.0, is 2\.0, loop\.images was 8"):
        run(Points(), tmp_path, images=20, log_every=100, schedule="cosine", clip=2.0)


def test_an_earlier_stage_does_not_mind_a_longer_last_one(tmp_path):
    first, last, longer = (LoopConfig(images=images) for images in (8, 16, 24))
    assert lengths_of({"first": first, "second": last}, first) == ("first.images", "second.images")
    states = []
    for settings in ({"first": first, "second": last}, {"first": first, "second": longer}):
        state = RunState(Points().players(), first, 2, fingerprint(compared_settings(settings)))
        state.lengths = lengths_of(settings, first)
        states.append(state)
    path = tmp_path / "run" / "checkpoints" / "000000008" / "state.safetensors"
    states[0].save(path)
    states[1].load(path)
    changed = {"first": longer, "second": last}
    other = RunState(Points().players(), longer, 2, fingerprint(compared_settings(changed)))
    other.lengths = lengths_of(changed, longer)
    with pytest.raises(IcmsrError, match=r"another configuration \(first\.images was 8, is 24\)"):
        other.load(path)


def test_a_grid_that_a_kill_left_out_is_drawn_by_the_next_start(tmp_path, monkeypatch):
    """The process ended between the checkpoint and its pictures."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_pictures", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(Points(), tmp_path, log_every=100)
    assert not (tmp_path / "grids").exists()
    run(Points(), tmp_path, log_every=100)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["000000008.png", "000000016.png"]


def test_the_average_is_what_is_exported(tmp_path):
    task = Points()
    (path,) = run(task, tmp_path, images=16, average_images=4)
    values, average = [], 0.0
    check = Points()
    optimizer = torch.optim.AdamW([check.first], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(8):
        optimizer.zero_grad()
        (check.first - 3).square().mean().backward()
        nn.utils.clip_grad_norm_([check.first], 1.0)
        optimizer.step()
        values.append(float(check.first))
        average += max(1 - 0.5 ** (2 / 4), 1 / (1 + step)) * (values[-1] - average)
    first, second = json.loads(path.read_text())
    assert first == pytest.approx(average, rel=1e-5)
    assert second == pytest.approx(float(task.second), rel=1e-6), "no average is kept of it"
    assert float(task.first) == pytest.approx(values[-1], rel=1e-6), "the live weights are back"


def test_a_finished_run_exports_again_and_trains_no_more(tmp_path):
    run(Points(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "points.json").unlink()
    task = Points()
    (path,) = run(task, tmp_path)
    assert task.turns == []
    state = load_file(tmp_path / "checkpoints" / "000000016" / "state.safetensors")
    assert json.loads(path.read_text())[0] == pytest.approx(float(state["average/first/x"]))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_changes_no_weight_may_change_on_resuming(tmp_path, caplog):
    run(Points(), tmp_path, images=16)
    run(Points(), tmp_path, images=16, save_every=4, log_every=4, keep=1)
    with pytest.raises(IcmsrError, match=r"another configuration \(loop.learning_rate was 0.1, is 0.2\)"):
        run(Points(), tmp_path, images=16, learning_rate=0.2)
    with caplog.at_level(logging.WARNING):
        (tmp_path / "checkpoints" / "000000099.partial").mkdir()
        run(Points(), tmp_path)
    assert not (tmp_path / "checkpoints" / "000000099.partial").exists()
