"""release/publish.py: what only the owner knows is asked for, comfy-cli passes, the archive holds the pack alone."""

import copy
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.pack.test_pack_rules import SHIPPED, project
from tests.support.places import ROOT
from tests.support.registry_archive import load_publish, tracked_copy

FILLED_IN = {
    "urls": {name: f"https://example.org/{name.lower()}" for name in ("Repository", "Documentation", "Issues")},
    "comfy": {
        "PublisherId": "somebody",
        "Icon": "https://example.org/icon.png",
        "Banner": "https://example.org/banner.png",
    },
}


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    return load_publish()


@pytest.fixture
def filled_in() -> dict:
    """pyproject.toml as its owner would have it."""
    found = copy.deepcopy(project())
    found["project"]["urls"].update(FILLED_IN["urls"])
    found["tool"]["comfy"].update(FILLED_IN["comfy"])
    return found


def checkout(folder: Path, changelog: str) -> Path:
    """A git checkout with this changelog alone."""
    folder.mkdir()
    (folder / "CHANGELOG.md").write_text(changelog)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_every_field_of_the_owner_is_asked_for(publish: ModuleType, filled_in: dict) -> None:
    assert list(publish.empty_fields(filled_in)) == []
    for section, values in (("urls", FILLED_IN["urls"]), ("comfy", FILLED_IN["comfy"])):
        for name in values:
            for wrong in ("", "icon.png", "http://example.org/x") if name != "PublisherId" else ("",):
                changed = copy.deepcopy(filled_in)
                place = changed["project"]["urls"] if section == "urls" else changed["tool"]["comfy"]
                place[name] = wrong
                (line,) = publish.empty_fields(changed)
                assert f".{name} " in line


def test_a_release_is_finished_when_changelog_and_checkout_are(publish: ModuleType, tmp_path: Path) -> None:
    version = {"project": {"version": "1.2.0"}}
    done = checkout(tmp_path / "done", "# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2030-01-02\n\n- It works.\n")
    assert list(publish.unfinished_release(version, done)) == []
    (done / "new.py").write_text("")
    assert list(publish.unfinished_release(version, done)) == [
        "1 files are not committed: the archive holds what git tracks"
    ]
    more = checkout(tmp_path / "more", "## Unreleased\n\n- New.\n\n## 1.2.0 - 2030-01-02\n")
    assert "lists changes above 1.2.0" in next(publish.unfinished_release(version, more))
    none = checkout(tmp_path / "none", "## Unreleased\n\n- New.\n")
    assert 'no heading "## 1.2.0 - YYYY-MM-DD"' in next(publish.unfinished_release(version, none))


def test_artwork_has_the_registry_s_sizes(publish: ModuleType, tmp_path: Path) -> None:
    assert list(publish.wrong_artwork(ROOT)) == []
    (tmp_path / "release").mkdir()
    Image.new("RGB", (401, 401)).save(tmp_path / "release" / "icon.png")
    Image.new("RGB", (1600, 900)).save(tmp_path / "release" / "banner.png")
    assert len(list(publish.wrong_artwork(tmp_path))) == 2


def test_what_does_not_belong_into_the_archive_is_named(publish: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "node.zip"
    assert len(list(publish.wrong_in_archive(archive))) == 1
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("nodes/upscale.py", "")
        packed.writestr("web/docs/page.md", "")
        packed.writestr("icmsr_core/train/settings.py", "")
        packed.writestr("example_workflows/small.jpg", b"\0" * 1_000_000)
        packed.writestr("example_workflows/large.jpg", b"\0" * 1_000_001)
        packed.writestr("tests/test_x.py", "")
        packed.writestr(".env", "")
    assert [line.split()[0] for line in publish.wrong_in_archive(archive)] == [
        "example_workflows/large.jpg",
        "tests/test_x.py",
        ".env",
    ]


@pytest.mark.long
def test_comfy_cli_passes_and_packs_the_pack(publish: ModuleType, tmp_path: Path) -> None:
    """In a copy of what git tracks: packing writes into the folder."""
    copied = tracked_copy(tmp_path / "pack")
    assert list(publish.refused_by_comfy(copied)) == []
    publish.comfy("node", "pack", folder=copied, quiet=True)
    with zipfile.ZipFile(copied / publish.ARCHIVE) as packed:
        names = packed.namelist()
    size = (copied / publish.ARCHIVE).stat().st_size
    print(f"{len(names)} files, {size / 1e6:.1f} MB")
    assert {name.split("/")[0] for name in names} == SHIPPED
    assert size < 25e6
    (copied / "nodes" / "bad.py").write_text("exec('1')\n")
    assert "does not pass" in next(publish.refused_by_comfy(copied)), "though the validator's exit code is 0"
