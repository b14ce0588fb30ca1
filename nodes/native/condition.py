"""The condition of a node: a T2I-Adapter, the hint that it sees and its strength, and the features of each tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.controlnet
import torch
from comfy_api.latest import io
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.upscale.sizes import pad_to_multiple
from ...icmsr_core.upscale.tiling import Box
from .adapters import HintNetwork, wrong_channels
from .backbone import ComfyBackbone


def condition_inputs() -> list[io.Input]:
    """The optional inputs ``control_net`` and ``hint`` of a node; `Condition.connected` takes their values."""
    return [
        io.ControlNet.Input(
            "control_net",
            optional=True,
            tooltip="Optional: an adapter from ICM-SR Load Adapter. Connect hint as well.",
        ),
        io.Image.Input(
            "hint",
            optional=True,
            tooltip=(
                "For control_net: the hint from ICM-SR Extract Condition, either one for all images or one for each."
            ),
        ),
    ]


@dataclass(frozen=True, eq=False)
class Condition:
    """What an adapter shows the UNet of a batch of pictures."""

    control_net: comfy.controlnet.T2IAdapter
    """The adapter."""
    hint: Tensor
    """IMAGE [B, H, W, C] in [0, 1]: one picture for the whole batch, or one for each picture of it."""
    strength: float
    """What the features are multiplied by."""
    pictures: int
    """Number of pictures in the batch."""

    @classmethod
    def connected(cls, control_net: object, hint: Tensor | None, strength: float, pictures: int) -> Condition | None:
        """The condition of a node's inputs for a batch of `pictures` images; None when neither input is connected.

        Raises `IcmsrError` when only one is connected, `control_net` is not a T2I-Adapter, or the hint [B, H, W, C] has
        another number of pictures or channels than it should.
        """
        if (control_net is None) != (hint is None):
            given, missing = ("hint", "control_net") if control_net is None else ("control_net", "hint")
            raise IcmsrError(f"{given} is connected but {missing} is not: connect both or neither")
        if hint is None:
            return None
        if not isinstance(control_net, comfy.controlnet.T2IAdapter) or not _levels(control_net):
            raise IcmsrError(
                f"control_net must be a T2I-Adapter, got a {type(control_net).__name__}: take it from ICM-SR Load "
                "Adapter"
            )
        if hint.shape[0] not in (1, pictures):
            raise IcmsrError(
                f"hint must hold 1 picture or as many as image ({pictures}), got {hint.shape[0]}: extract it from the "
                "same images"
            )
        network, channels = control_net.t2i_model, hint.shape[-1]
        if isinstance(network, HintNetwork):
            accepted = network.accepts()
        else:  # from core's loader, which averages the channels for an adapter of one
            accepted = (channels,) if control_net.channels_in == 1 else (control_net.channels_in,)
        if channels not in accepted:
            raise wrong_channels(channels, accepted)
        return cls(control_net, hint, strength, pictures)

    @property
    def shared(self) -> bool:
        """Whether one hint, and so one `features`, serves every picture."""
        return self.hint.shape[0] == 1

    def hint_of(self, index: int) -> Tensor:
        """The hint [1, C, H, W] of the picture number `index`."""
        return self.hint[0 if self.shared else index][None].movedim(-1, 1)

    def features(self, index: int, size: tuple[int, int], backbone: ComfyBackbone) -> AdapterFeatures:
        """The features of picture number `index`, whose result is `size` (height, width) pixels.

        Where pictures share a hint they are computed once for each tile. Raises `IcmsrError` for an adapter of another
        latent factor or another number of levels than the MODEL has.
        """
        multiple = backbone.descriptor.multiple_of
        factor, levels = self.control_net.compression_ratio, _levels(self.control_net)
        own = factor * 2 ** (levels - 1)
        if own != multiple:
            raise IcmsrError(
                f"this control_net is for another model (it works on {factor} x {factor} pixels with {levels} levels, "
                f"for sizes in multiples of {own}; this MODEL takes multiples of {multiple}): choose an adapter made "
                "for this MODEL"
            )
        # Nearest, as core resizes hints: edges stay 0 or 1.
        resized = torch.nn.functional.interpolate(self.hint_of(index).float(), size, mode="nearest-exact")
        keep = self.shared and self.pictures > 1
        return AdapterFeatures(self, pad_to_multiple(resized, multiple), backbone.dtype, keep)


def _levels(control_net: comfy.controlnet.T2IAdapter) -> int:
    """Number of levels of features; 0 for other kinds of network that core wraps in the same class."""
    return len(getattr(control_net.t2i_model, "channels", ()))


class AdapterFeatures:
    """`TileFeatures` of one hint, which covers the whole result and is cropped to each tile."""

    def __init__(self, condition: Condition, hint: Tensor, dtype: torch.dtype, keep: bool) -> None:
        """`hint` [1, C, H, W] in [0, 1] has the padded size of the result; `dtype` is what the adapter runs in.

        With `keep` the features of a tile are computed once and then held in main memory.
        """
        self._control_net, self._strength = condition.control_net, condition.strength
        self._hint, self._dtype = hint, dtype
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
        # A new copy for every batch: core would keep the features of the first hint until the size changes.
        control = self._control_net.copy().set_cond_hint(crops, self._strength)
        cells = (crops.shape[0], 1, crops.shape[2] // ratio, crops.shape[3] // ratio)
        # An adapter uses only the shape and the dtype of the latent, and nothing of the timestep.
        latent = torch.zeros(cells, dtype=self._dtype)
        residuals: Mapping[str, list[Tensor | None]] = control.get_control(latent, None, None, 1, {})
        return [level for level in reversed(residuals["input"]) if level is not None]
