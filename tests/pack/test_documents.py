"""The documents name files that exist, and link to pages and headings that exist."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pack.test_architecture import FLOORS
from tests.support.places import ROOT

FOLDERS = "icmsr_core|nodes|train|tests|benchmarks|release|docs|web|locales|example_workflows|.ci|.github".replace(
    ".", r"\."
)
NAMED_PATH = re.compile(rf"(?<![\w/.~-])(?:{FOLDERS})/[\w./*-]*")
NAMED_FILE = re.compile(r"`([\w.-]+\.(?:md|toml|txt|yaml))`")
PLACEHOLDER = re.compile(r"[A-Z_]{4,}")
"""A name in capitals stands for whatever the reader calls it: nodes/NAME.py."""
NAMED_OBJECT = re.compile(r"([\w./-]+\.py):(\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
INDEX = ROOT / "docs" / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
AT_THE_TOP = sorted(ROOT.glob("*.md"))
HELP_PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))


def named_paths(text: str) -> Iterator[str]:
    """Every path from the project's root that `text` names: with a folder anywhere, without one in backticks."""
    for match in NAMED_PATH.finditer(text):
        path = match[0].rstrip(".-")
        if not PLACEHOLDER.fullmatch(Path(path).stem.removeprefix("test_")) or Path(path).stem == "README":
            yield path
    yield from NAMED_FILE.findall(text)


def exists(path: str) -> bool:
    """Whether the path, which may hold wildcards, is a file or a folder of the project."""
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def headings(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """The page's links to a file or a heading that does not exist; links to the web are not followed."""
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        file = page.parent / target if target else page
        if "://" not in target and not (file.exists() and (not heading or heading in headings(file))):
            broken.append(f"{page.name}: {link}")
    return broken


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_path_that_a_document_names_exists(document: str) -> None:
    paths = list(named_paths((ROOT / document).read_text(encoding="utf-8")))
    assert paths
    assert [path for path in paths if not exists(path)] == []


def defines(path: str, name: str) -> bool:
    """Whether the file defines a function, a class, a method, or a name of the module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return name in found


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_object_that_a_document_names_is_in_its_file(document: str) -> None:
    named = NAMED_OBJECT.findall((ROOT / document).read_text(encoding="utf-8"))
    assert named
    assert [entry for entry in named if not defines(*entry)] == []


def test_an_object_that_is_gone_is_found() -> None:
    color = "icmsr_core/upscale/color.py"
    assert NAMED_OBJECT.findall(f"`{color}:apply_color_fix` and {color}.") == [(color, "apply_color_fix")]
    assert defines(color, "apply_color_fix")
    assert defines("icmsr_core/upscale/settings.py", "COLOR_FIXES")
    assert not defines(color, "COLOUR_FIXES")


def test_a_path_that_is_gone_is_found() -> None:
    text = "See `icmsr_core/upscale/color.py`, train/*.py, `nodes/NAME.py`, `NEWS.md` and icmsr_core/one_step.py."
    paths = list(named_paths(text))
    assert paths == ["icmsr_core/upscale/color.py", "train/*.py", "icmsr_core/one_step.py", "NEWS.md"]
    assert [path for path in paths if not exists(path)] == ["icmsr_core/one_step.py", "NEWS.md"]


def test_every_link_leads_somewhere() -> None:
    assert [link for page in [*AT_THE_TOP, *PAGES, *HELP_PAGES] for link in broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[a](#a-page) [b](page.md#a-page) [c](https://a.b/c)\n[d](#b) [e](other.md) [f](page.md#g)"
    )
    assert broken_links(page) == ["page.md: #b", "page.md: other.md", "page.md: page.md#g"]


def test_the_index_of_the_documents_has_a_line_for_each_page() -> None:
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(INDEX.read_text())}
    assert set(PAGES) - {INDEX} <= linked


def test_the_architecture_page_has_every_room_on_its_floor() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)
    shown = {(int(number), room) for number, cell in rows for room in re.findall(r"`([\w/]+?)(?:/|\.py)`", cell)}
    assert shown == {(number, room.replace(".", "/")) for number, floor in enumerate(FLOORS, start=1) for room in floor}


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_notes_of_templates_have_no_code_spans(path: Path):
    """ComfyUI's Nodes 2.0 shows them in dark blue on light blue, which cannot be read on a note's brown."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert [note for note in notes if "`" in note] == []
