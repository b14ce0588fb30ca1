"""Pairs for training: a sample depends on the seed and its number alone."""

import dataclasses
import pickle

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.loader import Resumable, make_loader
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.presets import PRESETS
from icmsr_core.train.data.synthetic import synthetic_picture
from tests.support.training_pairs import awkward, photographs, plain


def batches(pairs: TrainingPairs, start: int = 0, workers: int = 0, **more: int) -> list[dict[str, torch.Tensor]]:
    return list(make_loader(pairs, Resumable(start, 12, more.pop("batch", 3), **more), workers))


def assert_same_batches(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_sample_holds_both_pictures_its_number_and_its_caption(tmp_path):
    pairs = TrainingPairs(DataConfig((photographs(tmp_path / "a"),), synthetic=0.4, crop=32), 3)
    batch = batches(pairs)[1]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "sharp": (torch.uint8, (3, 3, 32, 32)),
        "low": (torch.uint8, (3, 3, 8, 8)),
        "index": (torch.int64, (3,)),
        "caption": (torch.int64, (3,)),
        "events": (torch.int64, (3, 2)),
        "unreadable": (torch.int64, (3, 4)),
    }
    assert batch["index"].tolist() == [3, 4, 5]
    assert batch["unreadable"].unique().tolist() == [-1]
    assert pairs.captions == ("",)
    assert "low" not in TrainingPairs(pairs.config, 3, degraded=False)[0]


def test_photographs_are_enlarged_as_often_as_shrunk(tmp_path):
    """On a ramp that climbs by 1 a pixel, a crop climbs by the factor by which it was shrunk."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, axis=0).repeat(3, axis=2)
    cv2.imwrite(str(tmp_path / "ramp.png"), ramp)
    config = DataConfig((str(tmp_path),), synthetic=0, crop=64, shrink=2, enlarge=2)
    pairs = TrainingPairs(config, 3, degraded=False)
    factors = []
    for index in range(60):
        picture = pairs[index]["sharp"][0].double()
        slopes = [float((picture[-1] - picture[0]).abs().mean()), float((picture[:, -1] - picture[:, 0]).abs().mean())]
        assert min(slopes) == 0  # turned by right angles
        factors.append(max(slopes) / 63)
    assert 0.48 < min(factors) < 0.6
    assert 1.7 < max(factors) < 2.05
    assert 0.8 < np.exp(np.mean(np.log(factors))) < 1.25


@pytest.mark.parametrize("how", ["enlarge", "small"])
def test_enlarged_originals_have_no_halos(tmp_path, how):
    """A step stays within its two sides (a cubic kernel leaves them by 7 to 11% of the step), and gets wider."""
    side = 128 if how == "enlarge" else 40
    step = np.full((side, side, 3), 60, dtype=np.uint8)
    step[:, side // 2 :] = 180
    cv2.imwrite(str(tmp_path / "step.png"), step)
    more = {"enlarge": 2.0} if how == "enlarge" else {"small": "upscale"}
    pairs = TrainingPairs(DataConfig((str(tmp_path),), synthetic=0, crop=64, shrink=1, **more), 3, degraded=False)
    pictures = torch.stack([pairs[index]["sharp"] for index in range(30)])
    assert (int(pictures.min()), int(pictures.max())) == (60, 180)
    between = ((pictures > 60) & (pictures < 180))[:, 0].sum(dim=(1, 2)) / 64
    assert 1 <= between[between > 0].mean() < 12


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    config = dataclasses.replace(plain(awkward(tmp_path / "a")), synthetic=0.3)
    whole = batches(TrainingPairs(config, 3))
    assert len(whole) == 4
    assert_same_batches(whole, batches(TrainingPairs(config, 3), workers=2))
    assert_same_batches(whole[2:], batches(TrainingPairs(config, 3), start=6, workers=1))
    assert_same_batches(whole, batches(TrainingPairs(dataclasses.replace(config, cache_mb=0), 3)))
    warm = TrainingPairs(config, 3)
    for index in range(40, 0, -1):
        warm[index]
    assert_same_batches(whole, batches(warm))
    assert_same_batches(whole, batches(pickle.loads(pickle.dumps(warm))))  # as a spawned worker gets it
    assert not torch.equal(whole[0]["sharp"], batches(TrainingPairs(config, 4))[0]["sharp"])


def test_processes_together_see_what_one_sees(tmp_path):
    pairs = TrainingPairs(plain(photographs(tmp_path / "a")), 3)
    for start in (0, 4):
        whole = batches(pairs, start, batch=4)
        ranks = [batches(pairs, start, workers=rank, batch=2, rank=rank, processes=2) for rank in (0, 1)]
        joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks, strict=True)]
        assert_same_batches(whole, joined)


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 1000), more=st.integers(0, 200), batch=st.integers(1, 9), processes=st.integers(1, 5))
def test_numbers_of_all_processes_follow_each_other(start: int, more: int, batch: int, processes: int) -> None:
    ranks = [Resumable(start, start + more, batch, rank, processes) for rank in range(processes)]
    drawn = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(numbers) for numbers in drawn]
    steps = more // (batch * processes)
    together = [
        number for step in range(steps) for numbers in drawn for number in numbers[step * batch : (step + 1) * batch]
    ]
    assert together == list(range(start, start + steps * batch * processes))
    assert {len(numbers) for numbers in drawn} == {steps * batch}


@pytest.mark.parametrize(("batch", "rank", "processes"), [(0, 0, 1), (2, 2, 2), (2, -1, 2), (2, 0, 0)])
def test_impossible_processes_are_refused(batch, rank, processes):
    with pytest.raises(IcmsrError, match=f"batch {batch}, rank {rank}, processes {processes}"):
        Resumable(0, 8, batch, rank, processes)


@pytest.mark.parametrize("name", ["jpeg", "inpaint"])
def test_another_task_has_pairs_of_one_size(tmp_path, name):
    config = plain(photographs(tmp_path / "a"), degradations=(name,), degradation_weights=(1.0,))
    assert config.scale == 1
    sample = TrainingPairs(config, 0)[0]
    assert sample["low"].shape == sample["sharp"].shape
    assert not torch.equal(sample["low"], sample["sharp"])
    assert plain("x").scale == PRESETS["light"].scale == 4


def test_made_up_pictures_alone_need_no_folder():
    pairs = TrainingPairs(DataConfig(synthetic=1.0, crop=32), 0)
    assert len(pairs.photographs) == 0
    rng = np.random.default_rng((0, 7))
    rng.random()
    expected = np.rot90(synthetic_picture(32, rng), int(rng.integers(4)))
    expected = expected[:, ::-1] if rng.random() < 0.5 else expected
    assert np.array_equal(pairs[7]["sharp"].permute(1, 2, 0).numpy(), expected)
    assert pairs[7]["caption"] == 0
