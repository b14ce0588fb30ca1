"""One half of a VAE as a list of steps: what `tiled_vae_stream` runs stripe by stripe.

The list says what the networks do, not whose classes they are: each backbone writes it down for its own VAE
(`diffusers_backbone`, `nodes/native/backbone.py`). Maps are [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import IcmsrError

VaePart = Literal["encoder", "decoder"]
TensorMap = Callable[[Tensor], Tensor]


class UnknownLayer(IcmsrError):
    """A VAE has a layer that no step stands for, so it cannot run in stripes."""


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A map of which every result depends on one block of `down` x `down` samples and makes `up` x `up` of it."""

    run: TensorMap
    """The map. Must not write into its argument."""
    up: int = 1
    """Samples of the result per block, along each axis."""
    down: int = 1
    """Samples of the argument per block, along each axis."""


@dataclass(frozen=True, eq=False)
class Conv:
    """A 3 x 3 convolution over a map with one row or column of zeros on every side."""

    module: nn.Conv2d
    """The layer, with padding 1 and stride 1."""


@dataclass(frozen=True, eq=False)
class Down:
    """A 3 x 3 convolution with stride 2 over a map of even height and width.

    With padding 0 the map gets one row of zeros below and one column at the right (AutoencoderKL), with padding 1 one
    on every side (TAESD).
    """

    module: nn.Conv2d
    """The layer, with padding 0 or 1 and stride 2."""


@dataclass(frozen=True, eq=False)
class Norm:
    """GroupNorm. Its statistics are the whole picture's, which is why a VAE cannot simply be cut into tiles."""

    groups: int
    """Groups of channels that share a mean and a variance."""
    eps: float
    """Added to the variance."""
    affine: Callable[[], tuple[Tensor, Tensor]]
    """Gives weight and bias, [C] each, any type."""


@dataclass(frozen=True)
class Sample:
    """Places of a map that stand for all of it."""

    places: Tensor
    """What is there, [1, C, number of places]."""
    shares: Tensor
    """The part of the map that each stands for, float32 [number of places], above 0; they sum to 1."""
    total: int
    """Places of the map."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Every place of a map looks at all the others; without the norm before it and the sum after it."""

    query: TensorMap
    """Projection of a map, [N, C, h, w] to the same."""
    key: TensorMap
    """As `query`."""
    value: TensorMap
    """As `query`."""
    output: TensorMap
    """Projection of the result, [N, C, h, w] to the same."""
    heads: int = 1
    """Groups of channels that attend on their own."""

    def run(self, asking: Tensor, asked: Tensor | None, sample: Sample | None = None) -> Tensor:
        """What the places of `asking` [1, C, h, w] find among those of `asked` [1, C, h', w']: [1, C, h, w].

        With `sample`, also among the places that are not in `asked`, each place of the sample taken for its share of
        them (a weight in the softmax, which a logarithm on its argument is).
        """
        maps, bias = [] if asked is None else [asked.flatten(2)], None
        near = 0 if asked is None else asked.shape[2] * asked.shape[3]
        if sample is not None and sample.total > near:
            maps.append(sample.places)
            far = (sample.shares * (sample.total - near)).log()
            bias = torch.cat([far.new_zeros(near), far]).to(asking)[None, None, None]
        every = torch.cat(maps, 2)[..., None]
        query, key, value = (
            rearrange(projected, "n (heads d) h w -> n heads (h w) d", heads=self.heads)
            for projected in (self.query(asking), self.key(every), self.value(every))
        )
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(rearrange(found, "n heads (h w) d -> n (heads d) h w", h=asking.shape[2]))


@dataclass(frozen=True, eq=False)
class Residual:
    """`main` of a map, plus the map itself. `main` keeps height and width and ends with a map of its own memory."""

    main: tuple[Step, ...]
    """What is added to the map."""
    shortcut: TensorMap | None = None
    """A 1 x 1 convolution for the map itself where the number of channels changes."""


Step = Pointwise | Conv | Down | Norm | Attention | Residual


@dataclass(frozen=True)
class VaeHalf:
    """Encoder ([N, 3, H, W] in [-1, 1] to the scaled latent) or decoder (the way back), ready to run."""

    steps: tuple[Step, ...]
    """First to last, with whatever scales and casts: the first one gets float32."""
    device: torch.device
    """Where the weights are."""
    room: Callable[[], float] = lambda: float("inf")
    """Bytes that whole maps may still take on `device`; without room they are kept in main memory."""


def conv_step(module: nn.Module) -> Step:
    """The step for a convolution of a VAE: 3 x 3 with padding 1, or 1 x 1. Raises `UnknownLayer` for any other."""
    if isinstance(module, nn.Conv2d) and module.stride == (1, 1) and module.padding_mode == "zeros":
        if module.kernel_size == (3, 3) and module.padding == (1, 1):
            return Conv(module)
        if module.kernel_size == (1, 1) and module.padding == (0, 0):
            return Pointwise(module)
    raise _unknown(module, "a 3 x 3 convolution with padding 1, or a 1 x 1")


def down_step(module: nn.Module) -> Down:
    """The step for a convolution that halves a map. Raises `UnknownLayer` for any other."""
    if (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding_mode) == ((3, 3), (2, 2), "zeros")
        and module.padding in ((0, 0), (1, 1))
    ):
        return Down(module)
    raise _unknown(module, "a 3 x 3 convolution with stride 2 and padding 0 or 1")


def up_steps(module: nn.Module) -> tuple[Step, ...]:
    """The steps for a doubled map (nearest neighbours) and the convolution `module` after it."""
    return Pointwise(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), up=2), conv_step(module)


def _unknown(module: nn.Module, wanted: str) -> UnknownLayer:
    return UnknownLayer(
        f"this VAE cannot run in tiles: expected {wanted}, got {module}: upscale with tile 0, the whole picture at once"
    )


class Widened(Exception):
    """A part of the networks overflowed in the middle of a stream and runs in float32 now: run the stream again."""
