"""train/pack_photographs.py and what train/accelerated_nano.sh refuses before it trains."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from icmsr_core.errors import IcmsrError
from tests.support.places import ROOT
from tests.support.script_process import load_script

ACCELERATED = ROOT / "train" / "accelerated_nano.sh"


@pytest.fixture
def packing(monkeypatch):
    return load_script("pack_photographs", monkeypatch)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three of 700 x 500 pixels, which JPEG cannot make small, one of them deeper."""
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "more/c.png"):
        coarse = random.integers(0, 256, (125, 175, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), cv2.resize(coarse, (700, 500), interpolation=cv2.INTER_CUBIC))
    return folder


def pack(packing, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pack_photographs.py", *map(str, arguments)])
    packing.main()


def packed(folder: Path) -> list[np.ndarray]:
    return [cv2.imread(str(path)) for path in sorted(folder.iterdir())]


def test_all_photographs_are_kept_at_the_largest_size_that_fits(packing, monkeypatch, photographs, tmp_path):
    whole, small = tmp_path / "whole", tmp_path / "small"
    pack(packing, monkeypatch, f"--folders=['{photographs}']", f"--out={whole}", "--megabytes=5")
    assert [picture.shape for picture in packed(whole)] == [(500, 700, 3)] * 3
    original = cv2.imread(str(photographs / "a.png")).astype(float)
    assert np.abs(packed(whole)[0] - original).mean() < 6
    size = sum(path.stat().st_size for path in whole.iterdir())
    pack(packing, monkeypatch, f"--folders=['{photographs}']", f"--out={small}", f"--megabytes={0.9 * size / 1e6}")
    assert sum(path.stat().st_size for path in small.iterdir()) <= 0.9 * size
    assert [picture.shape for picture in packed(small)] == [(457, 640, 3)] * 3


def test_what_cannot_fit_and_a_folder_that_is_there_are_refused(packing, monkeypatch, photographs, tmp_path):
    folders = f"--folders=['{photographs}']"
    with pytest.raises(IcmsrError, match=r"3 photographs of at most 256 px take more than 0.001 MB"):
        pack(packing, monkeypatch, folders, f"--out={tmp_path / 'out'}", "--megabytes=0.001")
    assert not (tmp_path / "out").exists()
    with pytest.raises(IcmsrError, match="is there already: name another folder"):
        packing.Config(out=str(tmp_path))
    with pytest.raises(IcmsrError, match="megabytes must be above 0 and quality 1 to 100, got 45 and 0"):
        packing.Config(out=str(tmp_path / "out"), quality=0)


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_the_accelerated_chain_says_how_it_is_called_and_keeps_what_is_there(tmp_path):
    called = subprocess.run([ACCELERATED], capture_output=True, text=True, check=False)
    assert called.returncode == 2
    assert "train/accelerated_nano.sh PHOTOS LPIPS_VGG OUT" in called.stderr
    (tmp_path / "lpips").touch()
    again = subprocess.run([ACCELERATED, tmp_path, tmp_path / "lpips", tmp_path], capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path} is there already: name another folder\n"
