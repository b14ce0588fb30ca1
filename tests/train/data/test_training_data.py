"""Training data: where photographs come from, and what sample number i is, on any number of workers and processes."""

import collections
import dataclasses
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.loader import Resumable, make_loader
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.presets import PRESETS
from icmsr_core.train.data.samples import Tally
from icmsr_core.train.data.sources import PictureCache, falls_into_hold_out, read_photograph
from icmsr_core.train.data.synthetic import synthetic_picture


def noise(height: int = 80, width: int = 90, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photographs(folder: Path, count: int = 4) -> str:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(noise(seed=index)).save(folder / f"{index}.png")
    return str(folder)


def flat(folder: Path, *levels: int) -> str:
    """Photographs of one grey level each, which tells them apart in a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / f"{level}.png")
    return str(folder)


def levels_of(pairs: TrainingPairs, count: int = 400) -> list[int]:
    return [int(pairs[index]["sharp"][0, 0, 0]) for index in range(count)]


def plain(*folders: str, **changes: object) -> DataConfig:
    return DataConfig(folders, **{"synthetic": 0.0, "crop": 32, **changes})  # type: ignore[arg-type]


def batches(pairs: TrainingPairs, start: int = 0, workers: int = 0, **more: int) -> list[dict[str, torch.Tensor]]:
    return list(make_loader(pairs, more.pop("batch", 3), start, 12, workers, **more))


def assert_same_batches(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def awkward(folder: Path) -> str:
    """Two good photographs of noise, a small one and two that cannot be read."""
    photographs(folder, 2)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    Image.fromarray(noise()).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:9000])
    Image.fromarray(noise(20, 30)).save(folder / "small.png")
    return str(folder)


# What a sample is


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


# Where photographs come from


def test_folders_are_searched_and_hidden_files_left_out(tmp_path):
    photographs(tmp_path / "a", 2)
    photographs(tmp_path / "a" / "B", 1)
    photographs(tmp_path / "a" / ".hidden", 1)
    Image.fromarray(noise()).save(tmp_path / "a" / "UPPER.JPG")
    (tmp_path / "a" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    paths = TrainingPairs(plain(str(tmp_path / "a")), 0).photographs
    assert [path.relative_to(tmp_path / "a").as_posix() for path in paths] == ["0.png", "1.png", "B/0.png", "UPPER.JPG"]


def test_lists_name_photographs_beside_them(tmp_path):
    flat(tmp_path / "sets" / "a", 10, 20, 30)
    flat(tmp_path / "elsewhere", 200)
    (tmp_path / "sets" / "some.txt").write_text(
        f"# chosen\n\na/10.png\r\n  ./a/30.png \n{tmp_path / 'elsewhere' / '200.png'}\n", encoding="utf-8-sig"
    )
    pairs = TrainingPairs(plain(lists=(str(tmp_path / "sets" / "some.txt"),)), 0)
    assert set(levels_of(pairs)) == {10, 30, 200}
    assert len(pairs.photographs) == 3


def test_weights_are_of_sources_not_of_photographs(tmp_path):
    many, few = flat(tmp_path / "many", *range(10, 30)), flat(tmp_path / "few", 200)
    (tmp_path / "none.txt").write_text("few/200.png\n")
    even = levels_of(TrainingPairs(plain(many, few), 0), 1000)
    assert 0.03 < np.mean(np.array(even) == 200) < 0.07  # one photograph of 21
    config = plain(many, few, lists=(str(tmp_path / "none.txt"),), weights=(1.0, 3.0, 0.0))
    weighted = levels_of(TrainingPairs(config, 0), 1000)
    assert 0.71 < np.mean(np.array(weighted) == 200) < 0.79
    assert len(set(weighted)) == 21
    only = TrainingPairs(dataclasses.replace(config, weights=(0.0, 0.0, 2.0)), 0)
    assert set(levels_of(only, 50)) == {200}
    assert {int(only._sources.draw(np.random.default_rng(seed))) for seed in range(50)} == {21}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folders": ("{root}/none",)}, ["{root}/none: no such folder", "data.folders"]),
        ({"folders": ("{root}/list.txt",)}, ["{root}/list.txt: not a folder"]),
        ({"folders": ("{root}/empty",)}, ["{root}/empty: no pictures here"]),
        ({"folders": ()}, ["data.folders is empty", "data.lists"]),
        ({"lists": ("{root}/none.txt",)}, ["{root}/none.txt: no such file", "data.lists"]),
        ({"lists": ("{root}/list.txt",)}, ["{root}/list.txt, line 4", "{root}/gone.png"]),
        ({"lists": ("{root}/blank.txt",)}, ["{root}/blank.txt: the list names no picture"]),
        ({"lists": ("{root}/a/0.png",)}, ["{root}/a/0.png: cannot be read as UTF-8 text"]),
        ({"captions": "{root}/none.tsv"}, ["{root}/none.tsv: no such file", "data.captions"]),
        ({"captions": "{root}/no_tab.tsv"}, ["{root}/no_tab.tsv, line 3: no tab", "1.png a cat"]),
        ({"captions": "{root}/twice.tsv"}, ["{root}/twice.tsv, line 2: 0.png has a caption already"]),
        ({"captions": "{root}/others.tsv"}, ["data.captions names none", "other.png", "0.png"]),
    ],
)
def test_wrong_sources_are_found_at_construction(tmp_path, changes, words):
    photographs(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("a/0.png\n# next\n\ngone.png\n")
    (tmp_path / "blank.txt").write_text("# nothing\n\n")
    (tmp_path / "no_tab.tsv").write_text("0.png\tx\n\n1.png a cat\n")
    (tmp_path / "twice.tsv").write_text("0.png\tx\n./0.png\ty\n")
    (tmp_path / "others.tsv").write_text("other.png\tx\n")

    def filled(value: object) -> object:
        return tuple(map(filled, value)) if isinstance(value, tuple) else value.format(root=tmp_path)

    config = plain(str(tmp_path / "a"))
    with pytest.raises(IcmsrError) as error:
        TrainingPairs(dataclasses.replace(config, **{key: filled(value) for key, value in changes.items()}), 0)
    for word in words:
        assert word.format(root=tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop": 33}, ["data.crop", "multiple of 32", "33"]),
        ({"crop": 0}, ["data.crop", "0"]),
        ({"synthetic": 1.5}, ["data.synthetic", "1.5"]),
        ({"shrink": 0.5}, ["data.shrink", "0.5"]),
        ({"shrink": float("nan")}, ["data.shrink", "nan"]),
        ({"small": "stretch"}, ["data.small", "skip", "upscale", "stretch"]),
        ({"cache_mb": -1}, ["data.cache_mb", "-1"]),
        ({"hold_out": 1.0}, ["data.hold_out", "1.0"]),
        ({"hold_out": float("nan")}, ["data.hold_out", "nan"]),
        ({"weights": (1.0, 1.0)}, ["data.weights", "data.folders and data.lists, 1", "(1.0, 1.0)"]),
        ({"weights": (-1.0,)}, ["data.weights", "-1.0"]),
        ({"weights": (0.0,)}, ["data.weights", "above 0"]),
        ({"degradations": ("nano",)}, ["data.degradations", "nano", "realesrgan"]),
        ({"degradations": ("light", "jpeg")}, ["data.degradations", "one scale", "'light': 4", "'jpeg': 1"]),
        ({"degradation_weights": (1.0,)}, ["data.degradation_weights", "2"]),
        ({"degradation_weights": (2.0, -1.0)}, ["data.degradation_weights", "-1.0"]),
        ({"degradation_weights": (float("inf"), 1.0)}, ["data.degradation_weights", "inf"]),
    ],
)
def test_wrong_values_name_the_field(changes, words):
    with pytest.raises(IcmsrError) as error:
        DataConfig(("photos",), **changes)
    for word in words:
        assert word in str(error.value)


# Captions


def test_captions_follow_their_photographs(tmp_path):
    flat(tmp_path / "a" / "one", 10, 20)
    flat(tmp_path / "a" / "two", 10, 30)
    flat(tmp_path / "b", 40, 50)
    (tmp_path / "list.txt").write_text("b/40.png\nb/50.png\n")
    (tmp_path / "captions.tsv").write_text(
        "10.png\tby name\none/10.png\tby path\n\n30.png\tdéjà\tvu\nb/40.png\tlisted\n20.png\tby name\n"
        "rest/50.png\tnot this one\n",
        encoding="utf-8",
    )
    config = plain(str(tmp_path / "a"), lists=(str(tmp_path / "list.txt"),), captions=str(tmp_path / "captions.tsv"))
    pairs = TrainingPairs(dataclasses.replace(config, synthetic=0.2), 1)
    captions = dict(zip(pairs.photographs, (pairs.captions[pairs._sources.caption(n)] for n in range(6))))
    assert [captions[tmp_path / name] for name in ("a/one/10.png", "a/one/20.png", "a/two/10.png", "a/two/30.png")] == [
        "by path",
        "by name",
        "by name",
        "déjà\tvu",
    ]
    assert [captions[tmp_path / "b" / f"{level}.png"] for level in (40, 50)] == ["listed", ""]
    assert pairs.captions[0] == ""
    assert sorted(pairs.captions) == sorted({"", "by path", "by name", "déjà\tvu", "listed"})
    seen = collections.defaultdict(set)
    for index in range(200):
        made_up = np.random.default_rng((1, index)).random() < 0.2
        sample = pairs[index]
        seen["made up" if made_up else int(sample["sharp"][0, 0, 0])].add(pairs.captions[int(sample["caption"])])
    assert seen == {
        "made up": {""},
        10: {"by path", "by name"},
        20: {"by name"},
        30: {"déjà\tvu"},
        40: {"listed"},
        50: {""},
    }
    with_fewer = dataclasses.replace(config, hold_out=0.4)
    halves = [TrainingPairs(with_fewer, 1, held_out=held_out) for held_out in (False, True)]
    assert halves[0].captions == halves[1].captions == pairs.captions


# The held-out share


@settings(max_examples=50, deadline=None)
@given(names=st.sets(st.text(min_size=1), min_size=1, max_size=30), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_share_holds_the_smaller(names: set[str], shares: tuple[float, float]) -> None:
    smaller, larger = ({name for name in names if falls_into_hold_out(name, share)} for share in sorted(shares))
    assert smaller <= larger
    assert not any(falls_into_hold_out(name, 0.0) for name in names)
    assert all(falls_into_hold_out(name, 1.0) for name in names)


def test_the_split_is_of_the_stated_share_and_the_same_everywhere():
    names = [f"folder/{number:05}.png" for number in range(20_000)]
    assert np.mean([falls_into_hold_out(name, 0.1) for name in names]) == pytest.approx(0.1, abs=0.01)
    # Another hash would let training see what an earlier run held out.
    assert "".join(str(int(falls_into_hold_out(name, 0.25))) for name in names[:12]) == "000110101010"


def test_halves_are_disjoint_complete_and_stable(tmp_path):
    folder = flat(tmp_path / "a", *range(10, 50))
    config = plain(folder, hold_out=0.3)
    kept, held = (set(TrainingPairs(config, 0, held_out=held_out).photographs) for held_out in (False, True))
    assert kept
    assert held
    assert not kept & held
    assert kept | held == set(TrainingPairs(plain(folder), 0).photographs)
    held_levels = {int(path.stem) for path in held}
    assert set(levels_of(TrainingPairs(config, 0, held_out=True))) == held_levels
    assert not set(levels_of(TrainingPairs(config, 0))) & held_levels
    flat(tmp_path / "a", *range(50, 90))
    after = set(TrainingPairs(config, 0, held_out=True).photographs)
    assert held <= after
    assert not after & kept
    # No made-up pictures among the held-out ones, whatever training uses.
    mixed = dataclasses.replace(config, synthetic=0.9)
    assert set(levels_of(TrainingPairs(mixed, 0, held_out=True), 60)) <= {int(path.stem) for path in after}


def test_a_photograph_in_two_sources_is_held_out_of_both(tmp_path):
    folder = flat(tmp_path / "a", *range(10, 50))
    (tmp_path / "list.txt").write_text("".join(f"a/{level}.png\n" for level in range(10, 50)))
    config = plain(folder, lists=(str(tmp_path / "list.txt"),), hold_out=0.3)
    kept, held = (set(TrainingPairs(config, 0, held_out=held_out).photographs) for held_out in (False, True))
    assert not kept & held
    assert len(kept | held) == 40


def test_nothing_in_a_half_is_refused(tmp_path):
    folder = flat(tmp_path / "a", 10)
    with pytest.raises(IcmsrError, match=r"data\.hold_out is 0"):
        TrainingPairs(plain(folder), 0, held_out=True)
    with pytest.raises(IcmsrError, match=r"data\.hold_out 1e-09 holds out none of 1 photographs"):
        TrainingPairs(plain(folder, hold_out=1e-9), 0, held_out=True)
    with pytest.raises(IcmsrError, match=r"data\.hold_out 1 leaves nothing to train on"):
        TrainingPairs(plain(folder, hold_out=1 - 1e-9), 0)
    with pytest.raises(IcmsrError, match=r"data\.synthetic is 1"):
        TrainingPairs(plain(folder, hold_out=0.5, synthetic=1.0), 0, held_out=True)
    other = flat(tmp_path / "b", *range(10, 40))
    config = plain(folder, other, hold_out=0.3, weights=(1.0, 0.0))
    with pytest.raises(IcmsrError, match=r"data\.weights"):
        TrainingPairs(config, 0, held_out=True)  # the one photograph of the source with a weight is kept
    assert set(levels_of(TrainingPairs(config, 0), 20)) == {10}


# Reading


def test_what_cannot_be_read_is_counted_and_named_in_the_main_process(tmp_path, caplog):
    pairs = TrainingPairs(plain(awkward(tmp_path / "a"), synthetic=0.1), 0)
    tallies = []
    for workers in (0, 2):
        tally = Tally(pairs)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for batch in make_loader(pairs, 4, 0, 60, workers):
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


# The cache


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


def test_made_up_pictures_alone_need_no_folder():
    pairs = TrainingPairs(DataConfig(synthetic=1.0, crop=32), 0)
    assert len(pairs.photographs) == 0
    rng = np.random.default_rng((0, 7))
    rng.random()
    expected = np.rot90(synthetic_picture(32, rng), int(rng.integers(4)))
    expected = expected[:, ::-1] if rng.random() < 0.5 else expected
    assert np.array_equal(pairs[7]["sharp"].permute(1, 2, 0).numpy(), expected)
    assert pairs[7]["caption"] == 0
