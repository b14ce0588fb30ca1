"""The archive for the Comfy registry, made by comfy-cli in a copy of the checkout."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.places import ROOT


def load_publish() -> ModuleType:
    """release/publish.py as a module."""
    spec = importlib.util.spec_from_file_location("publish", ROOT / "release" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked_copy(folder: Path) -> Path:
    """A git checkout of its own, in `folder`, with the files that git tracks here, as they are now.

    Skips the test where comfy-cli or git is missing: it packs what git tracks, and writes into the folder.
    """
    pytest.importorskip("comfy_cli", reason="comfy-cli is not installed (extra test)")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what git tracks is unknown")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A", "-f"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def packed_archive(folder: Path) -> Path:
    """The zip that `comfy node pack` makes of a copy of this checkout; `folder` must not exist yet."""
    copied = tracked_copy(folder)
    publish = load_publish()
    publish.comfy("node", "pack", folder=copied, quiet=True)
    return copied / publish.ARCHIVE
