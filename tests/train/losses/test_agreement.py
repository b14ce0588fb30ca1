"""Whether latents are in the code of the encoder: numbers as NumPy has them, and the warning."""

import re

import numpy as np
import pytest
import torch

from icmsr_core.train.losses.agreement import latent_agreement


def latents(seed: int = 0, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_numbers_are_those_of_numpy():
    truth = 2 * latents() + 1
    found = 0.5 * truth + latents(1) + torch.tensor([0.0, 3.0, -1.0]).view(1, 3, 1, 1)
    agreement = latent_agreement(found, truth)
    for channel in range(3):
        a, b = (value[:, channel].double().numpy().ravel() for value in (found, truth))
        assert float(agreement.offset[channel]) == pytest.approx(abs(a.mean() - b.mean()) / b.std())
        assert float(agreement.correlation[channel]) == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert float(agreement.error[channel]) == pytest.approx(((a - b) ** 2).mean() / b.var())
    assert agreement.values()["offset/1"] == float(agreement.offset[1])
    assert len(agreement.values()) == 9


def test_half_precision_does_not_blur_the_numbers():
    truth = latents() + 40  # float16 has steps of 1/32 there, and sums of squares would overflow
    exact, half = latent_agreement(truth + 1, truth), latent_agreement((truth + 1).half(), truth.half())
    assert torch.allclose(exact.error, half.error, atol=0.01)


def test_latents_of_the_encoder_and_their_means_raise_no_warning():
    truth = latents()
    assert latent_agreement(truth, truth).warning() == ""
    assert latent_agreement(torch.zeros_like(truth), truth - truth.mean((0, 2, 3), keepdim=True)).warning() == ""


@pytest.mark.parametrize(
    ("drifted", "words"),
    [
        (lambda z: z + torch.tensor([0.0, 0.4, 0.0]).view(1, 3, 1, 1), r"in channel 1 \(mean off by 0\.\d+ standard"),
        (
            lambda z: torch.cat([z[:, :2], -z[:, 2:]], 1),
            r"in channel 2 .*error [34]\.\d\d of the variance",
        ),
        (lambda z: z * torch.tensor([float("nan"), 1.0, 1.0]).view(1, 3, 1, 1), "in channel 0"),
    ],
    ids=["offset", "another code", "not finite"],
)
def test_the_warning_names_channel_numbers_and_what_to_do(drifted, words):
    text = latent_agreement(drifted(latents()), latents()).warning()
    assert re.search(words, text)
    assert "losses.latent" in text
