"""diffusers' AutoencoderKL and AutoencoderTiny as lists of steps (`backbone/vae_steps.py`).

Reads the layers of a VAE that is already built, so it does not import diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from ..backbone.tiny_vae_steps import layer_steps
from ..backbone.vae_steps import (
    Attention,
    Norm,
    Pointwise,
    Residual,
    Step,
    TensorMap,
    conv_step,
    down_step,
    up_steps,
)
from ..pictures.ranges import signed_to_unit, unit_to_signed


def encoder_steps(vae: Any) -> tuple[Step, ...]:
    """The encoder of `vae` with its quant_conv: [N, 3, H, W] to the moments [N, 2C, h, w].

    A tiny VAE gives the latent [N, C, h, w] instead. Raises `UnknownLayer` for a layer that no step exists for.
    """
    encoder = vae.encoder
    if hasattr(encoder, "layers"):  # tiny: it takes a picture in [0, 1]
        return Pointwise(signed_to_unit), *layer_steps(encoder.layers)
    steps: list[Step] = [conv_step(encoder.conv_in)]
    for block in encoder.down_blocks:
        steps += _level(block)
        steps += [down_step(layer.conv) for layer in block.downsamplers or ()]
    steps += [*_level(encoder.mid_block), *_head(encoder)]
    return (*steps, *([conv_step(vae.quant_conv)] if vae.quant_conv is not None else []))


def decoder_steps(vae: Any) -> tuple[Step, ...]:
    """The decoder of `vae` with its post_quant_conv: [N, C, h, w] to [N, 3, H, W]; errors as in `encoder_steps`."""
    decoder = vae.decoder
    if hasattr(decoder, "layers"):
        clamp, signed = Pointwise(lambda x: torch.tanh(x / 3) * 3), Pointwise(unit_to_signed)
        return clamp, *layer_steps(decoder.layers), signed
    steps: list[Step] = [conv_step(vae.post_quant_conv)] if vae.post_quant_conv is not None else []
    steps += [conv_step(decoder.conv_in), *_level(decoder.mid_block)]
    for block in decoder.up_blocks:
        steps += _level(block)
        for layer in block.upsamplers or ():
            steps += up_steps(layer.conv)
    return (*steps, *_head(decoder))


def _level(block: Any) -> list[Step]:
    """The residual blocks of one level, or of the middle, with the attention after the first of them."""
    resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or ())
    steps: list[Step] = []
    for index, resnet in enumerate(resnets):
        main: list[Step] = []
        for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
            main += [_norm(norm), Pointwise(resnet.nonlinearity), conv_step(conv)]
        steps.append(Residual(tuple(main), resnet.conv_shortcut))
        attention = attentions[index] if index < len(attentions) else None
        if attention is not None:
            layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
            query, key, value, output = (_on_channels(layer) for layer in layers)
            attend = Attention(query, key, value, output, attention.heads)
            steps.append(Residual((_norm(attention.group_norm), attend)))
    return steps


def _head(half: Any) -> list[Step]:
    return [_norm(half.conv_norm_out), Pointwise(half.conv_act), conv_step(half.conv_out)]


def _norm(module: torch.nn.GroupNorm) -> Norm:
    return Norm(module.num_groups, module.eps, lambda: (module.weight, module.bias))


def _on_channels(layer: torch.nn.Linear) -> TensorMap:
    # Contiguous, or torch multiplies row by row.
    return lambda x: rearrange(layer(rearrange(x, "n c h w -> n h w c").contiguous()), "n h w c -> n c h w")
