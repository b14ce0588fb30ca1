"""Pictures in a storage: fsspec's memory here, an object store in tests/cli/test_cluster_run.py."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import Picture, read_picture, stored_size, write_picture
from icmsr_core.pictures.storage import RemotePath, place_of


@pytest.fixture
def folder() -> Iterator[RemotePath]:
    """An empty folder in memory."""
    place = place_of("memory://bucket/folder/")
    assert isinstance(place, RemotePath)
    place.system.store.clear()
    yield place
    place.system.store.clear()


def test_a_path_stays_a_path_and_an_address_becomes_a_file_in_a_storage(tmp_path: Path) -> None:
    for text in ("a/b.png", "C:\\photos\\b.png", str(tmp_path), "s3:/bucket/b.png"):
        assert place_of(text) == Path(text)
    assert place_of(f"file://{tmp_path}/a.png") == tmp_path / "a.png"
    place = place_of("memory://bucket/a.b/c#1?.PNG")
    assert (str(place), place.name, place.suffix) == ("memory:///bucket/a.b/c#1?.PNG", "c#1?.PNG", ".PNG")
    assert (str(place.parent), str(place.with_suffix(".jpg"))) == (
        "memory:///bucket/a.b",
        "memory:///bucket/a.b/c#1?.jpg",
    )
    assert place.parent / place.name == place_of(place) == place.resolve() == place
    assert pickle.loads(pickle.dumps(place)) == place
    for text, words in (("nosuch://a/b", "nosuch"), ("abfs://a/b", "pip install")):
        with pytest.raises(IcmsrError, match=words):
            place_of(text)


def test_a_picture_is_written_and_read_as_in_a_folder(folder: RemotePath, tmp_path: Path) -> None:
    picture = Picture(np.random.default_rng(0).random((5, 7, 3), np.float32), bits=16)
    write_picture(tmp_path / "a.png", picture)
    write_picture(folder / "sub/a.png", picture)
    assert (folder / "sub/a.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert np.array_equal(read_picture(folder / "sub/a.png").rgb, read_picture(tmp_path / "a.png").rgb)
    assert stored_size(folder / "sub/a.png") == (7, 5)
    assert stored_size(folder / "none.png") is None


def test_what_fails_is_named_by_its_address(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IcmsrError, match=r"^memory:///bucket/folder/none\.png: no such file or folder$"):
        read_picture(folder / "none.png")
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(IcmsrError, match=r"^memory:///bucket/folder/bad\.png: not a picture in a known format"):
        read_picture(folder / "bad.png")
    monkeypatch.setattr(folder.system, "pipe_file", lambda *_: (_ for _ in ()).throw(PermissionError("Access\nDenied")))
    with pytest.raises(IcmsrError, match=r"^memory:///bucket/folder/\.icmsr-\w+\.part: Access Denied$"):
        folder.check_writable()


def test_a_folder_lists_what_it_holds(folder: RemotePath) -> None:
    for name in ("b.png", "a.txt", ".hidden.png", "sub/c.jpg", "sub/deep/d.png", ".git/e.png", "out/f.png"):
        (folder / name).write_bytes(b"x")
    assert folder.entries(recursive=False)[0] == [Path("a.txt"), Path("b.png")]
    assert folder.entries(recursive=False)[1] >= 2
    files, folders = folder.entries(recursive=True, outside=folder / "out")
    assert (files, folders) == ([Path(name) for name in ("a.txt", "b.png", "sub/c.jpg", "sub/deep/d.png")], 0)
    folder.check_writable()
    assert len(folder.entries(recursive=True)[0]) == 5
    assert folder.is_dir()
    assert (folder / "b.png").is_file()
    assert not (folder / "none").exists()
