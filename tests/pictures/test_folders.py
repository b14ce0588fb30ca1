"""Walking through folders: order, hidden files, links."""

import os
from pathlib import Path

import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.folders import walk_folder


def names(folder: Path, outside: Path | None = None) -> list[str]:
    return [name.as_posix() for name in walk_folder(folder, outside)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("b.png", "a.txt", "sub/c.png", "sub/deep/d.png", ".hidden/e.png", ".f.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_files_come_folder_by_folder_in_order_and_hidden_ones_do_not(tree):
    assert names(tree) == ["a.txt", "b.png", "sub/c.png", "sub/deep/d.png"]


def test_the_folder_of_the_results_is_not_entered(tree):
    assert names(tree, tree / "sub" / "deep") == ["a.txt", "b.png", "sub/c.png"]
    assert names(tree, tree / "not there yet") == names(tree)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
def test_linked_folders_are_entered_once_and_circles_end(tree, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    (far / "z.png").touch()
    (tree / "link").symlink_to(far)
    (tree / "again").symlink_to(far)
    (far / "back").symlink_to(tree)
    (tree / "sub" / "up").symlink_to(tree)
    assert sorted(names(tree)) == sorted(["a.txt", "b.png", "again/z.png", "sub/c.png", "sub/deep/d.png"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tree):
    (tree / "sub").chmod(0)
    with pytest.raises(IcmsrError, match="sub: cannot be read"):
        names(tree)
