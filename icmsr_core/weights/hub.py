"""Finds a base by its name: a path, or a model on the Hugging Face hub, of which only the needed files are fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import IcmsrError
from .base import INFO_FILE, PROMPT_FILE
from .diffusers_folder import CONFIG_FILE, HALF_FILE, HALF_INDEX_FILE, INDEX_FILE, SCHEDULER_FILE, WEIGHTS_FILE
from .generator_file import PARTS
from .sd_families import SD_HUB_IDS

TEXT_WEIGHTS, TEXT_HALF = ["model.safetensors"], ["model.fp16.safetensors"]
"""Weights of the text encoder in full precision, and their fp16 variant."""
TOKENIZER_FILES = ("tokenizer/*.json", "tokenizer/merges.txt")


def find_base(name: str, text: bool = False) -> Path:
    """The folder or file of the base called `name`: a path, or the snapshot of a model on the hub.

    A path that exists wins. A name of the form ``owner/name`` whose first half is not a local folder is a hub id: the
    result is the snapshot in huggingface_hub's cache, downloaded if it is missing. Without a network (or with
    HF_HUB_OFFLINE=1) it is what the cache has. Weights in full precision are fetched, or else the fp16 variant; with
    `text`, the text encoder and the tokenizer as well.

    Raises `IcmsrError` for an id that is neither in the cache nor on the hub, or there in part only. Other names are
    returned unchanged; `open_base` says what is wrong with them.
    """
    path = Path(name)
    if path.exists() or not is_hub_id(name) or path.parent.exists():
        return path
    fetch = _downloader(name)
    weights = [WEIGHTS_FILE, INDEX_FILE, _shards(WEIGHTS_FILE)]
    half = [HALF_FILE, HALF_INDEX_FILE, _shards(HALF_FILE)]
    wanted = dict.fromkeys(PARTS, (weights, half))
    if text:
        wanted["text_encoder"] = (TEXT_WEIGHTS, TEXT_HALF)
    folder = fetch(
        [
            INFO_FILE,
            PROMPT_FILE,
            SCHEDULER_FILE,
            *(TOKENIZER_FILES if text else ()),
            *(f"{part}/{file}" for part, (whole, _) in wanted.items() for file in (CONFIG_FILE, *whole)),
        ]
    )
    without = [part for part, (whole, _) in wanted.items() if not any((folder / part / f).is_file() for f in whole[:2])]
    if without:
        folder = fetch([f"{part}/{file}" for part in without for file in wanted[part][1]])
    _check_complete(name, folder, {part: (*whole[:2], *halves[:2]) for part, (whole, halves) in wanted.items()})
    return folder


def _check_complete(name: str, folder: Path, weights: Mapping[str, Sequence[str]]) -> None:
    """Raises `IcmsrError` where the snapshot `folder` lacks files: one of the `weights` of every part is needed."""
    missing = [] if any((folder / file).is_file() for file in (INFO_FILE, SCHEDULER_FILE)) else [SCHEDULER_FILE]
    for part, files in weights.items():
        if not (folder / part / CONFIG_FILE).is_file():
            missing.append(f"{part}/{CONFIG_FILE}")
        if not any((folder / part / file).is_file() for file in files):
            missing.append(f"{part}/{files[0]}")
    if missing:
        raise IcmsrError(
            f"{name}: download incomplete: {', '.join(missing)} missing in {folder}: run the same command again with a "
            "network (and without HF_HUB_OFFLINE), which fetches the rest; if that changes nothing, the model is no "
            "Stable Diffusion in diffusers' form"
        )


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form ``owner/name`` of a model on the hub, and not that of a path."""
    half = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    return re.fullmatch(f"{half}/{half}", name) is not None and not name.endswith((".safetensors", ".ckpt"))


def _shards(file: str) -> str:
    """The pattern of the names of the shards of `file`."""
    return file.replace(".safetensors", "-?????-of-?????.safetensors")


def _downloader(name: str) -> Any:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise IcmsrError(
            f"{name}: no such file or folder; to fetch a base from the Hugging Face hub, pip install huggingface_hub "
            f"({error})"
        ) from error

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # of several libraries: its own, the HTTP client's, the operating system's
            reason = " ".join(str(error).split()[:30]) or type(error).__name__
            raise IcmsrError(
                f"{name}: not found here, and the Hugging Face hub did not give it ({reason}): check the "
                f"name (such as {SD_HUB_IDS['sd21']}), or download it first and name the folder"
            ) from error

    return fetch
