"""release/site.py: what is on the site, and that a link to nowhere is found. .ci/run builds it."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.pack.test_architecture import FLOORS
from tests.support.places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

WITHOUT_A_PAGE = {"cli", "console", "errors", "steps", "transfer", "whole_file", "train.settings", "train.experiments"}
"""Rooms of the library that nobody calls from outside."""


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_script", ROOT / "release" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_room_of_the_library_is_in_the_reference(site: ModuleType) -> None:
    rooms = {room.removeprefix("icmsr_core.") for floor in FLOORS for room in floor if room.startswith("icmsr_core.")}
    assert set(site.ROOMS) == rooms - WITHOUT_A_PAGE


def test_a_room_s_page_names_its_public_modules(site: ModuleType) -> None:
    page = site.reference_page("upscale", "the one-step pass")
    assert page.startswith("# icmsr_core.upscale: the one-step pass\n")
    named = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert "icmsr_core.upscale.one_step" in named
    assert all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in named)
    assert re.findall(r"^::: (\S+)$", site.reference_page("conditions", "x"), re.MULTILINE) == ["icmsr_core.conditions"]


def test_every_document_is_in_the_navigation(site: ModuleType, tmp_path: Path) -> None:
    def pages(entry: object) -> set[str]:
        inner = entry if isinstance(entry, list) else list(entry.values()) if isinstance(entry, dict) else None
        return {entry} if inner is None else set().union(*map(pages, inner))

    listed = pages(tomllib.loads(site.configuration())["project"]["nav"])
    site.write_sources(tmp_path)
    there = {path.relative_to(tmp_path / "docs").as_posix() for path in (tmp_path / "docs").rglob("*.md")}
    assert listed <= there
    # docs/README.md is the list of documents for those who read the repository.
    assert {name for name in there - listed if not name.startswith("web/docs/")} == {"docs/README.md"}


def test_a_link_to_nowhere_is_found(site: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "index.html").write_text('<h1 id="top">x</h1><a href="below/page.html#part">x</a><img src="a.png">')
    (tmp_path / "below" / "page.html").write_text(
        '<h1 id="part">x</h1><a href="../index.html#top">x</a><a href="#part">x</a><a href="https://a.b/c">x</a>'
    )
    assert site.broken_links(tmp_path) == []
    (tmp_path / "other.html").write_text('<a href="gone.html">x</a><a href="index.html#gone">x</a><img src="gone.png">')
    assert [line.split()[3] for line in site.broken_links(tmp_path)] == ["gone.html,", "index.html#gone,", "gone.png,"]
