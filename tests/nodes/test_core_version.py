"""An older ComfyUI is refused in words, and the same version stands in pyproject.toml."""

import re
import sys
from types import ModuleType

import pytest

from nodes.core_version import OLDEST, refuse_older_core
from tests.support.places import ROOT


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module in which ComfyUI states its version."""
    module = ModuleType("comfyui_version")
    monkeypatch.setitem(sys.modules, "comfyui_version", module)
    return module


@pytest.mark.parametrize("version", ["0.3.60", "0.9.2", "0.16.4"])
def test_an_older_core_is_refused(core: ModuleType, version: str) -> None:
    core.__version__ = version
    with pytest.raises(ImportError, match=rf"ICM-SR needs ComfyUI 0\.17\.0 or newer, this is {re.escape(version)}"):
        refuse_older_core()


@pytest.mark.parametrize("version", ["0.17.0", "0.33.0", "1.0.0", "0.33.0-nightly", "unknown"])
def test_a_newer_core_or_an_unknown_one_is_not(core: ModuleType, version: str) -> None:
    core.__version__ = version
    refuse_older_core()


def test_nothing_is_refused_outside_of_comfyui() -> None:
    assert "comfyui_version" not in sys.modules
    refuse_older_core()


def test_pyproject_states_the_same_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-comfyui = ">={".".join(map(str, OLDEST))}"' in text
