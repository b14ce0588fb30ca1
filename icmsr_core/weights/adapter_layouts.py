"""Reads T2I-Adapters (arXiv 2302.08453) of every public layout, and gives their tensors TencentARC's names.

    TencentARC full     conv_in, body.<block>.{in_conv, block1, block2}
    diffusers full      adapter.conv_in, adapter.body.<level>.{in_conv, resnets.<block>.{block1, block2}}
    TencentARC light    body.<level>.{in_conv, body.<block>.{block1, block2}, out_conv}
    diffusers light     adapter.body.<level>.{in_conv, resnets.<block>.{block1, block2}, out_conv}

An adapter folds `factor` x `factor` pixels into the channels of its first layer, so the width of that layer does not
tell how many channels the picture has. Our own files state it in their metadata, a diffusers folder in the config.json
next to the weights; for all others see `_split_channels`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import IcmsrError
from .descriptions import own_description, read_description
from .diffusers_folder import CONFIG_FILE, WEIGHTS_STEM
from .file_kinds import AGAIN
from .pickles import read_pickle
from .tensor_files import check_finite, first_names, read_tensors

ADAPTER_EXTENSIONS = (".safetensors", ".bin", ".pth", ".pt")
"""Endings of the files that `read_adapter` reads; all but the first are pickles, read as plain tensors."""
XL_ADAPTER = "full_adapter_xl"
KNOWN_CHANNELS = (1, 3, 4)
"""Channels that a hint can have: 1 (edges), 3 (a colour picture), 4 (ICM-SR's colormap and edges)."""
KNOWN_FACTORS = (8, 4)
"""Pixels along each side of a latent cell, the usual one first."""
BLOCKS_PER_LEVEL = 2
"""Residual blocks at each level of TencentARC's full adapters; their names do not state it."""
_FULL = re.compile(r"^body\.(\d+)\.resnets\.(\d+)\.(.+)$")
_FULL_IN = re.compile(r"^body\.(\d+)\.in_conv\.")
_LIGHT_BODY = re.compile(r"^body\.(\d+)\.(?:resnets|body)\.(\d+)\.")


@dataclass(frozen=True)
class AdapterLayout:
    """The architecture of an adapter, from its tensors and its description."""

    light: bool
    """Whether it is a ``light_adapter``; otherwise a ``full_adapter``."""
    channels_in: int
    """Channels of the hint."""
    factor: int
    """Pixels along each side that are folded into one cell: the latent factor of the adapter's base."""
    widths: tuple[int, ...]
    """Channels of the features, level by level."""
    blocks: int
    """Residual blocks at each level."""
    kernel: int
    """Side of the second convolution of a full adapter's block: 1 in all published ones."""
    convolved: bool
    """Whether a full adapter shrinks its features by convolution from level to level; otherwise by averaging."""


def read_adapter(path: Path) -> tuple[AdapterLayout, dict[str, Tensor]]:
    """The adapter in the file at `path`, and its tensors in float32 under TencentARC's names.

    For a diffusers folder, `path` is the weights file in it; the config.json next to it is read as well. A pickle is
    read as plain tensors, no code in it is run. Raises `IcmsrError` for a missing, damaged or foreign file, values that
    are not finite, an adapter for SDXL, and a description that contradicts the tensors.
    """
    tensors, description = _read(path)
    check_finite(path, tensors, AGAIN)
    tensors = {key.removeprefix("adapter."): value for key, value in tensors.items()}
    if "conv_in.weight" in tensors:
        full, blocks = _full_names(tensors)
        if "body.0.block1.weight" in full:
            return _full_layout(path, full, blocks, description), full
    if {"body.0.in_conv.weight", "body.0.out_conv.weight"} <= tensors.keys():
        light = {_LIGHT_BODY.sub(r"body.\1.body.\2.", key): value for key, value in tensors.items()}
        return _light_layout(path, light, description), light
    raise IcmsrError(
        f"{path}: not a T2I-Adapter, full or light: found {first_names(sorted(tensors))}: choose another file"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors in float32 under the file's own names, and the description in the file or its folder (may be empty)."""
    if path.suffix not in ADAPTER_EXTENSIONS:
        raise IcmsrError(f"{path}: an adapter file must end in one of {', '.join(ADAPTER_EXTENSIONS)}")
    if path.suffix == ADAPTER_EXTENSIONS[0]:
        values: dict[str, Any]
        values, metadata = read_tensors(path)
        description = own_description(path, metadata).get("config")
    else:
        values, description = read_pickle(path), None
        values = values["adapter"] if isinstance(values.get("adapter"), dict) else values
    wrong = [
        str(key)
        for key, value in values.items()
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_sparse
    ]
    if wrong:
        raise IcmsrError(f"{path}: an adapter must hold float tensors only, these are not: {first_names(wrong)}")
    if description is None and path.name.split(".")[0] == WEIGHTS_STEM:
        config = path.parent / CONFIG_FILE
        description = read_description(config) if config.is_file() else None
    if description is not None and not isinstance(description, dict):
        raise IcmsrError(f"{path}: its description must be a JSON object, got {type(description).__name__}")
    return {str(key): value.detach().float() for key, value in values.items()}, description or {}


def _full_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """`tensors` of a full adapter with blocks numbered across all levels, and the number of blocks per level."""
    found = [match for match in map(_FULL.match, tensors) if match]
    if not found:
        return dict(tensors), BLOCKS_PER_LEVEL
    depth = 1 + max(int(match[2]) for match in found)

    def native(key: str) -> str:
        key = _FULL.sub(lambda match: f"body.{int(match[1]) * depth + int(match[2])}.{match[3]}", key)
        return _FULL_IN.sub(lambda match: f"body.{int(match[1]) * depth}.in_conv.", key)

    return {native(key): value for key, value in tensors.items()}, depth


def _full_layout(
    path: Path, tensors: Mapping[str, Tensor], blocks: int, description: Mapping[str, Any]
) -> AdapterLayout:
    first, second = tensors["conv_in.weight"], tensors.get("body.0.block2.weight")
    widths: list[int] = []
    while (weight := tensors.get(f"body.{len(widths) * blocks}.block1.weight")) is not None:
        widths.append(weight.shape[0])
    if first.ndim != 4 or second is None or second.ndim != 4:
        raise IcmsrError(f"{path}: damaged adapter: conv_in and body.0.block2 must be convolutions")
    channels, factor = _split_channels(path, first.shape[1], description)
    convolved = any(key.endswith("down_opt.op.weight") for key in tensors)
    return AdapterLayout(False, channels, factor, tuple(widths), blocks, second.shape[2], convolved)


def _light_layout(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> AdapterLayout:
    first = tensors["body.0.in_conv.weight"]
    widths: list[int] = []
    while (weight := tensors.get(f"body.{len(widths)}.out_conv.weight")) is not None:
        widths.append(weight.shape[0])
    blocks = [int(match[2]) for match in map(_LIGHT_BODY.match, tensors) if match]
    if first.ndim != 4 or not blocks:
        raise IcmsrError(f"{path}: damaged adapter: body.0 must be convolutions and residual blocks")
    channels, factor = _split_channels(path, first.shape[1], description)
    return AdapterLayout(True, channels, factor, tuple(widths), 1 + max(blocks), 3, False)


def _split_channels(path: Path, unshuffled: int, description: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the hint and the factor, for an adapter whose first layer takes `unshuffled` channels.

    Without a description, the usual factor is tried first: 64 means 1 channel at factor 8 rather than 4 at factor 4,
    and 256 means 4 channels at factor 8 rather than SDXL's 1 at 16.
    """
    if description.get("adapter_type") == XL_ADAPTER:
        raise _for_xl(path)
    if "downscale_factor" in description:
        channels, factor = description.get("in_channels"), description["downscale_factor"]
        if not isinstance(factor, int) or factor < 1 or channels != unshuffled / factor**2:
            raise IcmsrError(
                f"{path}: damaged adapter: its description says {channels!r} channels at a downscale factor of "
                f"{factor!r}, its first layer takes {unshuffled}"
            )
        return int(channels), factor
    for factor in KNOWN_FACTORS:
        if unshuffled % factor**2 == 0 and unshuffled // factor**2 in KNOWN_CHANNELS:
            return unshuffled // factor**2, factor
    if unshuffled == 3 * 16**2:
        raise _for_xl(path)
    known = sorted({channels * factor**2 for channels in KNOWN_CHANNELS for factor in KNOWN_FACTORS})
    raise IcmsrError(
        f"{path}: the first layer takes {unshuffled} channels, known are {', '.join(map(str, known))}: name the file "
        f"{WEIGHTS_STEM}.safetensors and put the {CONFIG_FILE} of its diffusers folder next to it"
    )


def _for_xl(path: Path) -> IcmsrError:
    return IcmsrError(
        f"{path}: an adapter for SDXL, but ICM-SR runs on Stable Diffusion 1.5, 2.1 and nano: choose one for these"
    )
