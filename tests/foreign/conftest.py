"""A small Stable Diffusion base for the weights of other methods."""

from pathlib import Path

import pytest

from icmsr_core.weights.base import BaseFolder, open_base
from tests.support.sd_files import write_sd_folder


@pytest.fixture(scope="session")
def narrow(tmp_path_factory) -> BaseFolder:
    """SD2.1's networks at a tenth of the width, in a folder."""
    return open_base(write_sd_folder(tmp_path_factory.mktemp("narrow") / "sd21", width_divisor=10))


@pytest.fixture(scope="session")
def shapes(narrow) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of its parameters, by network."""
    return {part: narrow.shapes(part) for part in ("unet", "vae")}


@pytest.fixture
def base(narrow) -> Path:
    return narrow.path
