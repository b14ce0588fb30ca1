"""Says what a file holds when it is not the kind of weights that was asked for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

HEAD = 64
"""Bytes at a file's beginning that tell what it is."""
AGAIN = "download or export it again"


def unreadable(path: Path, reason: str) -> str:
    """The error for a file at `path` that is not a readable .safetensors; `reason` is what the reader said."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    way_out = AGAIN
    # A .safetensors begins with eight bytes of length and a brace, so none of these is one.
    if head.startswith((b"PK\x03\x04", b"\x80")):
        reason = "a pickle, which can run code when it is read; no code in it was run"
        way_out = "choose the .safetensors file of the same model; those of other methods go through `icmsr import`"
    elif head.startswith(b"version https://git-lfs"):
        reason, way_out = "a Git LFS pointer in the file's place", "fetch the file itself with `git lfs pull`"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        reason, way_out = "a web page in the file's place", "download the file itself"
    return f"{path}: not a readable .safetensors file ({reason}): {way_out}"


def known_kind(keys: Collection[str]) -> str:
    """What a .safetensors with these keys holds, such as "a LoRA"; empty when its layout is not known."""

    def any_starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    # SD-Turbo, a Stable Diffusion 2.1, has one text encoder under the name that SDXL uses for its two.
    if any_starts("conditioner.embedders.1.", "model.diffusion_model.label_emb."):
        return "a checkpoint of SDXL or of another model with a class embedding"
    if any_starts("model.diffusion_model."):
        return "a checkpoint"
    if any_starts("adapter.", "body."):
        return "a T2I-Adapter"
    if any("lora" in key or "hada_" in key or "lokr_" in key for key in keys):
        return "a LoRA"
    if any_starts("encoder.", "decoder.", "first_stage_model."):
        return "a VAE alone"
    return "a diffusers UNet alone" if any_starts("down_blocks.", "up_blocks.") else ""
