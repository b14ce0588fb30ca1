"""Where photographs and captions come from, and which are held out."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.sources import falls_into_hold_out
from tests.support.training_pairs import flat, levels_of, noise, photographs, plain


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
        ({"enlarge": 0.5}, ["data.enlarge", "0.5"]),
        ({"enlarge": float("nan")}, ["data.enlarge", "nan"]),
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
