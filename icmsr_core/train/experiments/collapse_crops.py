"""The crops of the collapse experiment (`collapse`): pictures and their latents, made once and kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...pictures.ranges import bytes_to_signed, bytes_to_unit, unit_to_signed
from ...runtime.diffusers_backbone import build_networks
from ...runtime.latents import encode_picture
from ...upscale.sizes import resize
from ...weights.base import open_base
from ...weights.embedded import embedded_base
from ...weights.tensor_files import read_tensors, write_tensors
from ..data.data_config import DataConfig
from ..data.pairs import TrainingPairs
from .collapse_config import CollapseArm, CollapseConfig


@dataclass(frozen=True)
class Crops:
    """Crops in memory: pictures uint8, and their latents."""

    sharp: Tensor
    low: Tensor
    truth: Tensor
    """Latent [N, C, h, w] of the truth."""
    given: Tensor
    """Latent of the resized input."""

    def __len__(self) -> int:
        return self.sharp.shape[0]

    def take(self, index: Tensor) -> Crops:
        """Those at `index`."""
        return Crops(self.sharp[index], self.low[index], self.truth[index], self.given[index])


def load_crops(config: CollapseConfig, data: DataConfig, file: Path) -> tuple[Crops, Crops]:
    """Training and held-out crops; made once, then read from `file`."""
    if not file.exists():
        base = open_base(embedded_base())
        vae = build_networks(base)[1]
        tensors: dict[str, Tensor] = {}
        for part, count in (("train", config.crops), ("held_out", config.held_out_crops)):
            pairs = TrainingPairs(data, 0, held_out=part == "held_out")
            samples = [pairs[index] for index in range(count)]
            sharp, low = (torch.stack([sample[name] for sample in samples]) for name in ("sharp", "low"))
            side = sharp.shape[-1]
            tensors |= {f"{part}/sharp": sharp, f"{part}/low": low}
            enlarged = (unit_to_signed(resize(bytes_to_unit(some), side, side)) for some in low.split(64))
            with torch.no_grad():
                truth = [encode_picture(vae, bytes_to_signed(some)) for some in sharp.split(64)]
                given = [encode_picture(vae, some) for some in enlarged]
            tensors |= {f"{part}/truth": torch.cat(truth), f"{part}/given": torch.cat(given)}
        write_tensors(file, tensors, {"format": "icmsr-crops"})
    found = read_tensors(file)[0]
    train, held_out = (
        Crops(*(found[f"{part}/{name}"] for name in ("sharp", "low", "truth", "given")))
        for part in ("train", "held_out")
    )
    return train, held_out


def condition_maps(arm: CollapseArm, crops: Crops) -> Tensor:
    """The condition [N, channels, H, W] of `crops`, from the truth or from the resized input."""
    if arm.source == "truth":
        return arm.structure.maps(bytes_to_unit(crops.sharp))
    return arm.structure.maps(resize(bytes_to_unit(crops.low), *crops.sharp.shape[-2:]))
