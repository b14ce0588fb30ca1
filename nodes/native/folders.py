"""Where ComfyUI looks for ICM-SR's weights: models/icmsr, and core's folders for LoRAs and control nets."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...icmsr_core.errors import IcmsrError

FOLDER = "icmsr"
EXTENSION = ".safetensors"
EMBEDDED = "nano (embedded)"
"""What lists call the weights that ship with the pack."""


def register_folder() -> None:
    """Makes models/icmsr known, after whatever extra_model_paths.yaml has already put under that name."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # A new name starts with no extension at all, which lists every file of the folder.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, EXTENSION})


def list_files(*folders: str) -> list[str]:
    """Names of the .safetensors files in the given model folders, in that order, each name once."""
    names = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return [name for name in dict.fromkeys(names) if name.endswith(EXTENSION)]


def find_file(name: str, *folders: str) -> Path:
    """Path of the file called `name` in the first of the model folders that has it. Raises `IcmsrError`."""
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return Path(path)
    places = " or ".join(f"models/{folder}" for folder in folders)
    raise IcmsrError(f"{name!r} is not in {places}: put the file there and refresh the node list (R)")


def file_stamp(path: Path) -> str:
    """Changes whenever the file at `path` is replaced, so that ComfyUI runs the node again."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"
