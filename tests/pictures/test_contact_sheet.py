"""Contact sheets: every tile is where the layout says, and is the file's own pixels."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.contact_sheet import (
    SheetColumn,
    SheetLayout,
    SheetRow,
    SheetSettings,
    contact_sheet,
    enlarged_crop,
)
from tests.support.places import ROOT


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, np.ndarray]:
    """`truth` and `nano` of 48 x 40, `input` of 12 x 10; two pictures of noise each. By "folder/name"."""
    generator = np.random.default_rng(0)
    pictures = {}
    for folder, size in (("input", (10, 12)), ("nano", (40, 48)), ("truth", (40, 48))):
        (tmp_path / folder).mkdir()
        for name in ("a", "b.v2"):
            samples = generator.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(samples).save(tmp_path / folder / f"{name}.png")
            pictures[f"{folder}/{name}"] = samples
    return pictures


def columns(root: Path, *names: str) -> list[SheetColumn]:
    return [SheetColumn(name, root / name) for name in names or ("input", "nano", "truth")]


def test_every_tile_is_exact_and_in_its_place(tmp_path: Path, folders: dict[str, np.ndarray]) -> None:
    settings = SheetSettings(crop=17, zoom=3, gap=5, font_size=12)
    rows = [SheetRow("a", (30, 2)), SheetRow("b.v2")]
    sheet = contact_sheet(columns(tmp_path), rows, settings)
    layout = SheetLayout(("input", "nano", "truth"), ("a", "b.v2"), settings)
    assert (sheet.shape[1], sheet.shape[0]) == layout.size
    samples = np.rint(sheet * 255).astype(np.uint8)
    assert np.array_equal(samples.astype(np.float32) / 255, sheet)
    outside = np.ones(samples.shape[:2], bool)
    for row, (name, (x, y)) in enumerate((("a", (30, 2)), ("b.v2", (15, 11)))):  # the second is the middle
        for column, folder in enumerate(("input", "nano", "truth")):
            factor = 4 if folder == "input" else 1
            whole = folders[f"{folder}/{name}"].repeat(factor, 0).repeat(factor, 1)
            expected = whole[y : y + 17, x : x + 17].repeat(3, 0).repeat(3, 1)
            left, top = layout.corner(row, column)
            assert np.array_equal(samples[top : top + 51, left : left + 51], expected), (name, folder)
            assert outside[top - 5 : top + 56, left - 5 : left + 56].all(), "tiles keep their distance"
            outside[top : top + 51, left : left + 51] = False
    labels = np.asarray(layout.draw_labels())
    assert np.array_equal(samples[outside], labels[outside])


def ink(labels: np.ndarray, left: int, top: int, right: int, bottom: int) -> bool:
    return bool((labels[top:bottom, left:right] < 100).any())


def test_labels_stand_where_they_belong() -> None:
    settings = SheetSettings(crop=100, gap=6, font_size=18)
    layout = SheetLayout(("one", "two"), ("first", "second"), settings)
    labels = np.asarray(layout.draw_labels())
    (left, top), (second, _), (_, lower) = layout.corner(0, 0), layout.corner(0, 1), layout.corner(1, 0)
    assert second == left + 106
    assert lower == top + 106
    assert ink(labels, left, 6, left + 100, top - 6), "title of the first column"
    assert ink(labels, second, 6, second + 100, top - 6), "and of the second"
    assert ink(labels, 6, top, left - 6, top + 24), "name of the first row"
    assert ink(labels, 6, lower, left - 6, lower + 24), "and of the second"
    bare = labels.copy()
    bare[6 : top - 6, left : second + 100] = 255
    bare[top:, 6 : left - 6] = 255
    assert (bare == 255).all(), "no letter in a tile or in a gap"


def test_long_labels_are_broken_and_narrow_tiles_get_room() -> None:
    settings = SheetSettings(crop=8, gap=4, font_size=12)
    name = "photograph_number_one_of_the_long_names"
    layout = SheetLayout(("a title that is much too long for eight pixels", "b"), (name, "x"), settings)
    short = SheetLayout(("a", "b"), ("x", "x"), settings)
    width, height = layout.size
    assert width < 8 * 12 * 3 + 4 * 4 + 1, "at most eight font sizes for each label"
    assert layout.corner(1, 0)[1] - layout.corner(0, 0)[1] > 2 * 12, "a row is as high as its name"
    assert layout.corner(0, 0)[1] > short.corner(0, 0)[1] + 2 * 12, "the titles take several lines"
    labels = np.asarray(layout.draw_labels())
    assert not ink(labels, width - 4, 0, width, height)


def test_rows_of_one_picture_are_told_apart(tmp_path: Path, folders: dict[str, np.ndarray]) -> None:
    settings = SheetSettings(crop=32)
    rows = [SheetRow("a", (0, 0)), SheetRow("b.v2", (1, 2)), SheetRow("a", (9, 8))]
    sheet = np.rint(contact_sheet(columns(tmp_path, "nano"), rows, settings) * 255)
    labels = SheetLayout(("nano",), ("a\n0,0", "b.v2", "a\n9,8"), settings).draw_labels()
    assert sheet.shape[1::-1] == labels.size
    assert np.array_equal(sheet[:, :30], np.asarray(labels)[:, :30])


def test_columns_and_rows_are_parsed() -> None:
    assert SheetColumn.parse("nano = faithful=x/y") == SheetColumn("nano", Path(" faithful=x/y"))
    assert SheetColumn.parse("a b=x") == SheetColumn("a b", Path("x"))
    assert SheetRow.parse("photo.PNG:3,14") == SheetRow("photo", (3, 14))
    assert SheetRow.parse("photo.v2") == SheetRow("photo.v2")
    assert SheetRow.parse("12:30.jpg:0,0") == SheetRow("12:30", (0, 0))
    for text in ("", "nano", "=x", "nano=", " =x"):
        with pytest.raises(IcmsrError, match="TITLE=FOLDER"):
            SheetColumn.parse(text)
    for text in ("", ":1,2", "a:1", "a:1,", "a:-1,2", "a:x,y", "a:"):
        with pytest.raises(IcmsrError, match="NAME:X,Y"):
            SheetRow.parse(text)


def test_what_does_not_fit_is_named(tmp_path: Path, folders: dict[str, np.ndarray]) -> None:
    def fails(match: str, rows: list[SheetRow], crop: int = 8, names: tuple[str, ...] = ()) -> None:
        with pytest.raises(IcmsrError, match=match):
            contact_sheet(columns(tmp_path, *names), rows, SheetSettings(crop=crop))

    (tmp_path / "truth" / "b.v2.png").unlink()
    rows = [SheetRow("b.v2"), SheetRow("c"), SheetRow("d")]
    fails(r"input \(input\) has no c, d; .*truth \(truth\) has no b\.v2, c, d", rows)
    fails("no such folder", [SheetRow("a")], names=("nowhere",))
    fails("crop of 41 pixels at .* reaches beyond 48 x 40", [SheetRow("a")], crop=41)
    fails("crop of 8 pixels at 41,0 reaches beyond 48 x 40", [SheetRow("a", (41, 0))])
    fails("at least 1 column and 1 row", [])
    Image.new("RGB", (24, 10)).save(tmp_path / "input" / "a.png")
    fails(r"input.a\.png: the row's largest picture, 48 x 40, must be .* 24 x 10", [SheetRow("a")])
    Image.new("RGB", (48, 40)).save(tmp_path / "nano" / "a.jpg")
    fails(r"has a\.jpg and a\.png", [SheetRow("a")])
    for values in ({"crop": 0}, {"zoom": 0}, {"gap": -1}, {"font_size": 0}):
        with pytest.raises(IcmsrError, match=f"{next(iter(values))} must be at least"):
            SheetSettings(**values)


def test_enlarged_crop_starts_inside_a_pixel() -> None:
    picture = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
    crop = enlarged_crop(picture, (12, 8), (3, 1), 5)
    assert np.array_equal(crop, picture.repeat(4, 0).repeat(4, 1)[1:6, 3:8])


def test_the_script_writes_the_sheet_and_names_what_is_missing(
    tmp_path: Path, folders: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that is run
    spec = importlib.util.spec_from_file_location("contact_sheet_script", ROOT / "benchmarks" / "contact_sheet.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "sheet.png"
    options = ["--out", str(out), "--crop", "16", "--zoom", "2", "--columns", f"the input={tmp_path / 'input'}"]
    options += [f"nano={tmp_path / 'nano'}", "--rows", "a.png:4,8", "b.v2"]
    assert script.main(options) == 0
    layout = SheetLayout(("the input", "nano"), ("a", "b.v2"), SheetSettings(crop=16, zoom=2))
    with Image.open(out) as sheet:
        assert sheet.size == layout.size
        left, top = layout.corner(0, 1)
        tile = np.asarray(sheet)[top : top + 32, left : left + 32]
    assert np.array_equal(tile, folders["nano/a"][8:24, 4:20].repeat(2, 0).repeat(2, 1))
    assert f"wrote {out}" in capsys.readouterr().out
    assert script.main([*options, "c"]) == 1
    said = capsys.readouterr().err
    assert "has no c" in said
    assert said.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        script.main(["--out", str(out)])
    assert stopped.value.code == 2
