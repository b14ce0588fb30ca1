"""Names of the files in a diffusers folder, as `save_pretrained` writes them, and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..whole_file import replace_file

WEIGHTS_STEM = "diffusion_pytorch_model"
"""The name of every weights file up to its first dot."""
CONFIG_FILE = "config.json"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
"""Which of several files (shards) holds which tensor."""
HALF_FILE = f"{WEIGHTS_STEM}.fp16.safetensors"
HALF_INDEX_FILE = f"{WEIGHTS_FILE}.index.fp16.json"
PICKLE_FILE = f"{WEIGHTS_STEM}.bin"
SCHEDULER_FILE = "scheduler/scheduler_config.json"


def write_configuration(folder: Path, network: Any) -> None:
    """What diffusers' `network.save_config` writes into `folder`, but the file appears whole or not at all."""
    replace_file(folder / CONFIG_FILE, network.to_json_string().encode())
