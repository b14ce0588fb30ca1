"""VGG16 and AlexNet up to their last convolution: LPIPS and DISTS compare features of these. Layers as in torchvision.

Tensors have torchvision's names: ``features.<n>.weight`` [out, in, kernel, kernel] and ``features.<n>.bias`` [out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Convolution:
    """A convolution that a ReLU follows."""

    channels: int
    """Output channels."""
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class FeatureNetwork:
    """The convolutions of a network, in blocks: the features at the end of each block are compared."""

    name: str
    """torchvision's name of the whole network."""
    blocks: tuple[tuple[Convolution, ...], ...]
    pooled: tuple[int, ...]
    """The blocks that begin with a pooling, counted from 0."""
    pool_kernel: int
    """The max pooling's kernel; its stride is 2."""
    smallest_side: int
    """Pictures with a shorter side have no cell left at the last block."""

    def widths(self) -> tuple[int, ...]:
        """Channels of the features at the end of each block."""
        return tuple(block[-1].channels for block in self.blocks)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by its name."""
        shapes: dict[str, tuple[int, ...]] = {}
        index = 0
        for channels, layer, _ in self._walk():
            if layer is None:
                index += 1
                continue
            shapes[f"features.{index}.weight"] = (layer.channels, channels, layer.kernel, layer.kernel)
            shapes[f"features.{index}.bias"] = (layer.channels,)
            index += 2
        return shapes

    def layers(self, pooling: Callable[[int], nn.Module] | None = None) -> tuple[nn.Sequential, frozenset[int]]:
        """The layers, and the indices of those whose output is compared.

        `pooling` makes another pooling for that number of channels. The convolutions are on the device "meta": they
        take no memory and draw nothing from the global random state, which a seeded run depends on.
        """
        layers: list[nn.Module] = []
        compared = set()
        for channels, layer, last in self._walk():
            if layer is None:
                layers.append(nn.MaxPool2d(self.pool_kernel, 2) if pooling is None else pooling(channels))
                continue
            convolution = nn.Conv2d(channels, layer.channels, layer.kernel, layer.stride, layer.padding, device="meta")
            layers += [convolution, nn.ReLU(inplace=True)]
            if last:
                compared.add(len(layers) - 1)
        return nn.Sequential(*layers), frozenset(compared)

    def _walk(self) -> Iterator[tuple[int, Convolution | None, bool]]:
        """Input channels, convolution (None for a pooling), and whether it is the last of its block."""
        channels = 3
        for number, block in enumerate(self.blocks):
            if number in self.pooled:
                yield channels, None, False
            for layer in block:
                yield channels, layer, layer is block[-1]
                channels = layer.channels


def _plain(*channels: int) -> tuple[Convolution, ...]:
    return tuple(Convolution(width) for width in channels)


VGG16 = FeatureNetwork(
    name="vgg16",
    blocks=(_plain(64, 64), _plain(128, 128), _plain(256, 256, 256), _plain(512, 512, 512), _plain(512, 512, 512)),
    pooled=(1, 2, 3, 4),
    pool_kernel=2,
    smallest_side=16,
)
ALEXNET = FeatureNetwork(
    name="alexnet",
    blocks=(
        (Convolution(64, kernel=11, stride=4, padding=2),),
        (Convolution(192, kernel=5, padding=2),),
        _plain(384),
        _plain(256),
        _plain(256),
    ),
    pooled=(1, 2),
    pool_kernel=3,
    smallest_side=31,
)
