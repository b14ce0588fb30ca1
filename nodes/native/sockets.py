"""Conversion between IMAGE ([B, H, W, C] in [0, 1]) and the pictures of icmsr_core ([N, C, H, W]), both ways."""

from __future__ import annotations

import comfy.model_management
from einops import rearrange
from torch import Tensor

from ...icmsr_core.pictures.channels import as_rgb


def to_pictures(image: Tensor) -> Tensor:
    """RGB pictures [N, 3, H, W], float32, of an IMAGE. Alpha is dropped, and grey becomes three equal channels."""
    return as_rgb(rearrange(image, "n h w c -> n c h w")).float()


def to_image(pictures: Tensor) -> Tensor:
    """An IMAGE [N, H, W, C], float32, clamped to [0, 1], on the device where core keeps outputs (usually the CPU)."""
    image = rearrange(pictures.float().clamp(0, 1), "n c h w -> n h w c")
    return image.contiguous().to(comfy.model_management.intermediate_device())
