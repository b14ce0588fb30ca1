"""Whether a generator's latents are in the code of the VAE's encoder, channel by channel.

The teacher knows latents of the encoder only. A generator whose decoder was trained along may put its details into the
latent in another way: its pictures look right, but the teacher sees latents that it never met, and the regulariser
then only leads them back.
"""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

OFFSET_LIMIT = 0.25
"""Largest distance of a channel's mean from the truth's, in the truth's standard deviations (ours)."""
ERROR_LIMIT = 1.1
"""Largest mean squared error of a channel over the truth's variance (ours): 1 is that of a constant, the mean."""


@dataclass(frozen=True)
class Agreement:
    """How near latents are to those of the truth; each tensor is [C], float64, on the CPU."""

    offset: Tensor
    """|mean - truth's mean| over the truth's standard deviation."""
    correlation: Tensor
    """Correlation with the truth's latents; NaN for a constant channel."""
    error: Tensor
    """Mean squared error over the truth's variance."""

    def values(self) -> dict[str, float]:
        """Values for a log: ``offset/0`` and so on, by channel."""
        return {
            f"{name}/{channel}": float(value)
            for name, values in vars(self).items()
            for channel, value in enumerate(values)
        }

    def warning(self) -> str:
        """One line about the channels that are outside the limits; empty where none is."""
        apart = [
            f"{channel} (mean off by {offset:.2f} standard deviations, error {error:.2f} of the variance)"
            for channel, (offset, error) in enumerate(zip(self.offset.tolist(), self.error.tolist()))
            if not (offset <= OFFSET_LIMIT and error <= ERROR_LIMIT)
        ]
        if not apart:
            return ""
        return (
            f"the generator's latents are not those of the base's encoder in channel {', '.join(apart)}; at most "
            f"{OFFSET_LIMIT} and {ERROR_LIMIT} are allowed. The teacher does not know such latents, so ICM cannot "
            "work: freeze the encoder and the decoder, and set losses.latent"
        )


def latent_agreement(latent: Tensor, truth: Tensor) -> Agreement:
    """Compares latents [N, C, h, w] with those of the truth, over samples and places together (ours)."""
    found, wanted = (rearrange(value.detach().cpu().double(), "n c h w -> c (n h w)") for value in (latent, truth))
    deviation = wanted.std(1, correction=0)
    a, b = (value - value.mean(1, keepdim=True) for value in (found, wanted))
    return Agreement(
        offset=(found.mean(1) - wanted.mean(1)).abs() / deviation,
        correlation=(a * b).mean(1) / (a.std(1, correction=0) * deviation),
        error=(found - wanted).square().mean(1) / deviation.square(),
    )
