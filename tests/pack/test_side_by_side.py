"""docs/side_by_side/index.html, the page of the blind comparison, used from file:// in a headless browser.

Folder `warm` holds red pictures and `cold` blue ones, so a pixel of the page tells which folder is on which side; the
green channel tells which picture it is.
"""

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.comfy_frontend import FLAGS
from tests.support.comfy_harness import ROOT

pytestmark = pytest.mark.long

PAGE = ROOT / "docs" / "side_by_side" / "index.html"
NAMES = [f"photo_{number}" for number in range(6)]
COLORS = {"warm": (200, 0, 0), "cold": (0, 0, 200)}
PIXEL = """([id, dx, dy]) => {
    const canvas = document.querySelector(`#${id} canvas`);
    const x = (canvas.width >> 1) + dx, y = (canvas.height >> 1) + dy;
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
}"""
READY = "[data-answer=left][aria-disabled=false], #end:not([hidden])"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser) -> Iterator:
    with browser.new_context(viewport={"width": 1000, "height": 700}) as context:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if "://" in request.url[6:] else None)
        page.goto(PAGE.as_uri())
        yield page
        assert errors == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """warm, cold, small (inputs of half the size) and truths, with the same names."""
    root = tmp_path_factory.mktemp("pictures")
    for folder, color, size in (
        ("warm", COLORS["warm"], 64),
        ("cold", COLORS["cold"], 64),
        ("small", (90, 0, 90), 32),
        ("truths", (0, 0, 0), 64),
    ):
        (root / folder).mkdir()
        for number, name in enumerate(NAMES):
            Image.new("RGB", (size, size), (color[0], 40 * number, color[2])).save(root / folder / f"{name}.png")
    return root


def choose(page, a: Path, b: Path, participant: str = "p1", **others: Path) -> None:
    page.fill("#participant", participant)
    for which, folder in {"a": a, "b": b, **others}.items():
        page.set_input_files(f"#folder-{which}", folder)


def drop(page, selector: str, *paths: Path) -> None:
    """Drops files or folders onto an element, as the browser itself does it for a person."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "data": data}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place})
    session.detach()


def wait_for_report(page, text: str) -> None:
    page.wait_for_function("(text) => document.querySelector('#report').innerText.includes(text)", arg=text)


def start(page) -> None:
    page.click("#start")
    page.wait_for_selector(READY)


def seen(page, pane: str = "left", dx: int = 0, dy: int = 0) -> tuple[int, int, int]:
    return tuple(page.evaluate(PIXEL, [pane, dx, dy]))


def side_of(page, folder: str) -> str:
    """Which side shows the folder's picture, as seen on the screen."""
    left, right = seen(page, "left"), seen(page, "right")
    assert {left[::2], right[::2]} == {color[::2] for color in COLORS.values()}
    assert left[1] == right[1], "two pictures of one name"
    return "left" if left[::2] == COLORS[folder][::2] else "right"


def give(page, side: str) -> None:
    page.click(f"[data-answer={side}]")
    page.wait_for_selector(READY)


def download(page, button: str = "#save") -> list[dict[str, str]]:
    with page.expect_download() as caught:
        page.click(button)
    assert not any(name in caught.value.suggested_filename for name in COLORS)
    text = Path(caught.value.path()).read_bytes().decode()
    return list(csv.DictReader(io.StringIO(text)))


def order_of(page, folders: Path, participant: str, a: str = "warm", b: str = "cold") -> list[tuple[int, str]]:
    """(number of the picture, side of `warm`) in the order in which they are shown."""
    page.evaluate("localStorage.clear()")
    page.goto(PAGE.as_uri())
    choose(page, folders / a, folders / b, participant)
    start(page)
    found = []
    for _ in NAMES:
        found.append((seen(page)[1] // 40, side_of(page, "warm")))
        give(page, "none")
    return found


def test_answers_map_to_folders_and_the_page_is_blind(page, folders: Path):
    from scipy.stats import binomtest

    choose(page, folders / "warm", folders / "cold")
    assert "6 pairs" in page.inner_text("#report")
    start(page)
    expected = []
    wanted = ["warm", "warm", "warm", "cold", "none", "warm"]
    for number, want in enumerate(wanted, start=1):
        assert f"Picture {number} of 6" in page.inner_text("#trial")
        html = page.content().split("<script>")[0]
        assert not any(name in html for name in COLORS), "a folder's name is on the page"
        warm = side_of(page, "warm")
        left = "warm" if warm == "left" else "cold"
        expected.append((NAMES[seen(page)[1] // 40], left, {"warm": "cold", "cold": "warm"}[left], want, str(number)))
        give(page, "none" if want == "none" else side_of(page, want))
    assert not any(name in page.inner_text("body") for name in COLORS), "named before the answers are final"

    rows = download(page)
    keys = ("picture", "left_folder", "right_folder", "answer", "order")
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    assert sorted(row["picture"] for row in rows) == NAMES
    assert [row["left_folder"] for row in rows].count("warm") == 3, "each folder is on the left equally often"
    assert {(row["participant"], row["question"]) for row in rows} == {("p1", "better")}
    assert all(float(row["seconds"]) > 0 and row["timestamp"].endswith("Z") for row in rows)
    assert list(rows[0]) == [
        "participant",
        "picture",
        "question",
        "left_folder",
        "right_folder",
        "answer",
        "seconds",
        "order",
        "timestamp",
    ]

    page.click("#reveal")
    totals = page.inner_text("#totals")
    assert [line.split("\t")[:2] for line in totals.splitlines() if "%\t" in line] == [
        ["cold", "1"],
        ["warm", "4"],
        ["no difference", "1"],
    ]
    assert f"5 decided answers: p = {binomtest(4, 5).pvalue:.4f}" in totals
    interval = binomtest(4, 5).proportion_ci(method="exact")
    assert (
        "warm was preferred in 80.0% of 5 decided answers "
        f"(95% confidence interval {100 * interval.low:.1f}% to {100 * interval.high:.1f}%), "
        "which shows no preference: 50% is inside the interval." in totals
    )
    assert not page.is_visible("#end-back"), "answers cannot be changed once the totals are known"


def test_sign_test_is_the_binomial_one(page):
    from scipy.stats import binomtest

    for a, b in ((0, 5), (7, 7), (12, 3), (210, 270), (1500, 1400)):
        found = page.evaluate("([a, b]) => signTest(a, b)", [a, b])
        assert found == pytest.approx(binomtest(a, a + b).pvalue, rel=1e-9)
    assert page.evaluate("Number.isNaN(signTest(0, 0))")


def test_confidence_interval_is_the_exact_one(page):
    from scipy.stats import binomtest

    for times, decided in ((0, 5), (5, 5), (1, 1), (7, 14), (12, 15), (270, 480), (2900, 2900), (1500, 2900)):
        found = page.evaluate("([k, n]) => confidenceInterval(k, n)", [times, decided])
        expected = binomtest(times, decided).proportion_ci(method="exact")
        assert found == pytest.approx([expected.low, expected.high], abs=1e-9)


def test_a_preference_is_stated_when_the_interval_leaves_out_one_half(page):
    sentence = page.evaluate("preferenceOf(['warm', 14], 16)")
    assert sentence == (
        "warm was preferred in 87.5% of 16 decided answers (95% confidence interval 61.7% to 98.4%), "
        "which shows a preference."
    )


def test_two_folders_are_dropped_and_the_keyboard_does_the_rest(page, folders: Path):
    """A whole comparison without the mouse, but for the drop."""
    drop(page, "#drop", folders / "warm", folders / "cold")
    wait_for_report(page, "6 pairs")
    assert page.inner_text("#dropped-a") == "warm (dropped)"
    assert page.inner_text("#dropped-b") == "cold (dropped)"
    assert page.evaluate("document.activeElement.id") == "participant"
    page.keyboard.type("p1")
    page.keyboard.press("Enter")
    page.wait_for_selector(READY)
    for _ in NAMES:
        page.keyboard.press({"left": "1", "right": "3"}[side_of(page, "warm")])
        page.wait_for_selector(READY)
    for button in ("save", "end-back", "reveal"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == button
    page.keyboard.press("Enter")
    totals = page.inner_text("#totals")
    assert "warm was preferred in 100.0% of 6 decided answers (95% confidence interval 54.1% to 100.0%)" in totals
    assert "which shows a preference." in totals


def test_folders_are_dropped_one_by_one_and_onto_their_fields(page, folders: Path, tmp_path: Path):
    many = tmp_path / "many"  # a browser lists a folder in parts of a hundred
    (many / "below").mkdir(parents=True)
    for number in range(130):
        shutil.copy(folders / "cold" / "photo_0.png", many / f"photo_{number}.png")
    shutil.copy(folders / "cold" / "photo_0.png", many / "below" / "deep.png")
    drop(page, "#drop", folders / "warm")
    wait_for_report(page, "Folder A: warm, 6 pictures")
    drop(page, "#setup h1", many)
    wait_for_report(page, "Folder B: many, 130 pictures")
    drop(page, "#folder-input", folders / "small")
    wait_for_report(page, "Inputs: small, 6 pictures")
    drop(page, "#folder-truth", folders / "truths")
    wait_for_report(page, "Originals: truths, 6 pictures")
    assert "6 pairs" in page.inner_text("#report")
    assert page.is_enabled("#faithful")
    page.set_input_files("#folder-b", folders / "cold")  # the button's choice takes its place
    assert "Folder B: cold, 6 pictures" in page.inner_text("#report")
    assert page.inner_text("#dropped-b") == ""
    page.fill("#participant", "p1")
    start(page)
    assert seen(page, "middle")[::2] == (90, 90)


def test_a_drop_that_cannot_be_understood_changes_nothing(page, folders: Path):
    drop(page, "#drop", folders / "warm" / "photo_0.png")
    wait_for_report(page, "Drop folders of pictures, not single files.")
    drop(page, "#drop", folders / "warm", folders / "cold", folders / "small")
    wait_for_report(page, "each other folder onto its own field")
    drop(page, "#folder-input", folders / "warm", folders / "cold")
    wait_for_report(page, "each other folder onto its own field")
    assert [page.inner_text(f"#dropped-{which}") for which in ("a", "b", "input", "truth")] == [""] * 4
    drop(page, "#drop", folders / "warm", folders / "cold", folders / "warm" / "photo_0.png")
    wait_for_report(page, "1 file outside of the folders left out")
    page.fill("#participant", "p1")
    start(page)
    drop(page, "#question", folders / "small")  # during the comparison a drop does nothing, and the page stays
    assert "Picture 1 of 6" in page.inner_text("#trial")


def test_order_is_the_participants(page, folders: Path):
    first = order_of(page, folders, "p1")
    assert order_of(page, folders, " p1 ", a="cold", b="warm") == first, "nor does it matter which folder is A"
    others = [order_of(page, folders, name) for name in ("p2", "p3")]
    assert all(other != first for other in others)
    assert [number for number, _ in first] != list(range(6)), "the pictures are shuffled"
    assert any([side for _, side in other] != [side for _, side in first] for other in others), "and the sides"


def test_names_without_a_partner_are_listed(page, folders: Path, tmp_path: Path):
    for folder in ("warm", "cold", "small"):
        shutil.copytree(folders / folder, tmp_path / folder)
    shutil.copy(tmp_path / "warm" / "photo_0.png", tmp_path / "warm" / "lonely.png")
    shutil.copy(tmp_path / "cold" / "photo_0.png", tmp_path / "cold" / "forlorn.v2.png")
    shutil.copy(tmp_path / "cold" / "photo_5.png", tmp_path / "cold" / "photo_5.webp")
    (tmp_path / "warm" / "scan.tif").write_bytes(b"II")
    (tmp_path / "warm" / "notes.txt").write_text("no picture")
    (tmp_path / "small" / "photo_3.png").unlink()
    choose(page, tmp_path / "warm", tmp_path / "cold", input=tmp_path / "small")
    report = page.inner_text("#report")
    assert "4 pairs" in report
    for why, name in (
        ("Only in Folder A (2)", "lonely, photo_5"),
        ("Only in Folder B (1)", "forlorn.v2"),
        ("Inputs: none for (1)", "photo_3"),
        ("Folder B: two files with one name (1)", "photo_5"),
        ("Folder A: formats that a browser cannot show (1)", "scan.tif"),
    ):
        assert f"{why}, skipped\n{name}\n" in report + "\n"
    start(page)
    assert "of 4" in page.inner_text("#trial")


def test_what_stands_in_the_way_is_said(page, folders: Path, tmp_path: Path):
    page.click("#start")
    assert "Choose folder A and folder B." in page.inner_text("#report")
    shutil.copytree(folders / "cold", tmp_path / "warm")
    choose(page, folders / "warm", tmp_path / "warm", participant="")
    page.click("#start")
    report = page.inner_text("#report")
    assert 'Both folders are called "warm"' in report
    assert "Type the participant." in report
    assert page.is_visible("#setup")


def test_answers_survive_a_reload_and_can_be_changed(page, folders: Path):
    choose(page, folders / "warm", folders / "cold")
    start(page)
    for _ in range(3):
        give(page, side_of(page, "warm"))
    page.reload()
    choose(page, folders / "warm", folders / "cold", participant="somebody else")
    assert page.inner_text("#start") == "Start"
    page.fill("#participant", "p1")
    assert "3 answers from p1" in page.inner_text("#report")
    start(page)
    assert "Picture 4 of 6" in page.inner_text("#trial")
    third = side_of(page, "warm"), seen(page)[1]
    page.click("#back")
    page.wait_for_selector(READY)
    assert "Picture 3 of 6" in page.inner_text("#trial")
    side = side_of(page, "warm")
    assert page.get_attribute(f"[data-answer={side}]", "aria-pressed") == "true", "the answer given is shown"
    give(page, side_of(page, "cold"))
    assert (side_of(page, "warm"), seen(page)[1]) == third
    rows = download(page, "#save-now")
    assert [row["answer"] for row in rows] == ["warm", "warm", "cold"]
    page.reload()
    choose(page, folders / "warm", folders / "cold")
    assert page.inner_text("#start") == "Continue"
    page.set_input_files("#folder-input", folders / "small")
    page.uncheck("#faithful")
    assert page.inner_text("#start") == "Start", "with inputs it is another study"


def test_second_question_with_keys(page, folders: Path):
    assert page.is_disabled("#faithful")
    choose(page, folders / "warm", folders / "cold", input=folders / "small", truth=folders / "truths")
    start(page)
    side = side_of(page, "warm")
    assert page.inner_text("#question") == "Which is the better picture?"
    assert seen(page, "middle")[::2] == (90, 90), "the input"
    page.keyboard.press({"left": "1", "right": "ArrowRight"}[side])
    page.wait_for_selector(READY)
    assert page.inner_text("#question") == "Which is more faithful to the original?"
    assert side_of(page, "warm") == side, "the sides stay"
    assert seen(page, "middle")[::2] == (0, 0), "the truth, which the first question does not show"
    page.keyboard.press("2")
    page.wait_for_selector(READY)
    rows = download(page, "#save-now")
    assert [(row["question"], row["answer"], row["order"]) for row in rows] == [
        ("better", "warm", "1"),
        ("faithful_to_truth", "none", "1"),
    ]


def test_zoom_and_pan_are_those_of_all_panes(page, tmp_path: Path):
    """64 px pictures whose pixels say where they are, with an input of half the size."""
    for folder, size, blue in (("warm", 64, 0), ("cold", 64, 200), ("small", 32, 90)):
        (tmp_path / folder).mkdir()
        picture = Image.new("RGB", (size, size))
        picture.putdata([(4 * x * 64 // size, 4 * y * 64 // size, blue) for y in range(size) for x in range(size)])
        picture.save(tmp_path / folder / "a.png")
    choose(page, tmp_path / "warm", tmp_path / "cold", input=tmp_path / "small")
    start(page)

    def where(dx: int, dy: int) -> list[tuple[int, int]]:
        """Which pixel of the picture lies there, in each pane."""
        found = [seen(page, pane, dx, dy) for pane in ("left", "middle", "right")]
        assert [color[2] for color in found] in ([0, 90, 200], [200, 90, 0])
        return [(color[0] // 4, color[1] // 4) for color in found]

    for label, scale in (("1:1", 1), ("2:1", 2), ("4:1", 4)):
        page.click(f"text={label}")
        for offset in (0, 1, 2, 3, 4, 8, -1, -8, -9):  # the middle is between the pixels 31 and 32
            left, middle, right = where(offset, offset // 2)
            assert left == right == (32 + offset // scale, 32 + (offset // 2) // scale)
            assert scale == 1 or middle == (left[0] // 2 * 2, left[1] // 2 * 2)
    page.mouse.move(*centre(page, "right"))
    for _ in range(4):
        page.mouse.wheel(0, -100)
    assert page.inner_text("#zoom") == "16:1"
    page.mouse.down()
    page.mouse.move(centre(page, "right")[0] - 104, centre(page, "right")[1] + 24)
    page.mouse.up()
    assert where(0, 0) == [(38, 30)] * 3
    page.keyboard.press("Shift+ArrowLeft")
    assert where(0, 0)[0] == where(0, 0)[2] == (33, 30)
    page.keyboard.press("0")
    assert page.get_attribute("[data-zoom=fit]", "aria-pressed") == "true"


def test_a_pixel_is_a_pixel_of_the_screen(browser, folders: Path):
    with browser.new_context(viewport={"width": 1001, "height": 700}, device_scale_factor=2) as context:
        page = context.new_page()
        page.goto(PAGE.as_uri())
        choose(page, folders / "warm", folders / "cold")
        start(page)
        page.click("text=1:1")
        box = page.locator("#left canvas").bounding_box()
        sizes = page.evaluate("(({width, height}) => [width, height])(document.querySelector('#left canvas'))")
        assert sizes == pytest.approx([2 * box["width"], 2 * box["height"]], abs=1)
        red, surround = COLORS["warm"][::2], (0, 0)
        side = side_of(page, "warm")
        found = [seen(page, side, dx)[::2] for dx in (-33, -32, 31, 32)]
        assert found == [surround, red, red, surround], "64 px of the picture are 64 px of the screen"


def centre(page, pane: str) -> tuple[float, float]:
    box = page.locator(f"#{pane} canvas").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_file_that_cannot_be_opened_is_skipped_and_named(page, folders: Path, tmp_path: Path):
    shutil.copytree(folders / "warm", tmp_path / "warm")
    (tmp_path / "warm" / "photo_2.png").write_bytes(b"not a picture")
    choose(page, tmp_path / "warm", folders / "cold")
    start(page)
    for _ in range(5):
        give(page, "left")
    assert "Skipped, could not be opened: photo_2." in page.inner_text("#end")
    assert len(download(page)) == 5
