"""DISTS: the distance of two pictures in structure and texture, from features of VGG16.

Ding et al. 2020, "Image Quality Assessment: Unifying Structure and Texture Similarity", as in the package
dists-pytorch, whose constructor always downloads VGG16. A file has the keys ``features.<n>.weight`` and ``.bias``
(`feature_networks`), and ``alpha`` and ``beta`` [1475]: the weight of each channel of the picture and of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import IcmsrError
from .feature_networks import VGG16
from .weight_files import DISTS, check_weights, read_weight_file

# ImageNet's mean and deviation, for pictures in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
CHANNELS = (3, *VGG16.widths())
STABILISER = 1e-6


class Dists(nn.Module):
    """DISTS of [N, 3, H, W] pictures in [-1, 1], the mean over the batch; frozen, in the precision of its weights.

    Autocast is switched off inside. The weights' precision is float32 as loaded; ``.double()`` works. With `bf16` the
    network's layers compute in bfloat16 all the same, the comparison in float32 (for losses, as in `Lpips`).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "DISTS weights", bf16: bool = False) -> None:
        """`tensors`: as the file holds them. Raises `IcmsrError`, which says `name`, if they do not fit."""
        super().__init__()
        check_weights(name, tensors, dists_shapes())
        self.bf16 = bf16
        self.features, self._compared = VGG16.layers(_L2Pooling)
        self.alpha = nn.Parameter(torch.empty(sum(CHANNELS), device="meta"))
        self.beta = nn.Parameter(torch.empty(sum(CHANNELS), device="meta"))
        self.register_buffer("mean", torch.tensor(MEAN, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, result: Tensor, truth: Tensor) -> Tensor:
        """The distance, a scalar; 0 for equal pictures. Gradients reach `result`; `truth` counts as constant.

        Raises `IcmsrError` for pictures of different or wrong shapes.
        """
        if result.shape != truth.shape or result.ndim != 4 or result.shape[1] != 3:
            raise IcmsrError(
                f"DISTS takes two batches [N, 3, H, W] of one shape, got {list(result.shape)} and {list(truth.shape)}"
            )
        total = self.alpha.sum() + self.beta.sum()
        weights = zip((self.alpha / total).split(CHANNELS), (self.beta / total).split(CHANNELS))
        with torch.autocast(result.device.type, enabled=False):
            left, right = (result.to(self.mean) + 1) / 2, (truth.detach().to(self.mean) + 1) / 2
            similarity = _similarity(left, right, *next(weights))
            left, right = (left - self.mean) / self.deviation, (right - self.mean) / self.deviation
            for index, layer in enumerate(self.features):
                with torch.autocast(result.device.type, torch.bfloat16, enabled=self.bf16):
                    left, right = layer(left), layer(right)
                if index in self._compared:
                    compared = left.to(self.mean), right.to(self.mean)
                    similarity = similarity + _similarity(*compared, *next(weights))
        return (1 - similarity).mean()


class _L2Pooling(nn.Module):
    """Half the size: the root of the squares' mean under a Hann window of 3 x 3."""

    window: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25], device="cpu")
        window = (line[:, None] * line).expand(channels, 1, 3, 3).contiguous()
        self.register_buffer("window", window, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        squares = F.conv2d(features.square(), self.window, stride=2, padding=1, groups=features.shape[1])
        return (squares + 1e-12).sqrt()


def _similarity(left: Tensor, right: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """[N]: the channels' similarity in mean (texture) and in covariance (structure), equations 6 to 8 of the paper."""
    left_mean, right_mean = left.mean((2, 3), keepdim=True), right.mean((2, 3), keepdim=True)
    texture = (2 * left_mean * right_mean + STABILISER) / (left_mean**2 + right_mean**2 + STABILISER)
    left_variance = (left - left_mean).square().mean((2, 3), keepdim=True)
    right_variance = (right - right_mean).square().mean((2, 3), keepdim=True)
    covariance = (left * right).mean((2, 3), keepdim=True) - left_mean * right_mean
    structure = (2 * covariance + STABILISER) / (left_variance + right_variance + STABILISER)
    return (alpha.view(1, -1, 1, 1) * texture + beta.view(1, -1, 1, 1) * structure).sum((1, 2, 3))


def dists_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a `Dists`, by its name."""
    return {**VGG16.shapes(), "alpha": (sum(CHANNELS),), "beta": (sum(CHANNELS),)}


def load_dists(path: Path, bf16: bool = False) -> Dists:
    """The DISTS in a converted file, on the CPU; `bf16` as in `Dists`.

    Raises `IcmsrError` for a file that is missing, damaged or another.
    """
    tensors, _ = read_weight_file(path, DISTS)
    return Dists(tensors, str(path), bf16)
