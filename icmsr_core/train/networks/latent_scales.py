"""A generator's UNet moved into the latent of a VAE whose channels were scaled and shifted (ours).

`normalise_latent` of train/prior.py changes nothing but the scale and the offset of each latent channel. A UNet that
was trained before can go on from there: its first and last convolution take up the change.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ...errors import IcmsrError

_SAME = 0.01
"""Largest difference of two directions that count as one, relative to their length: base folders are rounded to 16
bits."""


def latent_change(old: AutoencoderKL, new: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Gains [C] and shifts [C] with ``new = gain * old + shift`` for the scaled latents of the two VAEs, by channel.

    Raises `IcmsrError` unless the encoders are the same but for the scale and offset of each channel.
    """
    ours, theirs = new.state_dict(), old.state_dict()
    for name, value in ours.items():
        if name.startswith("encoder.") and (name not in theirs or not torch.equal(theirs[name].half(), value.half())):
            raise IcmsrError(
                f"networks.start_base has another VAE than the base ({name} differs): name the base folder that start "
                "was trained on, from which the base was made by normalise_latent"
            )
    channels = int(new.config.latent_channels)
    rows = [
        float(vae.config.scaling_factor)
        * torch.cat([vae.quant_conv.weight.flatten(1), vae.quant_conv.bias[:, None]], 1)
        for vae in (old, new)
    ]
    before, after = (row[:channels].detach().double() for row in rows)
    gain = (before[:, :-1] * after[:, :-1]).sum(1) / before[:, :-1].square().sum(1)
    off = (after[:, :-1] - gain[:, None] * before[:, :-1]).norm(dim=1) / after[:, :-1].norm(dim=1)
    if float(off.max()) > _SAME or float(gain.min()) <= 0:
        raise IcmsrError(
            "networks.start_base has a latent that is more than scaled and shifted against the base's: train a new "
            "generator with networks.zero_output"
        )
    return gain.float(), (after[:, -1] - gain * before[:, -1]).float()


@torch.no_grad()
def change_latent(unet: UNet2DConditionModel, gain: Tensor, shift: Tensor) -> None:
    """Makes `unet`, with residual prediction, do in the latent ``gain * z + shift`` what it did in the latent z.

    Within the first convolution's reach of the border it differs a little: what is padded there is zero in the new
    latent, no longer in the old one.
    """
    first, last = unet.conv_in, unet.conv_out
    first.weight /= gain.view(1, -1, 1, 1)
    first.bias -= (first.weight.sum((2, 3)) * shift).sum(1)
    last.weight *= gain.view(-1, 1, 1, 1)
    last.bias *= gain
