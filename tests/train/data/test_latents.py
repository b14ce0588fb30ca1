"""Latents that are encoded once: what the file holds, what a sample is, and when photographs are encoded again."""

import copy
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import icmsr_core.train.data.latents as module
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.runtime.latents import encode_picture
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.latents import CachedLatents, LatentCacheConfig
from icmsr_core.train.data.loader import Resumable, make_loader
from icmsr_core.train.data.sources import falls_into_hold_out
from icmsr_core.train.data.synthetic import synthetic_picture
from icmsr_core.train.networks.bases import NetworkConfig, make_vae
from icmsr_core.weights.base import open_base

FACTOR, CROP = 8, 32
CACHE = LatentCacheConfig(enabled=True, scales=(1.0, 0.5), made_up=3)
SIZES = {"wide.png": (70, 132), "tall.png": (99, 64), "small.png": (24, 200)}
"""Height and width. At scale 0.5 only the first two sides of `wide` and the height of `tall` reach the crop."""


@pytest.fixture(scope="module")
def vae(base) -> AutoencoderKL:
    return build_networks(open_base(base))[1]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        picture = synthetic_picture(200, np.random.default_rng(number))
        Image.fromarray(picture[:height, :width]).save(folder / name)
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def config(photographs: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"folders": (str(photographs),), "synthetic": 0.3, "crop": CROP, **changes})


@pytest.fixture(scope="module")
def samples(photographs, vae, tmp_path_factory) -> CachedLatents:
    return CachedLatents(
        config(photographs), CACHE, 7, vae, tmp_path_factory.mktemp("latents") / "run" / "a.safetensors"
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def encoded(vae: AutoencoderKL, picture: np.ndarray) -> Tensor:
    with torch.no_grad():
        return encode_picture(vae, bytes_to_signed(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]))[0]


def test_the_file_holds_whole_photographs_at_each_size_that_the_crop_fits_into(samples, photographs, vae):
    found = load_file(samples.file)
    names = [path.name for path in samples.photographs]
    wide, tall = names.index("wide.png"), names.index("tall.png")
    shapes = {key: tuple(value.shape[1:]) for key, value in found.items() if not key.startswith("made up")}
    sizes = {f"{wide}/1": (8, 16), f"{wide}/0.5": (4, 8), f"{tall}/1": (12, 8), f"{tall}/0.5": (6, 4)}
    assert shapes == {f"{key}/{way}": size for key, size in sizes.items() for way in ("plain", "mirrored")}
    whole = pixels(photographs / "wide.png")
    half = cv2.resize(whole, (66, 35), interpolation=cv2.INTER_AREA)
    for key, picture in (
        (f"{wide}/1/plain", whole[:64, :128]),
        (f"{wide}/1/mirrored", whole[:64, :128][:, ::-1]),
        (f"{wide}/0.5/plain", half[:32, :64]),
    ):
        assert torch.equal(found[key], encoded(vae, picture).half()), key
    made_up = {key: value.shape[1:] for key, value in found.items() if key.startswith("made up")}
    assert len(made_up) == 2 * CACHE.made_up
    assert set(made_up.values()) == {(2 * CROP // FACTOR, 2 * CROP // FACTOR)}


def place_of(latent: Tensor, wholes: dict[str, Tensor]) -> str | None:
    """Which of the whole latents `latent` was cut out of, and where."""
    side = latent.shape[-1]
    for key, whole in wholes.items():
        crops = whole.float().unfold(1, side, 1).unfold(2, side, 1)
        same = (crops == latent[:, None, None]).all(dim=(0, 3, 4)).nonzero()
        if len(same):
            return f"{key} at {same[0].tolist()}"
    return None


def test_a_sample_is_a_crop_of_one_whole_latent(samples):
    wholes = load_file(samples.file)
    places = [place_of(samples[number]["latent"], wholes) for number in range(60)]
    assert None not in places
    assert len(set(places)) > 30, "from many places"
    assert {place.split("/")[0] for place in places if place} >= {"made up"}
    first = samples[0]
    assert first["latent"].dtype == torch.float32
    assert int(first["index"]) == 0
    assert {name: value.shape for name, value in samples.blank().items()} == {
        name: value.shape for name, value in first.items()
    }


def test_a_sample_is_the_same_whatever_worker_draws_it(samples):
    here = list(make_loader(samples, Resumable(4, 16, 2), workers=0))
    there = list(make_loader(samples, Resumable(4, 16, 2), workers=2))
    assert len(here) == len(there) == 6
    for one, other in zip(here, there):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(pickle.loads(pickle.dumps(samples))[9]["latent"], samples[9]["latent"])


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Grows by one with each picture that is encoded."""
    seen: list[int] = []
    monkeypatch.setattr(module, "encode_picture", lambda vae, image: (seen.append(1), encode_picture(vae, image))[1])
    return seen


def test_a_second_start_encodes_nothing(samples, photographs, vae, encodings):
    before = samples.file.stat().st_mtime_ns
    again = CachedLatents(config(photographs), CACHE, 7, vae, samples.file)
    assert encodings == []
    assert samples.file.stat().st_mtime_ns == before
    assert torch.equal(again[5]["latent"], samples[5]["latent"])


def test_bf16_encodes_again_to_the_same_latents_but_for_rounding(samples, photographs, vae, tmp_path, encodings):
    file = tmp_path / "a.safetensors"
    file.write_bytes(samples.file.read_bytes())
    CachedLatents(config(photographs), replace(CACHE, precision="bf16"), 7, copy.deepcopy(vae), file)
    exact, rounded = load_file(samples.file), load_file(file)
    assert len(encodings) == len(rounded) == len(exact)
    for key, latent in exact.items():
        distance = (rounded[key].float() - latent.float()).abs().max()
        assert 0 < distance < 0.03 * latent.float().abs().max()


def other_vae(vae: AutoencoderKL) -> AutoencoderKL:
    changed = copy.deepcopy(vae)
    with torch.no_grad():
        changed.quant_conv.bias[0] += 1e-3
    return changed


@pytest.mark.parametrize(
    "request_of",
    [
        ({}, CACHE, other_vae),
        ({"crop": 64}, CACHE, None),
        ({"hold_out": 0.5}, CACHE, None),
        ({"synthetic": 0.0}, CACHE, None),
        ({}, replace(CACHE, scales=(1.0,)), None),
        ({}, replace(CACHE, mirrored=False), None),
        ({}, replace(CACHE, made_up=2), None),
    ],
    ids=["VAE", "crop", "photographs", "made-up pictures", "scales", "mirrored", "number of made-up pictures"],
)
def test_another_request_encodes_again(samples, photographs, vae, tmp_path, encodings, request_of):
    data, cache, change_vae = request_of
    file = tmp_path / "a.safetensors"
    file.write_bytes(samples.file.read_bytes())
    wanted = config(photographs, **data)
    other = CachedLatents(wanted, cache, 7, change_vae(vae) if change_vae else vae, file)
    assert len(encodings) == len(load_file(file))
    assert other[0]["latent"].shape[-1] == wanted.crop // FACTOR


def test_held_out_latents_are_of_held_out_photographs_alone(photographs, vae, tmp_path):
    share = 0.5
    held = {name for name in SIZES if falls_into_hold_out(name, share)}
    assert 0 < len(held) < len(SIZES), "the names fall on both sides"
    parts = (config(photographs, hold_out=share, synthetic=0.5), CACHE, 7, vae)
    kept = CachedLatents(*parts, tmp_path / "held_out.safetensors", held_out=True)
    trained = CachedLatents(*parts, tmp_path / "training.safetensors")
    assert {path.name for path in kept.photographs} - {"broken.png"} == held
    assert not set(kept.photographs) & set(trained.photographs)
    assert not any(key.startswith("made up") for key in load_file(kept.file))
    assert any(key.startswith("made up") for key in load_file(trained.file))


def test_photographs_that_cannot_be_read_are_named_when_they_would_be_encoded(photographs, vae, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        CachedLatents(config(photographs), CACHE, 0, vae, tmp_path / "a.safetensors")
    assert [record.message for record in caplog.records if "broken.png" in record.message]


def test_made_up_pictures_alone_need_no_photograph(vae, tmp_path):
    samples = CachedLatents(DataConfig(synthetic=1.0, crop=CROP), CACHE, 0, vae, tmp_path / "a.safetensors")
    assert samples.photographs == []
    assert place_of(samples[3]["latent"], load_file(samples.file)) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": ()}, "latents.scales"),
        ({"scales": (1.0, 1.5)}, "at most 1"),
        ({"scales": (0.0,)}, "above 0"),
        ({"made_up": 0}, "latents.made_up must be at least 1, got 0"),
    ],
)
def test_wrong_values_name_the_field(changes, words):
    with pytest.raises(IcmsrError, match=words):
        LatentCacheConfig(**changes)


def test_a_crop_that_the_vae_cannot_divide_is_refused(photographs, tmp_path):
    deep = make_vae(NetworkConfig(latent_channels=4, vae_channels=(32,) * 7))
    with pytest.raises(IcmsrError, match=r"data.crop must be a multiple of 64, .* got 32"):
        CachedLatents(config(photographs), CACHE, 0, deep, tmp_path / "a.safetensors")


def test_photographs_that_are_all_too_small_are_refused_with_the_crop(photographs, vae, tmp_path):
    with pytest.raises(IcmsrError, match=r"none of 4 photographs .* 160 px .* smaller data.crop"):
        CachedLatents(config(photographs, crop=160, synthetic=0.0), CACHE, 0, vae, tmp_path / "a.safetensors")
    # Made-up pictures do not hide it.
    mostly = CachedLatents(config(photographs, crop=160, synthetic=0.01), CACHE, 0, vae, tmp_path / "b.safetensors")
    with pytest.raises(IcmsrError, match=r"20 photographs in a row .* smaller than 160 px"):
        [mostly[number] for number in range(20)]
