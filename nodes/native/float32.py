"""The same MODEL or VAE computing in float32, for where 16 bits are not enough.

Core's options --fp16-unet and --fp16-vae win over the precisions that a model declares, and a checkpoint or a LoRA may
leave float16's range, too. The weights are kept in their precision, and core casts each one when it is used.
"""

from __future__ import annotations

import copy
import uuid

import torch

from .core_objects import Model, Vae


def model_in_float32(model: Model) -> Model:
    """A copy of `model` that computes in float32; core loads its weights again, with the same patches."""
    widened = model.clone()
    widened.set_model_compute_dtype(torch.float32)
    return widened


def vae_in_float32(vae: Vae) -> Vae:
    """A copy of `vae` that computes in float32, as `model_in_float32`."""
    widened = copy.copy(vae)  # core's VAE has no clone()
    widened.vae_dtype = torch.float32
    widened.patcher = vae.patcher.clone()
    widened.patcher.force_cast_weights = True
    widened.patcher.patches_uuid = uuid.uuid4()
    return widened
