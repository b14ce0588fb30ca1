"""The committed icon and banner are what release/artwork.py draws."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.places import ROOT

pytestmark = [pytest.mark.long, pytest.mark.slow]

LEVELS = 1.0
"""Mean difference of two drawings, of 255: browsers differ at edges, processors in the last bits of nano."""


def test_icon_and_banner_are_drawn_by_the_script(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no chromium on the PATH")
    command = [sys.executable, str(ROOT / "release" / "artwork.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "icon.svg").read_text() == (ROOT / "release" / "icon.svg").read_text()
    for name in ("icon.png", "banner.png"):
        drawn, committed = (
            np.asarray(Image.open(folder / name).convert("RGBA")) for folder in (tmp_path, ROOT / "release")
        )
        assert drawn.shape == committed.shape
        off = np.abs(drawn.astype(float) - committed).mean()
        print(f"{name}: {off:.3f} of 255 on average")
        assert off < LEVELS
        assert committed[..., :3].std() > 20, "not empty"
