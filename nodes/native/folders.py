"""The folders with weights: models/icmsr, and core's own for LoRAs and control nets."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.foreign.containers import CONTAINERS
from ...icmsr_core.foreign.recognition import OMGSR_FOLDERS

FOLDER, LORAS = "icmsr", "loras"
PEFT_STEM = "adapter_"
"""Beginning of the names of both files in a folder of PEFT."""
EXTENSION = ".safetensors"
EMBEDDED = "nano (embedded)"
"""The name of the weights inside the pack, in the lists of files."""


def register_folder() -> None:
    """Registers models/icmsr, after the folders that extra_model_paths.yaml has already registered under this name."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # Core registers a new name without extensions, and then lists every file in the folder.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, *CONTAINERS})


def list_generators() -> list[str]:
    """Names of the files that may be generators: ours and foreign ones of models/icmsr, LoRAs of models/loras.

    Each name once; of models/loras only .safetensors.
    """
    own = [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(CONTAINERS)]
    loras = [name for name in folder_paths.get_filename_list(LORAS) if name.lower().endswith(EXTENSION)]
    return list(dict.fromkeys([*own, *loras]))


def generator_stamp(path: Path) -> str:
    """`file_stamp` of the generator at `path`; in a LoRA's folder of PEFT also of the other files that count."""
    files = {path}
    if path.name.startswith(PEFT_STEM):
        for folder in (path.parent, *(path.parent.parent / name for name in OMGSR_FOLDERS.values())):
            files.update(folder.glob(f"{PEFT_STEM}*"))
    return " ".join(map(file_stamp, sorted(files)))


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
