"""An adapter and its hint at a node: their inputs, whether they and the MODEL go together, the features of a tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.controlnet
import torch
from comfy_api.latest import io
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.upscale.sizes import pad_to_multiple
from ...icmsr_core.upscale.tiling import Box
from .adapters import HintNetwork, wrong_channels


def condition_inputs() -> list[io.Input]:
    """The optional inputs ``control_net`` and ``hint``, which `check_hint` judges."""
    return [
        io.ControlNet.Input(
            "control_net",
            optional=True,
            tooltip="Optional: an adapter from ICM-SR Load Adapter, with its hint.",
        ),
        io.Image.Input(
            "hint",
            optional=True,
            tooltip="For control_net: the hint of ICM-SR Extract Condition, one picture or one for each image.",
        ),
    ]


def check_hint(control_net, hint: Tensor | None, pictures: int) -> None:
    """Raises `IcmsrError` unless `hint` [B, H, W, C] suits the CONTROL_NET and a batch of `pictures` images.

    Both may be None, but not one alone.
    """
    if (control_net is None) != (hint is None):
        given, missing = ("hint", "control_net") if control_net is None else ("control_net", "hint")
        raise IcmsrError(f"{given} is connected without {missing}: connect both or neither")
    if hint is None:
        return
    if not isinstance(control_net, comfy.controlnet.T2IAdapter) or not _levels(control_net):
        raise IcmsrError(
            f"control_net must be a T2I-Adapter (from ICM-SR Load Adapter), got a {type(control_net).__name__}"
        )
    if hint.shape[0] not in (1, pictures):
        raise IcmsrError(f"hint must hold 1 picture or as many as image ({pictures}), got {hint.shape[0]}")
    network, channels = control_net.t2i_model, hint.shape[-1]
    if isinstance(network, HintNetwork):
        accepted = network.accepts()
    else:  # of core's loader, which averages the channels for an adapter of one
        accepted = (channels,) if control_net.channels_in == 1 else (control_net.channels_in,)
    if channels not in accepted:
        raise wrong_channels(channels, accepted)


def _levels(control_net: comfy.controlnet.T2IAdapter) -> int:
    """Levels of features; 0 for the networks of other kinds that core wraps in the same class."""
    return len(getattr(control_net.t2i_model, "channels", ()))


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

        `multiple` is the MODEL's: its latent factor times the UNet's downsampling. `dtype` is what the adapter runs in.
        With `keep` the features of a tile are computed once, for a batch of pictures that share the hint. Raises
        `IcmsrError` for an adapter of another latent factor or another number of levels than the MODEL's.
        """
        factor, levels = control_net.compression_ratio, _levels(control_net)
        own = factor * 2 ** (levels - 1)
        if own != multiple:
            raise IcmsrError(
                f"the control_net folds {factor} x {factor} pixels into a cell and has {levels} levels, for pictures "
                f"in multiples of {own}; this MODEL takes multiples of {multiple}: choose an adapter of its family"
            )
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
