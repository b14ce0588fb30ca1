"""The arms of the collapse experiment (`collapse`), from no condition to the picture itself, and its size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from ...errors import IcmsrError
from ..networks.conditioning import StructureConfig


@dataclass(frozen=True)
class CollapseArm:
    """One arm of the experiment."""

    name: str
    """What tables and plots call it."""
    structure: StructureConfig
    """What teacher and auxiliary see."""
    source: str = "truth"
    """Of the truth, or of the generator's own input."""


COLLAPSE_ARMS = (
    CollapseArm("none", StructureConfig("none")),
    CollapseArm("colormap 1", StructureConfig("colormap", cells=1)),
    CollapseArm("colormap 4", StructureConfig("colormap", cells=4)),
    CollapseArm("colormap 8", StructureConfig("colormap", cells=8)),
    CollapseArm("edges", StructureConfig("edges")),
    CollapseArm("icm", StructureConfig("icm", cells=8)),
    CollapseArm("colormap 16", StructureConfig("colormap", cells=16)),
    CollapseArm("colormap 32", StructureConfig("colormap", cells=32)),
    CollapseArm("colormap 64", StructureConfig("colormap", cells=64)),
    CollapseArm("image", StructureConfig("image")),
    CollapseArm("image of input", StructureConfig("image"), "input"),
)
"""From nothing to everything. "image of input" determines the generator's latent, as the lemma has it."""


@dataclass(frozen=True)
class CollapseConfig:
    """Size of the experiment."""

    crop: int = 64
    """Side of the crops in pixels."""
    crops: int = 8_000
    """Training crops."""
    held_out_crops: int = 256
    """Crops of the diagnostics, of photographs that training never sees."""
    unet_channels: tuple[int, ...] = (32, 64)
    """Width of the small UNet's levels."""
    batch: int = 16
    """Crops per step."""
    prior_steps: int = 4000
    """Steps of the teacher."""
    generator_steps: int = 1000
    """Steps of the generator before it is frozen."""
    adapter_steps: int = 1200
    """Steps of each adapter."""
    auxiliary_steps: int = 700
    """Steps of each auxiliary on the frozen generator."""
    joint_steps: int = 100
    """Steps of generator and auxiliary together."""
    icm_weight: float = 1.0
    """Weight of ICM, next to an L2 of weight 1, in joint training."""
    learning_rate: float = 1e-3
    """Peak learning rate; adapters have twice this, joint training a tenth."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the auxiliary's and of joint training: their samples and noise."""
    conditions: tuple[str, ...] = field(default_factory=lambda: tuple(arm.name for arm in COLLAPSE_ARMS))
    """Arms to run, by name."""

    def __post_init__(self) -> None:
        known = [arm.name for arm in COLLAPSE_ARMS]
        unknown = [name for name in self.conditions if name not in known]
        if unknown or not self.conditions:
            raise IcmsrError(f"collapse.conditions must be among {', '.join(known)}, got {list(self.conditions)}")
        for name in (
            "crops",
            "held_out_crops",
            "batch",
            "prior_steps",
            "generator_steps",
            "adapter_steps",
            "auxiliary_steps",
            "joint_steps",
        ):
            if getattr(self, name) < 1:
                raise IcmsrError(f"collapse.{name} must be at least 1, got {getattr(self, name)}")
        if not self.seeds:
            raise IcmsrError("collapse.seeds is empty: name one or more")


def adapter_stem(structure: StructureConfig) -> str:
    """Name, without extension, of an adapter's file in a run's folder ``adapters``: what it was trained for."""
    return "_".join(re.findall("[a-z0-9]+", json.dumps(structure.describe(), sort_keys=True)))
