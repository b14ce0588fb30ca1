"""Names and shapes of Stable Diffusion's layers, and their names in LoRA files.

They are computed here so that a foreign file can be checked without the base model and without diffusers; a test
compares them with diffusers' own networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..errors import IcmsrError
from ..weights.sd_families import SD_FAMILIES, SD_VAE_WIDTHS, SD_WIDTHS

Shapes = Mapping[str, tuple[int, ...]]
"""Shape by parameter name, diffusers' names."""
Layout = Mapping[str, Shapes]
"""The shapes of the two networks, ``unet`` and ``vae``."""

KOHYA_PREFIX = "lora_unet_"
"""Prefix of kohya's keys for the UNet; the module's name follows, with underscores for its dots."""


def published_layout(family: str) -> Layout:
    """The convolutions and linear layers of ``sd21`` or ``sd15``: the UNet, and the VAE from picture to latent.

    Raises `IcmsrError` for another family.
    """
    widths = {name: width for width, name in SD_FAMILIES.items()}
    if family not in widths:
        raise IcmsrError(f"family must be one of {', '.join(sorted(widths))}, got {family!r}")
    unet = unet_shapes(SD_WIDTHS, widths[family], linear_projection=family == "sd21")
    return {"unet": dict(unet), "vae": dict(vae_encoder_shapes(SD_VAE_WIDTHS))}


def unet_shapes(
    widths: tuple[int, ...], context: int, linear_projection: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight and bias of a UNet of `widths`, except norms; `context` is the width of the text.

    `linear_projection`: around the attention SD2 has linear layers where SD1 has convolutions of one pixel.
    """
    time, last = 4 * widths[0], len(widths) - 1
    yield from _layer("conv_in", widths[0], 4, 3, 3)
    yield from _layer("time_embedding.linear_1", time, widths[0])
    yield from _layer("time_embedding.linear_2", time, time)
    into = widths[0]
    for level, width in enumerate(widths):
        block = f"down_blocks.{level}"
        for number in range(2):
            yield from _resnet(f"{block}.resnets.{number}", width, into if number == 0 else width, time)
            if level < last:
                yield from _transformer(f"{block}.attentions.{number}", width, context, linear_projection)
        if level < last:
            yield from _layer(f"{block}.downsamplers.0.conv", width, width, 3, 3)
        into = width
    yield from _resnet("mid_block.resnets.0", into, into, time)
    yield from _transformer("mid_block.attentions.0", into, context, linear_projection)
    yield from _resnet("mid_block.resnets.1", into, into, time)
    upwards = widths[::-1]
    for level, width in enumerate(upwards):
        block, below = f"up_blocks.{level}", upwards[min(level + 1, last)]
        for number in range(3):
            skip = below if number == 2 else width
            yield from _resnet(f"{block}.resnets.{number}", width, (into if number == 0 else width) + skip, time)
            if level > 0:
                yield from _transformer(f"{block}.attentions.{number}", width, context, linear_projection)
        if level < last:
            yield from _layer(f"{block}.upsamplers.0.conv", width, width, 3, 3)
        into = width
    yield from _layer("conv_out", 4, into, 3, 3)


def vae_encoder_shapes(widths: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight and bias of a VAE from picture to latent, except norms."""
    yield from _layer("encoder.conv_in", widths[0], 3, 3, 3)
    into = widths[0]
    for level, width in enumerate(widths):
        for number in range(2):
            yield from _resnet(f"encoder.down_blocks.{level}.resnets.{number}", width, into if number == 0 else width)
        if level < len(widths) - 1:
            yield from _layer(f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width, 3, 3)
        into = width
    for number in range(2):
        yield from _resnet(f"encoder.mid_block.resnets.{number}", into, into)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _layer(f"encoder.mid_block.attentions.0.{name}", into, into)
    yield from _layer("encoder.conv_out", 8, into, 3, 3)
    yield from _layer("quant_conv", 8, 8, 1, 1)


def _layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _resnet(name: str, out: int, into: int, time: int | None = None) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _layer(f"{name}.conv1", out, into, 3, 3)
    if time is not None:
        yield from _layer(f"{name}.time_emb_proj", out, time)
    yield from _layer(f"{name}.conv2", out, out, 3, 3)
    if into != out:
        yield from _layer(f"{name}.conv_shortcut", out, into, 1, 1)


def _transformer(name: str, width: int, context: int, linear: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    pixel = () if linear else (1, 1)
    yield from _layer(f"{name}.proj_in", width, width, *pixel)
    block = f"{name}.transformer_blocks.0"
    for attention, source in (("attn1", width), ("attn2", context)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, source)
        yield f"{block}.{attention}.to_v.weight", (width, source)
        yield from _layer(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
    yield from _layer(f"{block}.ff.net.2", width, 4 * width)
    yield from _layer(f"{name}.proj_out", width, width, *pixel)


class LoraKey(NamedTuple):
    """The content of one key of a LoRA file."""

    module: str
    """Name of the module in diffusers."""
    role: str
    """``down``, ``up`` or ``alpha``."""


_ENDINGS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT, diffusers from 0.21
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",  # PEFT, the adapter's name left in
    ".lora_down.weight": "down", ".lora_up.weight": "up",  # kohya
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before 0.21
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # diffusers' attention processors
    ".alpha": "alpha",
}  # fmt: skip
_PREFIXES = ("unet.base_model.model.", "base_model.model.", "unet.")


def kohya_name(module: str) -> str:
    """Kohya's name for `module`."""
    return KOHYA_PREFIX + module.replace(".", "_")


def lora_keys(keys: Iterable[str], modules: Iterable[str]) -> tuple[dict[str, LoraKey], list[str]]:
    """The content of each of a LoRA file's `keys`, and the keys that belong to none of the network's `modules`.

    Knows the names of PEFT, diffusers and kohya. Kohya writes dots as underscores, so its names are looked up among
    those of the `modules`.
    """
    known = set(modules)
    underscored = {kohya_name(module): module for module in known}
    found: dict[str, LoraKey] = {}
    lost = []
    for key in keys:
        ending = next((entry for entry in _ENDINGS if key.endswith(entry)), None)
        name = key[: -len(ending)] if ending else key
        if name.startswith(KOHYA_PREFIX):
            module = underscored.get(name, "")
        else:
            prefix = next((entry for entry in _PREFIXES if name.startswith(entry)), "")
            module = re.sub(r"\.processor\.(to_[qkv]|to_out)$", r".\1", name[len(prefix) :])
            module = f"{module}.0" if module.endswith(".to_out") else module
        if ending is None or module not in known:
            lost.append(key)
        else:
            found[key] = LoraKey(module, _ENDINGS[ending])
    return found, lost
