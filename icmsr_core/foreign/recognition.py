"""Says which published weights a foreign file is, by the names in it, and refuses those that cannot work."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from ..errors import IcmsrError
from ..weights.file_kinds import known_kind
from ..weights.tensor_files import first_names
from .containers import Container
from .kinds import LORA_KIND
from .layouts import published_layout
from .relatives import RELATIVE

OMGSR_FOLDERS = {"unet": "unet_lora_adapter", "vae": "vae_encoder_lora_adapter"}
"""OMGSR's two PEFT folders, which lie side by side."""
HYPIR_KEY = re.compile(r"(.+)\.lora_[AB]\.default\.weight")
"""HYPIR's names: a bare module, and PEFT's default adapter left in."""
TAGS = {
    "state_dict_unet_de_mlp": "S3Diff, which cannot work: its LoRA changes with each picture, that of a generator does "
    "not",
    "state_dict_vae_de_mlp": "S3Diff, which cannot work: its LoRA changes with each picture, that of a generator does "
    "not",
    "state_dict_vae_time": "TADSR, which cannot work: its VAE depends on the time and its step is of another form",
}
"""Entries of pickles that nothing here can use, and why."""
KEYS = {"unet_lora_encoder_modules_pix": "pisasr", "unet_lora_encoder_modules": "osediff"}
"""Entries that only one method's pickle has."""
XL_BLOCK = re.compile(r"transformer_blocks[._][1-9]|add_embedding|label_emb|^lora_te2_|text_encoder_2")
"""What SDXL's names have: several transformer blocks in one attention, a second text encoder."""
XL_WIDTH = 2048
"""Width of SDXL's text; those of Stable Diffusion are 768 and 1024."""


def omgsr_folder(path: Path) -> Path | None:
    """The folder of OMGSR's two, if `path` is it, one of the two, or a file in one of them.

    Raises `IcmsrError` where only one of the two is there.
    """
    if _holds_both(path):
        return path
    inside = path if path.is_dir() else path.parent
    if inside.name not in OMGSR_FOLDERS.values():
        return None
    if _holds_both(inside.parent):
        return inside.parent
    (missing,) = set(OMGSR_FOLDERS.values()) - {inside.name}
    raise IcmsrError(f"{inside}: one of OMGSR's two folders; {missing} must lie next to it: download both")


def _holds_both(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in OMGSR_FOLDERS.values())


def refuse_hopeless(file: Container) -> None:
    """Raises `IcmsrError` for weights that look like the supported ones and cannot work, with the reason."""
    for key, what in TAGS.items():
        if key in file.values:
            raise IcmsrError(f"{file.path}: this is {what}: choose another model's file")
    if _is_xl(file):
        raise IcmsrError(
            f"{file.path}: this is a LoRA of SDXL, which cannot work: its layers are not those of Stable Diffusion 1.5 "
            "or 2.1, and a generator changes one of these: choose another file"
        )


def recognise(file: Container) -> str:
    """The kind of `file`: a relative by what only its files have, or a LoRA of which nothing is known.

    Raises `IcmsrError` as `refuse_hopeless`, and for what holds no LoRA.
    """
    refuse_hopeless(file)
    for key, kind in KEYS.items():
        if key in file.values:
            return kind
    if _is_hypir(file.values):
        return "hypir"
    if not any("lora" in key for key in file.values):
        kind = known_kind(file.values.keys())
        found = kind or f"entries such as {first_names(sorted(file.values))}"
        raise IcmsrError(f"{file.path}: not the weights of a one-step model, it holds {found}: choose another file")
    return LORA_KIND


def _is_hypir(keys: Collection[str]) -> bool:
    """Whether all names are of HYPIR's form, without conv_in, and most of its modules are there.

    A LoRA of some other network that was saved in the same way has few of its modules.
    """
    found = [HYPIR_KEY.fullmatch(key) for key in keys]
    modules = {match[1] for match in found if match}
    own = RELATIVE["hypir"].modules("unet", published_layout("sd21"))
    return all(found) and "conv_in" not in modules and 2 * len(modules & own) > len(own)


def _is_xl(file: Container) -> bool:
    lora = {key: value for key, value in file.values.items() if "lora" in key}
    if any(XL_BLOCK.search(key) for key in lora):
        return True
    widths = {
        value.shape[1]
        for key, value in lora.items()
        if re.search(r"attn2[._]to_[kv].*(lora_A|down)", key) and isinstance(value, Tensor) and value.ndim > 1
    }
    return XL_WIDTH in widths
