"""The oldest ComfyUI that the pack runs in. Imports nothing of ComfyUI, so that it can say so in any."""

from __future__ import annotations

import importlib
import re

OLDEST = (0, 17, 0)
"""`requires-comfyui` in pyproject.toml. Schemas and templates need 0.11.0; the checks for memory need this one."""


def refuse_older_core() -> None:
    """Raises `ImportError`, in words, inside a ComfyUI that is older than `OLDEST`; does nothing outside of one."""
    try:
        found = str(importlib.import_module("comfyui_version").__version__)
    except ImportError:
        return
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"ICM-SR needs ComfyUI {oldest} or newer, this is {found}: update ComfyUI (in the Manager, or git pull and "
            "pip install -r requirements.txt)"
        )
