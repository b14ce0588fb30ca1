"""T2I-Adapters of ICM-SR as core's CONTROL_NET, and their features tile by tile."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.controlnet
import comfy.t2i_adapter.adapter
import torch
from torch import Tensor

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.generator_file import read_tensors
from ..icmsr_core.one_step import pad_to_multiple
from ..icmsr_core.tiling import Box

HINT_CHANNELS = 4
UNSHUFFLE = 8
"""Pixels per cell of the adapter's first layer: the latent factor of every family."""
_RESNET = re.compile(r"^body\.(\d+)\.resnets\.(\d+)\.")
_IN_CONV = re.compile(r"^body\.(\d+)\.in_conv\.")


def load_adapter(path: Path) -> comfy.controlnet.T2IAdapter:
    """The CONTROL_NET in `path`, a diffusers T2IAdapter ("full_adapter") for the 4-channel condition.

    Core's own loader takes 4 x 64 channels for an SDXL adapter with one channel, without a word; hence this one.
    Raises `IcmsrError` when the file is damaged or holds something else.
    """
    tensors = read_tensors(path)[0]
    bad = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise IcmsrError(f"{path}: NaN or infinite values in {', '.join(bad[:4])}")
    tensors = {key.removeprefix("adapter."): value for key, value in tensors.items()}
    first = tensors.get("conv_in.weight")
    if first is None or "body.0.resnets.0.block1.weight" not in tensors:
        raise IcmsrError(f"{path}: not an adapter of ICM-SR: its tensors are not those of a diffusers full_adapter")
    wanted = HINT_CHANNELS * UNSHUFFLE**2
    if first.shape[1] != wanted:
        raise IcmsrError(
            f"{path}: the adapter takes {first.shape[1]} unshuffled channels, ICM-SR's take {wanted} "
            f"({HINT_CHANNELS} x {UNSHUFFLE} x {UNSHUFFLE}): ordinary adapters go through core's Load ControlNet Model"
        )
    blocks = [_RESNET.match(key) for key in tensors]
    levels = 1 + max(int(match[1]) for match in blocks if match)
    depth = 1 + max(int(match[2]) for match in blocks if match)
    channels = [tensors[f"body.{level}.resnets.0.block1.weight"].shape[0] for level in range(levels)]
    adapter = comfy.t2i_adapter.adapter.Adapter(
        cin=wanted,
        channels=channels,
        nums_rb=depth,
        ksize=tensors["body.0.resnets.0.block2.weight"].shape[2],
        sk=True,
        use_conv=False,
        xl=False,
    )
    try:
        adapter.load_state_dict({_native_key(key, depth): value for key, value in tensors.items()})
    except RuntimeError as error:
        raise IcmsrError(f"{path}: damaged adapter: {' '.join(str(error).split())}") from error
    return comfy.controlnet.T2IAdapter(
        adapter, channels_in=HINT_CHANNELS, compression_ratio=UNSHUFFLE, upscale_algorithm="nearest-exact"
    )


def _native_key(key: str, depth: int) -> str:
    key = _RESNET.sub(lambda match: f"body.{int(match[1]) * depth + int(match[2])}.", key)
    return _IN_CONV.sub(lambda match: f"body.{int(match[1]) * depth}.in_conv.", key)


def check_hint(control_net, hint: Tensor, pictures: int) -> None:
    """Raises `IcmsrError` unless `hint` [B, H, W, C] suits the CONTROL_NET and a batch of `pictures` images."""
    if not isinstance(control_net, comfy.controlnet.T2IAdapter):
        raise IcmsrError(
            f"control_net must be a T2I-Adapter (from ICM-SR Load Adapter), got a {type(control_net).__name__}"
        )
    if hint.shape[0] not in (1, pictures):
        raise IcmsrError(f"hint must hold 1 picture or as many as image ({pictures}), got {hint.shape[0]}")
    if hint.shape[-1] != control_net.channels_in:
        raise IcmsrError(
            f"hint has {hint.shape[-1]} channels, this control_net takes {control_net.channels_in}: "
            "connect the hint output of ICM-SR Extract Condition to an adapter of ICM-SR"
        )


class AdapterFeatures:
    """`TileFeatures` of one hint: it is laid over the whole result and cropped to each tile."""

    def __init__(
        self,
        control_net: comfy.controlnet.T2IAdapter,
        hint: Tensor,
        size: tuple[int, int],
        multiple: int,
        *,
        strength: float,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        """`hint` [1, C, H, W] in [0, 1]; `size` (height, width) of the result, which is padded to `multiple`.

        `dtype` is what the adapter runs in. With `keep` the features of a tile are computed once, for a batch of
        pictures that share the hint.
        """
        # Nearest, as core resizes hints: edges stay 0 or 1.
        resized = torch.nn.functional.interpolate(hint.float(), size, mode="nearest-exact")
        self._hint = pad_to_multiple(resized, multiple)
        self._control_net, self._strength, self._dtype = control_net, strength, dtype
        self._kept: dict[Box, list[Tensor]] | None = {} if keep else None

    def __call__(self, boxes: Sequence[Box]) -> list[Tensor]:
        """See `TileFeatures`."""
        kept = self._kept
        if kept is None:
            return self._compute(boxes)
        if any(box not in kept for box in boxes):
            features = self._compute(boxes)
            for index, box in enumerate(boxes):
                kept[box] = [level[index : index + 1].cpu() for level in features]
        return [torch.cat(level) for level in zip(*(kept[box] for box in boxes))]

    def _compute(self, boxes: Sequence[Box]) -> list[Tensor]:
        ratio = self._control_net.compression_ratio
        tiles = []
        for box in boxes:
            rows, columns = box.slices(ratio)
            tiles.append(self._hint[:, :, rows, columns])
        crops = torch.cat(tiles)
        # A fresh copy for every batch: core keeps the features of a hint until the size changes, not the hint.
        control = self._control_net.copy().set_cond_hint(crops, self._strength)
        cells = (crops.shape[0], 1, crops.shape[2] // ratio, crops.shape[3] // ratio)
        # Of the latent and the timestep an adapter looks at shape and dtype only.
        residuals: Mapping[str, list] = control.get_control(torch.zeros(cells, dtype=self._dtype), None, None, 1, {})
        return [level for level in reversed(residuals["input"]) if level is not None]
