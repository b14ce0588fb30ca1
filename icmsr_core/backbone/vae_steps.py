"""One half of a VAE as a list of steps, which `tiled_vae.stream` can run stripe by stripe.

The steps say what the network computes, whatever classes it is made of. Each backbone lists them for its own VAE
(`runtime/diffusers_vae_steps.py`, `nodes/native/vae_steps.py`). Maps are [N, C, H, W].
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
from .attention import attend

VaePart = Literal["encoder", "decoder"]
TensorMap = Callable[[Tensor], Tensor]


class UnknownLayer(IcmsrError):
    """A VAE has a layer that is none of the known steps, so it cannot run in stripes."""


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A function that makes `up` x `up` samples of each block of `down` x `down` samples, without looking further."""

    run: TensorMap
    """The function. Must not write into its argument."""
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

    With padding 0 the map gets one row of zeros below and one column of zeros at the right (AutoencoderKL), with
    padding 1 a row or column on every side (TAESD).
    """

    module: nn.Conv2d
    """The layer, with padding 0 or 1 and stride 2."""


@dataclass(frozen=True, eq=False)
class Norm:
    """GroupNorm. It needs the statistics of the whole map, which is why a VAE cannot simply be cut into tiles."""

    groups: int
    """Groups of channels that share a mean and a variance."""
    eps: float
    """Added to the variance."""
    affine: Callable[[], tuple[Tensor, Tensor]]
    """Returns weight and bias, [C] each, of any type."""


@dataclass(frozen=True)
class Sample:
    """Places of a map that stand for all of it."""

    places: Tensor
    """Their values, [1, C, number of places]."""
    shares: Tensor
    """The share of the map that each stands for, float32 [number of places], above 0; they sum to 1."""
    total: int
    """Number of places of the whole map."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of every place of a map to all of its places, without the norm before it and the sum after it."""

    query: TensorMap
    """Projection of a map, [N, C, h, w] to the same."""
    key: TensorMap
    """As `query`."""
    value: TensorMap
    """As `query`."""
    output: TensorMap
    """Projection of the result, [N, C, h, w] to the same."""
    heads: int = 1
    """Number of heads, into which the channels are split."""
    fused: bool = True
    """Whether torch's fused kernels may be used (`attention.attend`)."""
    own: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Used instead for one head where every place of a map asks for every place: maps of query, key and value
    [1, C, h, w] to a map of the same size."""

    def run(self, asking: Tensor, asked: Tensor | None, sample: Sample | None = None) -> Tensor:
        """Attention of the places of `asking` [1, C, h, w] to those of `asked` [1, C, h', w']: [1, C, h, w].

        With `sample`, also to the places that are not in `asked`: each place of the sample counts in the softmax as
        often as there are places that it stands for (the logarithm of that number is added to its score).
        """
        maps, bias = [] if asked is None else [asked.flatten(2)], None
        near = 0 if asked is None else asked.shape[2] * asked.shape[3]
        if sample is not None and sample.total > near:
            maps.append(sample.places)
            far = (sample.shares * (sample.total - near)).log()
            bias = torch.cat([far.new_zeros(near), far]).to(asking)[None, None, None]
        elif self.own is not None and asked is not None and asking.shape == asked.shape:
            return self.output(self.own(self.query(asking), self.key(asked), self.value(asked)))
        every = (torch.cat(maps, 2) if len(maps) > 1 else maps[0])[:, :, None]
        key, value = self._split(self.key(every)), self._split(self.value(every))
        del maps, every
        found = attend(self._split(self.query(asking)), key, value, bias, self.fused)
        del key, value
        return self.output(rearrange(found, "n heads (h w) d -> n (heads d) h w", h=asking.shape[2]))

    def _split(self, projected: Tensor) -> Tensor:
        """[N, C, h, w] as [N, heads, h * w, d], the channels of a place next to each other as fused kernels need it."""
        heads = rearrange(projected, "n (heads d) h w -> n heads (h w) d", heads=self.heads)
        return heads if heads.stride(-1) == 1 else heads.contiguous()


@dataclass(frozen=True, eq=False)
class Residual:
    """The sum of a map and of what `main` makes of it.

    `main` keeps height and width. Its last step returns new memory, because the sum is written into that.
    """

    main: tuple[Step, ...]
    """The steps whose result is added to the map."""
    shortcut: TensorMap | None = None
    """A 1 x 1 convolution for the map itself, where the number of channels changes."""


Step = Pointwise | Conv | Down | Norm | Attention | Residual


@dataclass(frozen=True)
class VaeHalf:
    """Encoder ([N, 3, H, W] in [-1, 1] to the scaled latent) or decoder (the reverse), ready to run."""

    steps: tuple[Step, ...]
    """First to last, casts and scaling included: the first one gets float32."""
    device: torch.device
    """Where the weights are."""
    room: Callable[[], float] = lambda: float("inf")
    """Returns the bytes that whole maps may still take on `device`. Maps that do not fit are kept in main memory."""


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
    """A network overflowed in the middle of a stream and has been changed to float32: run the stream again."""
