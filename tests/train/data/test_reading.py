"""Photographs that are read for training: damage, sizes, kinds, and the cache."""

import collections
import dataclasses
import logging
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.loader import Resumable, make_loader
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.samples import Tally
from icmsr_core.train.data.sources import PictureCache, read_photograph
from tests.support.training_pairs import awkward, flat, levels_of, noise, photographs, plain


def test_what_cannot_be_read_is_counted_and_named_in_the_main_process(tmp_path, caplog):
    pairs = TrainingPairs(plain(awkward(tmp_path / "a"), synthetic=0.1), 0)
    tallies = []
    for workers in (0, 2):
        tally = Tally(pairs)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for batch in make_loader(pairs, Resumable(0, 60, 4), workers):
                tally.add(batch)
                good = batch["sharp"].float().std(dim=(1, 2, 3))
                assert float(good.min()) > 20  # neither the grey rest of a cut file nor a blank
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2
        for name, reason in (("broken.jpg", "not a picture"), ("cut.png", "damaged or incomplete")):
            assert sum(name in message and reason in message for message in messages) == 1
        tallies.append((tally.take(), tally.unreadable))
    assert tallies[0] == tallies[1]
    summary, names = tallies[0]
    assert names == [str(tmp_path / "a" / name) for name in ("broken.jpg", "cut.png")]
    assert summary["samples"] == 60
    # About 54 samples are of photographs; on the way to a good one of five come 1 unreadable and 1/2 small.
    assert 25 < summary["unreadable"] < 90
    assert 10 < summary["small"] < 50


def test_a_sample_counts_all_and_names_the_first_four(tmp_path):
    photographs(tmp_path / "a", 1)
    for index in range(30):
        (tmp_path / "a" / f"bad{index}.png").write_bytes(b"")
    pairs, samples, errors = TrainingPairs(plain(str(tmp_path / "a")), 0), [], []
    for index in range(60):
        try:
            samples.append(pairs[index])
        except IcmsrError as error:
            errors.append(str(error))
    assert errors
    assert all("0 are smaller than 32 px and 20 unreadable, the last one" in error for error in errors)
    most = max(samples, key=lambda sample: int(sample["events"][0]))
    assert most["events"][0] > 4
    assert most["unreadable"].min() > 0
    one = next(sample for sample in samples if sample["events"][0] == 2)
    assert one["unreadable"][2:].tolist() == [-1, -1]


@pytest.mark.parametrize("crop", [32, 64])
def test_small_photographs_are_passed_over_or_enlarged(tmp_path, crop):
    folder = flat(tmp_path / "a", 100)
    Image.fromarray(noise(15, 600)).save(tmp_path / "a" / "strip.png")
    both = plain(folder, crop=crop)
    if crop == 64:  # all are smaller
        with pytest.raises(IcmsrError, match=r"20 are smaller than 64 px and 0 unreadable, the last one .*png"):
            TrainingPairs(both, 0)[0]
    else:
        assert set(levels_of(TrainingPairs(both, 0), 30)) == {100}
    pairs = TrainingPairs(dataclasses.replace(both, small="upscale"), 0)
    kinds = collections.Counter()
    for index in range(60):
        sample = pairs[index]
        assert sample["sharp"].shape == (3, crop, crop)
        flat_one = float(sample["sharp"].float().std()) < 1
        assert int(sample["events"][1]) == int(crop == 64 or not flat_one)
        kinds[flat_one] += 1
    assert min(kinds.values()) > 15


def test_enlarging_is_bicubic_and_keeps_the_shape(tmp_path):
    wave = 128 + 100 * np.sin(np.arange(24) / 4)
    picture = np.repeat(np.repeat(wave[None, :, None], 24, axis=0), 3, axis=2).astype(np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "wave.png")
    pairs = TrainingPairs(plain(str(tmp_path / "a"), crop=96, small="upscale"), 0)
    expected = np.asarray(Image.fromarray(picture).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    turned = [np.rot90(expected, turn) for turn in range(4)]
    for index in range(10):
        sharp = pairs[index]["sharp"].permute(1, 2, 0).numpy().astype(int)
        assert min(np.abs(sharp - one).max() for one in [*turned, *(one[:, ::-1] for one in turned)]) < 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_cut_and_damaged_files_are_unreadable(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise(200, 200)).save(path)
    whole = path.read_bytes()
    assert read_photograph(path).shape == (200, 200, 3)
    for share in (0.0, 0.1, 0.5, 0.9, 0.98):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(IcmsrError, match=path.name):
            read_photograph(path)
    path.write_text("no picture at all")
    with pytest.raises(IcmsrError, match=path.name):
        read_photograph(path)
    if suffix == "png":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        with pytest.raises(IcmsrError, match="damaged"):
            read_photograph(path)


def test_every_kind_of_picture_becomes_8_bit_rgb(tmp_path):
    picture = noise(6, 9)
    grey = picture[..., 0]
    Image.fromarray(picture).save(tmp_path / "rgb.png")
    assert np.array_equal(read_photograph(tmp_path / "rgb.png"), picture)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_photograph(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert np.array_equal(read_photograph(tmp_path / "grey16.png"), np.repeat(grey[..., None], 3, axis=2))
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, 3:6], alpha[:, 6:] = 128, 255
    Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / "alpha.png")
    opacity = alpha[..., None] / 255
    read = read_photograph(tmp_path / "alpha.png")
    assert np.abs(read - (picture * opacity + 255 * (1 - opacity))).max() < 0.51
    assert read[:, :3].min() == 255
    Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert read_photograph(tmp_path / "palette.png").shape == (6, 9, 3)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_photograph(tmp_path / "turned.png"), np.rot90(picture, -1))


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(0, 400),
    requests=st.lists(st.integers(0, 9), max_size=60),
    sizes=st.lists(st.integers(1, 150), min_size=10, max_size=10),
)
def test_the_cache_is_a_bounded_lru(limit: int, requests: list[int], sizes: list[int]) -> None:
    cache, kept, reads = PictureCache(limit), collections.OrderedDict(), []
    for number in requests:
        reads.clear()

        def read(number: int = number) -> np.ndarray:
            reads.append(number)
            return np.full(sizes[number], number, np.uint8)

        picture = cache.get(number, read)
        assert picture.tolist() == [number] * sizes[number]
        assert bool(reads) == (number not in kept)
        if number in kept:
            kept.move_to_end(number)
        elif sizes[number] <= limit:
            kept[number] = sizes[number]
            while sum(kept.values()) > limit:
                kept.popitem(last=False)
        assert cache.size == sum(kept.values()) == sum(p.nbytes for p in cache._pictures.values()) <= limit
    assert pickle.loads(pickle.dumps(cache)).size == 0


def test_decoded_photographs_stay_within_cache_mb(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for index in range(4):
        Image.fromarray(noise(400, 400, index)).save(tmp_path / "a" / f"{index}.bmp")  # 480 kB decoded
    import icmsr_core.train.data.pairs as module

    read = []
    monkeypatch.setattr(module, "read_photograph", lambda path: (read.append(path), read_photograph(path))[1])
    counts = {}
    for cache_mb in (0, 1, 2):
        read.clear()
        pairs = TrainingPairs(plain(str(tmp_path / "a"), cache_mb=cache_mb), 0)
        for index in range(60):
            pairs[index]
            assert sum(p.nbytes for p in pairs._cache._pictures.values()) <= cache_mb << 20
        counts[cache_mb] = len(read)
    assert counts[0] == 60
    assert 4 < counts[1] < 60
    assert counts[2] == 4
