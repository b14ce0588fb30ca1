"""The names that diffusers' parameters have in ComfyUI's native networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import comfy.utils

from ...icmsr_core.foreign.layouts import Layout, Shapes, published_layout
from .core_objects import Model, Vae

_VAE_RULES = (
    (re.compile(r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\."), r"encoder.down.\1.block.\2."),
    (re.compile(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\."), r"encoder.down.\1.downsample."),
    (re.compile(r"\.mid_block\.attentions\.0\.group_norm\."), ".mid.attn_1.norm."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_q|query)\."), ".mid.attn_1.q."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_k|key)\."), ".mid.attn_1.k."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_v|value)\."), ".mid.attn_1.v."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\."), ".mid.attn_1.proj_out."),
    (re.compile(r"\.mid_block\.resnets\.0\."), ".mid.block_1."),
    (re.compile(r"\.mid_block\.resnets\.1\."), ".mid.block_2."),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
)
_UP = re.compile(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.")


def native_vae_key(key: str, levels: int) -> str:
    """The native name of an AutoencoderKL parameter; `levels` is the number of the VAE's resolutions.

    A name that no rule matches comes back unchanged. Core's own map works for four levels only.
    """

    def up(match: re.Match[str]) -> str:
        level = levels - 1 - int(match[1])  # diffusers counts the decoder from the small end
        return f"decoder.up.{level}." + ("upsample." if match[2] is None else f"block.{match[2]}.")

    key = _UP.sub(up, key)
    for pattern, replacement in _VAE_RULES:
        key = pattern.sub(replacement, key)
    return key


def vae_levels(state: Mapping[str, object]) -> int:
    """Number of resolutions of the native VAE with the parameter names in `state`; 0 if it is not an AutoencoderKL."""
    found = [re.match(r"encoder\.down\.(\d+)\.block\.", key) for key in state]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def native_layout(model: Model, vae: Vae) -> Layout:
    """Shapes of the layers that a foreign generator may change, of a MODEL and its VAE, by their diffusers names.

    Those of Stable Diffusion that the two have; of a VAE of another kind, the published ones.
    """
    names, keys = published_layout("sd21"), native_unet_keys(model.model.model_config.unet_config)
    unet, encoder = model.model_state_dict(), vae.patcher.model_state_dict()
    levels = vae_levels(encoder)
    native = {
        "unet": {name: unet.get(f"diffusion_model.{keys.get(name, name)}") for name in names["unet"]},
        "vae": {name: encoder.get(native_vae_key(name, levels)) for name in names["vae"]},
    }
    layout: dict[str, Shapes] = {
        part: {name: tuple(tensor.shape) for name, tensor in found.items() if tensor is not None}
        for part, found in native.items()
    }
    return layout if levels else {**layout, "vae": names["vae"]}


def native_unet_keys(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """The native name of every UNet parameter by its diffusers name; more than any one network has."""
    return comfy.utils.unet_to_diffusers(dict(unet_config))
