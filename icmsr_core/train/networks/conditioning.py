"""What teacher and auxiliary are conditioned on, chosen by one key.

``icm`` (colormap and edges, the paper's), ``colormap``, ``edges``, ``image`` (the raw picture, which collapses the
regulariser: Lemma 1), ``none``, ``text``, or any registered structures joined with ``+``: ``colormap+sketch``. All but
the last two go through T2I-Adapters; the loop knows nothing of which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from torch import Tensor, nn

from ...conditions import extract, register_structure, structure
from ...errors import IcmsrError
from ...pictures.channels import as_rgb
from ...pictures.ranges import bytes_to_unit
from ...upscale.sizes import resize
from .adapters import check_adapter, load_adapter

SOURCES = ("truth", "input")
WITHOUT_ADAPTER = ("none", "text")
_KINDS = {"icm": ("colormap", "edges"), "none": (), "text": ()}


@register_structure("image", 3, "the picture itself: dense, for the collapse ablation")
def raw_image(image: Tensor) -> Tensor:
    """The picture as its own condition, [N, 3, H, W] in [0, 1]."""
    return image.detach().float().clamp(0, 1)


def structures_of(kind: str) -> tuple[str, ...]:
    """The structures that a condition is made of. Raises `IcmsrError` for an unknown one."""
    names = _KINDS.get(kind, tuple(kind.split("+")))
    for name in names:
        structure(name)
    return names


@dataclass(frozen=True)
class StructureConfig:
    """Which structure of a picture makes the condition."""

    kind: str = "icm"
    """icm, colormap, edges, image, none, text, or registered structures joined with +."""
    cells: int = 8
    """Cells along each side of the colormap, 1 to 64: from sparse to dense."""
    canny_low: float = 100.0
    """Lower threshold of the Canny edges."""
    canny_high: float = 200.0
    """Upper threshold of the Canny edges."""

    def __post_init__(self) -> None:
        structures_of(self.kind)
        if not 1 <= self.cells <= 64:
            raise IcmsrError(f"condition cells must be between 1 and 64, got {self.cells}: the paper has 8")
        if not 0 <= self.canny_low <= self.canny_high <= 2040:
            raise IcmsrError(
                f"canny thresholds must be 0 <= low <= high <= 2040, got {self.canny_low} and {self.canny_high}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The structures, in the order of their channels."""
        return structures_of(self.kind)

    @property
    def channels(self) -> int:
        """Channels of the maps side by side."""
        return sum(self.widths)

    @property
    def widths(self) -> list[int]:
        """Channels of each structure's map."""
        return [structure(name).channels for name in self.names]

    def describe(self) -> dict[str, object]:
        """What an adapter's file says it was trained for."""
        values: dict[str, object] = {"names": list(self.names)}
        if "colormap" in self.names:
            values["cells"] = self.cells
        if "edges" in self.names:
            values["canny"] = [self.canny_low, self.canny_high]
        return values

    def maps(self, image: Tensor) -> Tensor:
        """The condition [N, channels, H, W] in [0, 1] of pictures [N, 3, H, W] in [0, 1]."""
        options: dict[str, Mapping[str, Any]] = {
            "colormap": {"cells": (self.cells, self.cells)},
            "edges": {"low": self.canny_low, "high": self.canny_high},
        }
        return extract(image, self.names, {name: options[name] for name in self.names if name in options})

    def shown(self, maps: Tensor) -> list[Tensor]:
        """`maps`, structure by structure, as pictures [N, 3, H, W]: three channels, or the first one in grey."""
        parts = maps.split(self.widths, dim=1)
        return [as_rgb(part) for part in parts]


@dataclass(frozen=True)
class ConditionConfig(StructureConfig):
    """The regulariser's condition and where its features come from."""

    adapters: tuple[str, ...] = ()
    """T2I-Adapters: one for all channels, or one for each structure. A diffusers folder or a .safetensors file each."""
    adapter_weights: tuple[float, ...] = ()
    """Weight of each adapter's features; they are summed. Empty: 1 each."""
    source: str = "truth"
    """Whose structure: truth (the paper), or input (the degraded picture)."""
    guidance: float = 1.0
    """Teacher's guidance over the condition; 1 is none. The unconditional half has no features, or negative_prompt."""
    prompt: str = ""
    """For text: the prompt of pictures without a caption."""
    negative_prompt: str = ""
    """For text with guidance: the prompt of the unconditional half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in SOURCES:
            raise IcmsrError(f"condition source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        weights = self.adapter_weights
        if weights and len(weights) != len(self.adapters):
            raise IcmsrError(f"adapter_weights needs one weight per adapter ({len(self.adapters)}), got {len(weights)}")
        if self.guidance != 1 and self.kind == "none":
            raise IcmsrError(f"guidance must be 1 with the condition none, got {self.guidance}")
        if self.kind in WITHOUT_ADAPTER and self.adapters:
            raise IcmsrError(f"the condition {self.kind} takes no adapters, got {list(self.adapters)}")

    def adapter_channels(self) -> list[int]:
        """The channels that each adapter has to take."""
        if len(self.adapters) == 1:
            return [self.channels]
        return self.widths

    def check_files(self, factor: int, widths: Sequence[int]) -> None:
        """Raises `IcmsrError` unless every adapter is there and fits; reads no weights."""
        if self.names and len(self.adapters) not in {1, len(self.names)}:
            several = f", or {len(self.names)}: one each for {', '.join(self.names)}" if len(self.names) > 1 else ""
            raise IcmsrError(
                f"the condition {self.kind} needs 1 adapter for its {self.channels} channels{several}; got "
                f"{len(self.adapters)}: train one with train/adapter.py and name it in condition.adapters"
            )
        structure = self.describe() if len(self.adapters) == 1 else None
        for path, channels in zip(self.adapters, self.adapter_channels()):
            check_adapter(Path(path), channels, factor, widths, structure)


class StructureFeatures(nn.Module):
    """Frozen T2I-Adapters, from condition maps to residual features of the UNet."""

    def __init__(self, adapters: Sequence[T2IAdapter], channels: Sequence[int], weights: Sequence[float]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.channels, self.weights = list(channels), list(weights)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: ConditionConfig, factor: int, widths: Sequence[int]) -> StructureFeatures:
        """The adapters that `config` names."""
        config.check_files(factor, widths)
        channels = config.adapter_channels()
        weights = config.adapter_weights or (1.0,) * len(config.adapters)
        return cls([load_adapter(Path(path), factor) for path in config.adapters], channels, weights)

    @torch.no_grad()
    def forward(self, maps: Tensor) -> list[Tensor]:
        """Residual features, one [N, C, h, w] per level, summed over the adapters with their weights."""
        total: list[Tensor] = []
        for adapter, weight, part in zip(self.adapters, self.weights, maps.split(self.channels, dim=1)):
            features = [weight * level for level in adapter(part.to(adapter.dtype))]
            total = [a + b for a, b in zip(total, features)] if total else features
        return total


@dataclass(frozen=True)
class Contexts:
    """Embedded prompts, which cross-attention sees; each [tokens, width]."""

    constant: Tensor
    """The generator's own, and everybody's where the condition is not text."""
    captions: Tensor | None = None
    """For text: [P, tokens, width], by the batch's caption numbers."""
    negative: Tensor | None = None
    """For text with guidance: the unconditional half's."""


@dataclass(frozen=True)
class GeneratorConditioning:
    """What the networks of a distillation see besides latents."""

    config: ConditionConfig
    """What teacher and auxiliary are conditioned on."""
    contexts: Contexts
    """Prompts, embedded."""
    features: StructureFeatures | None = None
    """From condition maps to features; None where the condition has no adapter, or where there is no regulariser."""


def picture_of(batch: Mapping[str, Tensor], source: str) -> Tensor:
    """The picture [N, 3, H, W] in [0, 1] that the structure is taken from: the truth, or the resized input."""
    if source == "truth":
        return bytes_to_unit(batch["sharp"])
    return resize(bytes_to_unit(batch["low"]), *batch["sharp"].shape[-2:])
