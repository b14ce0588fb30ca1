"""Random numbers of a training sample: a function of the seed, the sample's number and the purpose, of nothing else.

Neither the batch that a sample came in, nor the process, nor the device changes them. Two processes with half a batch
each therefore see exactly the noise of one process with the whole, and a resumed run that of one that never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .icm import TimestepConfig, timesteps


def sample_generators(seed: int, index: Tensor, purpose: str) -> list[torch.Generator]:
    """A random generator on the CPU for each sample number in `index` [N]."""
    def one(number: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    return [one(int(number)) for number in index.cpu()]


def draw_noise(seed: int, index: Tensor, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [N, *shape], float32 on the CPU, for the sample numbers `index` [N]."""
    return torch.stack([torch.randn(tuple(shape), generator=one) for one in sample_generators(seed, index, purpose)])


def draw_uniform(seed: int, index: Tensor, purpose: str) -> Tensor:
    """Uniform draws [N] in [0, 1), float64 on the CPU."""
    generators = sample_generators(seed, index, purpose)
    return torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])


def draw_noising(
    seed: int, index: Tensor, purpose: str, shape: Sequence[int], steps: int, law: TimestepConfig, device: torch.device
) -> dict[str, Tensor]:
    """What a diffusion loss draws: timesteps ``t`` [N] below `steps`, and noise ``eps`` [N, *shape], on `device`."""
    t = timesteps(draw_uniform(seed, index, f"{purpose}/t"), steps, law)
    return {"t": t.to(device), "eps": draw_noise(seed, index, f"{purpose}/eps", shape).to(device)}
