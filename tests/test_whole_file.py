"""Files that appear whole or not at all."""

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.networks.adapters import make_adapter, save_adapter
from icmsr_core.train.networks.bases import save_base
from icmsr_core.weights.base import open_base, write_base_info
from icmsr_core.weights.diffusers_folder import write_configuration
from icmsr_core.weights.tensor_files import write_tensors
from icmsr_core.whole_file import replace_file, replacing
from tests.support.places import ROOT


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        replace_file(pipe, b"data")
        assert os.read(reader, 10) == b"data"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


IN_PLACE = re.compile(
    r"\.(write_text|write_bytes|save_config|save_pretrained)\(|json\.dump\(|torch\.save\(|open\(.*[\"'][wx]"
)
ALLOWED = {
    "icmsr_core/whole_file.py": "the temporary file, a pipe or a device",
    "icmsr_core/pictures/files.py": "a storage, whose objects appear whole",
    "icmsr_core/pictures/storage.py": "a trial of whether the folder can be written",
    "icmsr_core/train/run/run_lock.py": "says who holds the lock",
    "train/pack_photographs.py": "a new folder",
}
"""Who writes in place, and what."""


def test_results_are_written_whole():
    """A kill in the middle of a file that is written in place leaves half of it under the name of the result."""
    paths = [path for folder in ("icmsr_core", "nodes", "train") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT).as_posix()) for path in paths if IN_PLACE.search(path.read_text("utf-8"))}
    assert found == set(ALLOWED)


def test_an_export_that_is_cut_short_leaves_the_old_configurations(base, tmp_path, monkeypatch):
    """The campaign of kills found halves of base/vae/config.json and of adapter/config.json."""
    opened = open_base(base)
    unet, vae = build_networks(opened)
    adapter, info, embedding = make_adapter(4, 8, (32, 64)), opened.info, opened.prompt_embedding()
    save_base(tmp_path / "base", unet, vae, embedding, info)
    save_adapter(tmp_path / "adapter", adapter, {"structure": "icm"}, torch.float32)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"config.json", "icmsr_base.json", "adapter.safetensors"}
    assert json.loads(before[tmp_path / "base" / "vae" / "config.json"]) == json.loads(vae.to_json_string())
    for network in (unet, vae, adapter):
        network.register_to_config(sample_size=99)

    def full_disk(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_base(tmp_path / "base", unet, vae, embedding, replace(info, name="second"))
    with pytest.raises(OSError, match="No space"):
        write_base_info(tmp_path / "base", replace(info, name="second"))
    with pytest.raises(OSError, match="No space"):
        write_configuration(tmp_path / "adapter", adapter)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
