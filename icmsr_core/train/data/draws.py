"""Random numbers of a training sample: a function of the seed, the sample's number and the purpose, of nothing else.

Neither the batch that a sample came in, nor the process, nor the device changes them. Two processes with half a batch
each therefore see exactly the noise of one process with the whole, and a resumed run that of one that never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import IcmsrError


def sample_generators(seed: int, index: Tensor, purpose: str) -> list[torch.Generator]:
    """A random generator on the CPU for each sample number in `index` [N], which is on the CPU, too."""

    def one(number: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    return [one(int(number)) for number in index]


def draw_noise(seed: int, index: Tensor, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [N, *shape], float32 on the CPU, for the sample numbers `index` [N]."""
    return torch.stack([torch.randn(tuple(shape), generator=one) for one in sample_generators(seed, index, purpose)])


def draw_uniform(seed: int, index: Tensor, purpose: str) -> Tensor:
    """Uniform draws [N] in [0, 1), float64 on the CPU."""
    generators = sample_generators(seed, index, purpose)
    return torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])


def draw_corners(seed: int, index: Tensor, most: int) -> Tensor:
    """Upper left corners [N, 2] of crops, rows and columns from 0 to `most`, int64 on the CPU."""
    draws = [draw_uniform(seed, index, f"corner/{axis}") for axis in ("row", "column")]
    return (torch.stack(draws, 1) * (most + 1)).long()


def draw_noising(
    seed: int, index: Tensor, purpose: str, shape: Sequence[int], steps: int, law: TimestepConfig
) -> dict[str, Tensor]:
    """What a diffusion loss draws: timesteps ``t`` [N] below `steps`, and noise ``eps`` [N, *shape], on the CPU."""
    t = timesteps(draw_uniform(seed, index, f"{purpose}/t"), steps, law)
    return {"t": t, "eps": draw_noise(seed, index, f"{purpose}/eps", shape)}


TIMESTEP_LAWS = ("uniform", "cubic")


@dataclass(frozen=True)
class TimestepConfig:
    """From where timesteps are drawn."""

    low: float = 0.02
    """Lower end of the range, as a share of T."""
    high: float = 0.98
    """Upper end of the range, as a share of T."""
    law: str = "uniform"
    """uniform, or cubic: t = (1 - u^3) of the range, which favours high noise (T2I-Adapter, arXiv 2302.08453)."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise IcmsrError(f"timestep range must satisfy 0 <= low < high <= 1, got {self.low} and {self.high}")
        if self.law not in TIMESTEP_LAWS:
            raise IcmsrError(f"timestep law must be one of {', '.join(TIMESTEP_LAWS)}, got {self.law!r}")


def all_timesteps(law: str = "uniform") -> TimestepConfig:
    """The whole range 0..T-1: the auxiliary's and the adapter's."""
    return TimestepConfig(0.0, 1.0, law)


def timesteps(u: Tensor, steps: int, config: TimestepConfig) -> Tensor:
    """Timesteps [N], int64, from uniform draws `u` [N] in [0, 1).

    ``uniform``: every whole number of ``[low T, high T)`` is equally likely (OSEDiff: [20, 980)). ``cubic``: the share
    ``1 - u^3`` of the range. A pure function of `u`, so that the draw can depend on the sample alone.
    """
    first, last = round(config.low * steps), round(config.high * steps)
    share = u if config.law == "uniform" else 1 - u.double() ** 3
    return (first + (share.double() * (last - first)).floor().long()).clamp(first, max(first, last - 1))
