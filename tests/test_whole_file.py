"""Files that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
import torch

from icmsr_core.weights.tensor_files import write_tensors
from icmsr_core.whole_file import replace_file, replacing


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    for data in (b"old", b"newer"):
        replace_file(tmp_path / "deep" / "file", data)
        assert content(tmp_path / "deep") == {"file": data}


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "file", b"old")

    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        replace_file(tmp_path / "file", b"new")
    assert content(tmp_path) == {"file": b"old"}


def test_an_interrupted_writer_leaves_the_old_file(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"old")

    def write() -> None:
        with replacing(tmp_path / "file") as place:
            place.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert content(tmp_path) == {"file": b"old"}


def test_a_missing_folder_is_an_error_where_it_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "file") as place:
        place.write_bytes(b"")
    assert not content(tmp_path)


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """Also of what safetensors wrote, for its owner only."""
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", b"")
        write_tensors(tmp_path / "tensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "tensors")] == [0o640] * 2


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "file", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(Path("far") / "file")
    replace_file(link, b"new")
    assert link.is_symlink()
    assert content(tmp_path / "far") == {"file": b"new"}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "far", link]
