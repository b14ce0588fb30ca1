"""The published form of the ICM gradient."""

import torch
from torch import Tensor

from icmsr_core.backbone.noise_schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def published_gradient(latent: Tensor, noisy: Tensor, t: Tensor, teacher: Tensor, auxiliary: Tensor) -> Tensor:
    """OSEDiff's gradient from predicted noise, written out from its equation 9: clean estimates, then a division."""
    cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    a, s = cumprod.sqrt().view(-1, 1, 1, 1), (1 - cumprod).sqrt().view(-1, 1, 1, 1)
    x0_teacher, x0_auxiliary = (noisy - s * teacher) / a, (noisy - s * auxiliary) / a
    return (x0_auxiliary - x0_teacher) / (latent - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
