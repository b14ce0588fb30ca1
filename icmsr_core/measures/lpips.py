"""LPIPS: the learned perceptual distance of two pictures, from features of AlexNet or VGG16.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1 of its
weights. Tables of results use AlexNet, losses VGG16. A file has the keys ``features.<n>.weight`` and ``.bias``
(`feature_networks`) and ``heads.<n>`` [channels].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import IcmsrError
from .feature_networks import ALEXNET, VGG16, FeatureNetwork
from .weight_files import LPIPS_ALEX, LPIPS_VGG, check_weights, read_weight_file

# The published scaling layer: ImageNet's mean and deviation, for pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """LPIPS of [N, 3, H, W] pictures in [-1, 1], the mean over the batch; frozen, in the precision of its weights.

    Autocast is switched off inside: differences of unit vectors lose most of their digits in bfloat16. The weights'
    precision is float32 as loaded; ``.double()`` works.

    With `bf16` the network's layers compute in bfloat16 all the same, the comparison in float32. That is for
    losses: the gradient is noisier.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: str = "LPIPS weights",
        network: FeatureNetwork = VGG16,
        bf16: bool = False,
    ) -> None:
        """`tensors`: as the file holds them. Raises `IcmsrError`, which says `name`, if they are not `network`'s."""
        super().__init__()
        check_weights(name, tensors, lpips_shapes(network))
        self.network, self.bf16 = network, bf16
        self.features, self._compared = network.layers()
        self.heads = nn.ParameterList(torch.empty(width, device="meta") for width in network.widths())
        self.register_buffer("shift", torch.tensor(SHIFT, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, result: Tensor, truth: Tensor) -> Tensor:
        """The distance, a scalar; 0 for equal pictures. Gradients reach `result`; `truth` counts as constant.

        Raises `IcmsrError` for pictures of different or wrong shapes, or too small (16 px for VGG16, 31 for AlexNet).
        """
        if result.shape != truth.shape or result.ndim != 4 or result.shape[1] != 3:
            raise IcmsrError(
                f"LPIPS takes two batches [N, 3, H, W] of one shape, got {list(result.shape)} and {list(truth.shape)}"
            )
        smallest = self.network.smallest_side
        if min(result.shape[-2:]) < smallest:
            raise IcmsrError(
                f"LPIPS with {self.network.name} takes pictures of {smallest} px and more, got "
                f"{list(result.shape[-2:])}: use larger ones"
            )
        heads = iter(self.heads)
        with torch.autocast(result.device.type, enabled=False):
            left = (result.to(self.shift) - self.shift) / self.scale
            right = (truth.detach().to(self.shift) - self.shift) / self.scale
            total = left.new_zeros(left.shape[0])
            # Side by side, so that the truth's activations are freed level by level.
            for index, layer in enumerate(self.features):
                with torch.autocast(result.device.type, torch.bfloat16, enabled=self.bf16):
                    left, right = layer(left), layer(right)
                if index in self._compared:
                    difference = (_unit_length(left.to(self.shift)) - _unit_length(right.to(self.shift))).square()
                    total = total + (difference * next(heads).view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total.mean()


def _unit_length(features: Tensor) -> Tensor:
    # vector_norm and not the root of a sum, whose gradient at the zero vector is NaN: the ReLU before it would mask
    # that, but anomaly detection stops there.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def lpips_shapes(network: FeatureNetwork) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of an `Lpips` on `network`, by its name."""
    return {**network.shapes(), **{f"heads.{level}": (width,) for level, width in enumerate(network.widths())}}


def load_lpips(path: Path, network: FeatureNetwork = VGG16, bf16: bool = False) -> Lpips:
    """The LPIPS on `network` in a converted file, on the CPU; `bf16` as in `Lpips`.

    Raises `IcmsrError` for a file that is missing, damaged, another, or of the other network.
    """
    kind = LPIPS_ALEX if network is ALEXNET else LPIPS_VGG
    tensors, description = read_weight_file(path, kind)
    stated = description.get("network", network.name)
    if stated != network.name:
        raise IcmsrError(
            f"{path}: holds LPIPS with {stated}, {network.name} is needed here: take {kind.name}, made with "
            f"{kind.command}"
        )
    return Lpips(tensors, str(path), network, bf16)
