"""Core's AutoencoderKL (comfy/ldm/modules/diffusionmodules/model.py) and TAESD (comfy/taesd/taesd.py) as the steps of
`icmsr_core/backbone/vae_steps.py`."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.diffusionmodules.model
import comfy.model_management
import comfy.ops
import comfy.taesd.taesd
import torch
import torch.nn.functional as F

from ...icmsr_core.backbone.tiny_vae_steps import layer_steps
from ...icmsr_core.backbone.vae_steps import (
    Attention,
    Norm,
    Pointwise,
    Residual,
    Step,
    UnknownLayer,
    conv_step,
    down_step,
    up_steps,
)
from ...icmsr_core.pictures.ranges import signed_to_unit, unit_to_signed


def encoder_steps(vae: Any, device: torch.device) -> tuple[Step, ...]:
    """The encoder of `vae`, with its quant_conv if it has one: from [N, 3, H, W] to the moments [N, 2C, h, w].

    The encoder of a TAESD gives the latent [N, C, h, w]. `device` is where the weights are used. Raises `UnknownLayer`
    for a VAE of another layout.
    """
    if is_tiny(vae):
        return (
            Pointwise(signed_to_unit),
            *layer_steps(vae.taesd_encoder),
            Pointwise(lambda latent: latent / vae.vae_scale + vae.vae_shift),
        )
    encoder = _half(vae, "encoder")
    steps: list[Step] = [conv_step(encoder.conv_in)]
    for level in encoder.down:
        steps += _level(level, device)
        if hasattr(level, "downsample"):
            steps.append(down_step(level.downsample.conv))
    steps += [*_middle(encoder.mid, device), *_head(encoder, device)]
    return (*steps, *_own_conv(vae, "quant_conv"))


def decoder_steps(vae: Any, device: torch.device) -> tuple[Step, ...]:
    """The decoder of `vae`, with its post_quant_conv if it has one: from [N, C, h, w] to [N, 3, H, W].

    Arguments and errors are those of `encoder_steps`.
    """
    if is_tiny(vae):
        clamp, *layers = vae.taesd_decoder
        return (
            Pointwise(lambda latent: (latent - vae.vae_shift) * vae.vae_scale),
            Pointwise(clamp),
            *layer_steps(layers),
            Pointwise(unit_to_signed),
        )
    decoder = _half(vae, "decoder")
    steps: list[Step] = [*_own_conv(vae, "post_quant_conv"), conv_step(decoder.conv_in)]
    steps += _middle(decoder.mid, device)
    for level in reversed(decoder.up):
        steps += _level(level, device)
        if hasattr(level, "upsample"):
            steps += up_steps(level.upsample.conv)
    return (*steps, *_head(decoder, device))


def is_tiny(vae: torch.nn.Module) -> bool:
    """Whether `vae` is core's TAESD."""
    return isinstance(vae, comfy.taesd.taesd.TAESD)


def _half(vae: Any, name: str) -> Any:
    half = getattr(vae, name, None)
    if not all(hasattr(half, part) for part in ("conv_in", "mid", "norm_out", "conv_out")):
        raise UnknownLayer(
            f"a VAE of the kind {type(vae).__name__} cannot run in tiles: connect a Stable Diffusion VAE, or set tile "
            "to 0 (the whole picture at once)"
        )
    return half


def _own_conv(vae: Any, name: str) -> list[Step]:
    module = getattr(vae, name, None)
    return [] if module is None else [conv_step(module)]


def _level(level: Any, device: torch.device) -> list[Step]:
    steps: list[Step] = []
    for index, block in enumerate(level.block):
        steps.append(_block(block, device))
        if len(level.attn):
            steps += _attention(level.attn[index], device)
    return steps


def _middle(middle: Any, device: torch.device) -> list[Step]:
    return [_block(middle.block_1, device), *_attention(middle.attn_1, device), _block(middle.block_2, device)]


def _block(block: Any, device: torch.device) -> Residual:
    main: list[Step] = []
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        main += [_norm(norm, device), Pointwise(F.silu), conv_step(conv)]
    widens = block.in_channels != block.out_channels
    return Residual(tuple(main), block.nin_shortcut if widens else None)


def _attention(block: Any, device: torch.device) -> list[Step]:
    if isinstance(block, torch.nn.Identity):  # no attention, as in the embedded VAE (see `models.load_vae`)
        return []
    core = comfy.ldm.modules.diffusionmodules.model
    chosen = block.optimized_attention
    attend = Attention(
        block.q,
        block.k,
        block.v,
        block.proj_out,
        fused=not comfy.model_management.is_amd(),  # as core: there torch's kernels crash on large maps
        own=None if chosen in (core.pytorch_attention, core.normal_attention) else chosen,  # xformers, say
    )
    return [Residual((_norm(block.norm, device), attend))]


def _head(half: Any, device: torch.device) -> list[Step]:
    return [_norm(half.norm_out, device), Pointwise(F.silu), conv_step(half.conv_out)]


def _norm(module: torch.nn.GroupNorm, device: torch.device) -> Norm:
    # Core may keep the weights on another device, or patch them only when they are used, so it must hand them out.
    return Norm(
        module.num_groups,
        module.eps,
        lambda: comfy.ops.cast_bias_weight(module, dtype=torch.float32, device=device, bias_dtype=torch.float32),
    )
