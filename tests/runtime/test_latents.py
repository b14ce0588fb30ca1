"""Latents of diffusers' VAEs."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from icmsr_core.runtime.latents import decode_latent, encode_picture, posterior_mode

SCALING = 0.18215


def kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=SCALING)


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=2, scaling_factor=SCALING, **blocks
    )


@pytest.mark.parametrize("make", [kl, tiny])
def test_a_latent_is_scaled_float32_and_the_same_every_time(make) -> None:
    vae, image = make().half(), torch.rand(2, 3, 16, 16).half() * 2 - 1
    with torch.no_grad():
        latent = encode_picture(vae, image)
        assert latent.dtype == torch.float32
        assert torch.equal(latent, posterior_mode(vae, image).float() * SCALING)
        assert torch.equal(latent, encode_picture(vae, image))


def test_the_mode_is_the_mean_of_an_autoencoder_s_posterior() -> None:
    vae, image = kl(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(posterior_mode(vae, image), vae.encode(image).latent_dist.mean)


@pytest.mark.parametrize("make", [kl, tiny])
def test_decoding_takes_the_scaled_latent_and_gives_float32(make) -> None:
    vae, latent = make().half(), torch.randn(1, 2, 8, 8).half()
    with torch.no_grad():
        picture = decode_latent(vae, latent)
        assert picture.dtype == torch.float32
        assert torch.equal(picture, vae.decode(latent / SCALING).sample.float())
