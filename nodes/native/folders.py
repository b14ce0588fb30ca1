"""The folders with weights: models/icmsr, and core's own for LoRAs and control nets."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...icmsr_core.errors import IcmsrError

FOLDER = "icmsr"
EXTENSION = ".safetensors"
EMBEDDED = "nano (embedded)"
"""The name of the weights inside the pack, in the lists of files."""


def register_folder() -> None:
    """Registers models/icmsr, after the folders that extra_model_paths.yaml has already registered under this name."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # Core registers a new name without extensions, and then lists every file in the folder.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, EXTENSION})


def list_files(*folders: str) -> list[str]:
    """Names of the .safetensors files in the model folders `folders`, in this order, each name once."""
    names = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return [name for name in dict.fromkeys(names) if name.lower().endswith(EXTENSION)]


def find_file(name: str, *folders: str) -> Path:
    """Path of the file called `name` in the first of `folders` that has it. Raises `IcmsrError` if none has."""
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return Path(path)
    places = " or ".join(f"models/{folder}" for folder in folders)
    raise IcmsrError(f"{name!r} is not in {places}: put the file there and press R in ComfyUI to refresh the lists")


def file_stamp(path: Path) -> str:
    """A text that changes when the file at `path` is replaced, so that ComfyUI runs the node again."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"
