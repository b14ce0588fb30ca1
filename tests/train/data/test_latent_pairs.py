"""Pairs of latents that are encoded once: what a sample is, and when pairs are encoded again."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.latent_pairs import LatentPairs, LatentPairsConfig
from icmsr_core.train.data.loader import Resumable, make_loader
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.samples import last_samples
from icmsr_core.train.data.synthetic import synthetic_picture

COUNT = 11


def encode(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Stands for an encoder: cells of 8 x 8 pixels."""
    low = torch.nn.functional.interpolate(batch["low"].float(), scale_factor=0.5)
    return low / 256, torch.nn.functional.avg_pool2d(batch["sharp"].float(), 8) / 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(3):
        Image.fromarray(synthetic_picture(80, np.random.default_rng(number))).save(folder / f"{number}.png")
    return folder


def pairs_of(folder: Path, seed: int = 3, **changes: object) -> TrainingPairs:
    return TrainingPairs(DataConfig(**{"folders": (str(folder),), "crop": 32, **changes}), seed)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("latents") / "run" / "pairs.safetensors"


@pytest.fixture(scope="module")
def samples(folder, file) -> LatentPairs:
    return LatentPairs(pairs_of(folder), COUNT, file, encode, "one")


def test_a_sample_is_one_of_the_first_pairs_encoded(samples, folder):
    pairs = pairs_of(folder)
    wanted = []
    for number in range(COUNT):
        low, truth = encode({name: value[None] for name, value in pairs[number].items()})
        wanted.append((low[0].half().float(), truth[0].half().float()))
    met = set()
    for index in range(80):
        sample = samples[index]
        same = [n for n, (low, truth) in enumerate(wanted) if torch.equal(sample["low_latent"], low)]
        assert any(torch.equal(sample["truth_latent"], wanted[number][1]) for number in same)
        assert sample["truth_latent"].dtype == torch.float32
        assert int(sample["index"]) == index
        met |= set(same)
    assert met == set(range(COUNT)), "every pair is drawn"


def test_blank_samples_have_the_shapes_of_real_ones(samples):
    shapes = [
        {name: (value.shape, value.dtype) for name, value in one.items()} for one in (samples.blank(), samples[0])
    ]
    assert shapes[0] == shapes[1]


def test_a_sample_is_the_same_in_any_worker(samples):
    here, there = (list(make_loader(samples, Resumable(4, 16, 2), workers)) for workers in (0, 2))
    assert len(here) == len(there) == 6
    assert all(torch.equal(one[name], other[name]) for one, other in zip(here, there) for name in one)
    assert torch.equal(pickle.loads(pickle.dumps(samples))[9]["truth_latent"], samples[9]["truth_latent"])


def test_the_last_samples_are_none_that_a_run_trains_on(samples):
    batch = last_samples(samples, 3)
    assert batch["index"].tolist() == [(1 << 40) - 1, (1 << 40) - 2, (1 << 40) - 3]
    assert torch.equal(batch["truth_latent"][2], samples[(1 << 40) - 3]["truth_latent"])


def fail(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    pytest.fail("encoded again")


def test_a_second_start_encodes_nothing(samples, folder, file, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    for place in (folder, moved):
        again = LatentPairs(pairs_of(place, cache_mb=1), COUNT, file, fail, "one")
        assert torch.equal(again[5]["truth_latent"], samples[5]["truth_latent"])


@pytest.mark.long
@pytest.mark.usefixtures("samples")
def test_worker_processes_change_nothing(folder, file, tmp_path):
    LatentPairs(pairs_of(folder), COUNT, tmp_path / "pairs.safetensors", encode, "one", workers=2)
    assert (tmp_path / "pairs.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "count", "encoder"),
    [
        ({"seed": 4}, COUNT, "one"),
        ({"crop": 64}, COUNT, "one"),
        ({"degradations": ("light",), "degradation_weights": (1.0,)}, COUNT, "one"),
        ({}, COUNT - 1, "one"),
        ({}, COUNT, "other"),
    ],
    ids=["seed", "crop", "degradation", "number", "encoder"],
)
@pytest.mark.usefixtures("samples")
def test_another_request_encodes_again(folder, file, caplog, changes, count, encoder):
    copy = file.with_name("copy.safetensors")
    copy.write_bytes(file.read_bytes())
    caplog.set_level(logging.INFO)
    LatentPairs(pairs_of(folder, **changes), count, copy, encode, encoder)
    assert f"encoding {count} pairs of 3 photographs" in caplog.text


def test_a_negative_number_of_pairs_is_refused():
    with pytest.raises(IcmsrError, match=r"latents\.pairs must be 0 or more, got -1"):
        LatentPairsConfig(-1)
