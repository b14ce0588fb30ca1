"""The condition of a node: a T2I-Adapter, the hint that it sees and its strength, and the features of each tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import comfy.controlnet
import torch
from comfy_api.latest import io
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.upscale.framing import Framing
from ...icmsr_core.upscale.sizes import cut, pad_to_multiple
from ...icmsr_core.upscale.tiling import Box
from .adapters import HintNetwork, wrong_channels
from .backbone import ComfyBackbone
from .sockets import check_image, check_values


def condition_inputs(remark: str = "") -> list[io.Input]:
    """The optional inputs ``control_net`` and ``hint`` of a node; `Condition.connected` takes their values.

    `remark` ends the tooltip of ``control_net``.
    """
    return [
        io.ControlNet.Input(
            "control_net",
            optional=True,
            tooltip=" ".join(filter(None, ("Optional: an adapter from ICM-SR Load Adapter, with its hint.", remark))),
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
    _placed: dict[torch.dtype, PlacedAdapter] = field(default_factory=dict, init=False, repr=False)

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
        check_image("hint", hint)
        check_values("hint", hint)
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

    def features(self, index: int, frame: Framing, backbone: ComfyBackbone) -> AdapterFeatures:
        """The features of picture number `index`, of which `frame` says which part is worked, and in which size.

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
        resized = torch.nn.functional.interpolate(
            cut(self.hint_of(index), frame).float(), frame.work, mode="nearest-exact"
        )
        keep = self.shared and self.pictures > 1
        adapter = self._placed.get(backbone.dtype)
        if adapter is None:
            adapter = self._placed[backbone.dtype] = PlacedAdapter(self.control_net, self.strength, backbone.dtype)
        return AdapterFeatures(adapter, pad_to_multiple(resized, multiple), keep)


def _levels(control_net: comfy.controlnet.T2IAdapter) -> int:
    """Number of levels of features; 0 for other kinds of network that core wraps in the same class."""
    return len(getattr(control_net.t2i_model, "channels", ()))


class PlacedAdapter:
    """An adapter's network on core's device, in one precision, as long as a run needs it.

    Core's own `get_control` moves the network to the device and back for each batch of tiles.
    """

    def __init__(self, control_net: comfy.controlnet.T2IAdapter, strength: float, dtype: torch.dtype) -> None:
        self._network, self._device, self._dtype = control_net.t2i_model, control_net.device, dtype
        self._averages = control_net.channels_in == 1  # core then takes the mean of the hint's channels
        self._merging = control_net.copy().set_cond_hint(None, strength)
        self._weights = {key: value.to(self._device, dtype) for key, value in self._network.state_dict().items()}
        self.ratio: int = control_net.compression_ratio
        """Pixels of the hint for each latent cell, along each axis."""

    def features(self, hint: Tensor) -> list[Tensor]:
        """The features of `hint` [N, C, H, W] in [0, 1], one tensor per level of the UNet, times the strength."""
        hint = hint.to(self._device)
        if self._averages:
            hint = hint.mean(1, keepdim=True)
        found: Mapping[str, list[Tensor | None]] = torch.func.functional_call(
            self._network, self._weights, (hint.to(self._dtype),)
        )
        merged = self._merging.control_merge({"input": found["input"]}, None, self._dtype)["input"]
        return [level for level in reversed(merged) if level is not None]


class AdapterFeatures:
    """`TileFeatures` of one hint, which covers the whole result and is cropped to each tile."""

    def __init__(self, adapter: PlacedAdapter, hint: Tensor, keep: bool) -> None:
        """`hint` [1, C, H, W] in [0, 1] has the padded size of the result.

        With `keep` the features of a tile are computed once and then held in main memory.
        """
        self._adapter, self._hint = adapter, hint
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
        tiles = [self._hint[(..., *box.slices(self._adapter.ratio))] for box in boxes]
        return self._adapter.features(torch.cat(tiles))
