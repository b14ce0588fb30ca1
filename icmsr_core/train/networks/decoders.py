"""The decoder half of a VAE: which tensors belong to it, and giving a VAE the decoder of another base."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from ...errors import IcmsrError
from ...weights.base import BaseFolder

DECODER_PARTS = ("decoder", "post_quant_conv")


def in_decoder(parameter: str) -> bool:
    """Whether a VAE's parameter belongs to its decoder."""
    return parameter.split(".")[0] in DECODER_PARTS


def exchange_decoder(vae: AutoencoderKL, donor: BaseFolder) -> None:
    """Gives `vae` the decoder of `donor`, a base that distillation exported with ``losses.autoencoder``.

    Raises `IcmsrError` unless both have one and the same encoder: another's decoder reads another latent.
    """
    own, given = vae.state_dict(), donor.vae_state()
    for name, value in own.items():
        if name not in given or given[name].shape != value.shape:
            raise IcmsrError(f"decoder {donor.path}: its VAE has another shape than that of start ({name})")
    for name, value in own.items():
        # To the precision of the files: base folders hold half precision.
        if not in_decoder(name) and not torch.equal(given[name].half(), value.half()):
            raise IcmsrError(
                f"decoder {donor.path}: its encoder differs from that of start ({name}), so its decoder reads "
                "another latent: choose a base that was distilled from start's base"
            )
    vae.load_state_dict({name: given[name].to(value) if in_decoder(name) else value for name, value in own.items()})
