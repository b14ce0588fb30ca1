"""A tiny VAE's list of layers (TAESD, as built by diffusers or by ComfyUI) as the steps of `vae_steps`.

It has neither GroupNorm nor attention, so it is exact in stripes with nothing to wait for and nothing to estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .vae_steps import Pointwise, Residual, Step, UnknownLayer, conv_step, down_step

ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Mish)


def layer_steps(layers: Iterable[nn.Module]) -> tuple[Step, ...]:
    """The steps of `layers`, in order: convolutions, activations, upsampling, and residual blocks of these.

    Raises `UnknownLayer` for any other layer.
    """
    steps: list[Step] = []
    for layer in layers:
        block: Any = layer
        if isinstance(layer, nn.Conv2d):
            steps.append(conv_step(layer) if layer.stride == (1, 1) else down_step(layer))
        elif isinstance(layer, ACTIVATIONS):
            steps.append(Pointwise(layer))
        elif isinstance(layer, nn.Upsample) and layer.mode == "nearest" and layer.scale_factor == 2:
            steps.append(Pointwise(layer, up=2))
        elif all(hasattr(layer, part) for part in ("conv", "skip", "fuse")) and getattr(layer, "pool", None) is None:
            shortcut = None if isinstance(block.skip, nn.Identity) else block.skip
            steps += [Residual(layer_steps(block.conv), shortcut), *layer_steps([block.fuse])]
        else:
            raise UnknownLayer(
                f"this tiny VAE cannot run in tiles, it has a layer {layer}: upscale with tile 0, the whole picture at "
                "once, or take TAESD"
            )
    return tuple(steps)
