"""The variance-preserving noise schedule and the closed forms between x0, eps, v and a residual.

Notation as in the literature: ``z_t = a_t x0 + s_t eps`` with ``a_t = sqrt(alphas_cumprod[t])`` and
``s_t = sqrt(1 - alphas_cumprod[t])``; ``v = a_t eps - s_t x0`` (Salimans & Ho 2022, equation 9).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import IcmsrError
from .prediction import PREDICTIONS, Prediction


@dataclass(frozen=True)
class NoiseSchedule:
    """Stable Diffusion's "scaled linear" schedule: beta is linear in its square root.

    The defaults are those of Stable Diffusion 1.5 and 2.1, for which ``a_999 = 0.06826``: an eps-predicting
    one-step generator that starts at t = 999 amplifies the network's output 14.6 times.
    """

    beta_start: float = 0.00085
    """beta at t = 0."""
    beta_end: float = 0.012
    """beta at the last timestep."""
    steps: int = 1000
    """Number of training timesteps T; t runs from 0 to T - 1."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise IcmsrError(f"betas must satisfy 0 < start <= end < 1, got {self.beta_start} and {self.beta_end}")
        if self.steps < 1:
            raise IcmsrError(f"a noise schedule needs at least 1 step, got {self.steps}")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative product of (1 - beta), float64, shape [T]."""
        root = torch.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.steps, dtype=torch.float64)
        return torch.cumprod(1 - root.square(), dim=0)

    def check_timestep(self, t: int) -> int:
        """`t` itself when the schedule has it; raises `IcmsrError` otherwise."""
        if not 0 <= t < self.steps:
            raise IcmsrError(f"timestep must be between 0 and {self.steps - 1}, got {t}")
        return t

    def a_s(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``a_t`` and ``s_t`` in the dtype of `like`, to be multiplied with a tensor [N, C, H, W] on its device.

        `t` is one timestep, which gives CPU scalars, or a tensor [N] of them, which gives [N, 1, 1, 1]. Nothing waits
        for the device. Raises `IcmsrError` for timesteps that the schedule lacks; those on a device are not looked at.
        """
        if isinstance(t, Tensor) and t.device.type != "cpu":
            shape = (-1, *([1] * (like.ndim - 1)))
            a, s = (root.index_select(0, t).reshape(shape) for root in _roots_on(self, t.device, like.dtype))
            return a, s
        index = torch.as_tensor(t).long().reshape(-1)
        try:
            # Unlike [], index_select refuses negative numbers. And it needs no values, so the dry run can estimate the
            # memory of a step on tensors without data.
            cumprod = self.alphas_cumprod.index_select(0, index)
        except (IndexError, RuntimeError) as error:
            raise IcmsrError(f"timesteps must be between 0 and {self.steps - 1}, got {index.tolist()}") from error
        if not isinstance(t, Tensor):
            return cumprod[0].sqrt().to(like.dtype), (1 - cumprod[0]).sqrt().to(like.dtype)
        cumprod = cumprod.reshape(-1, *([1] * (like.ndim - 1)))
        return cumprod.sqrt().to(like), (1 - cumprod).sqrt().to(like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """``z_t = a_t x0 + s_t eps``; `x0` and `eps` [N, C, H, W]."""
        a, s = self.a_s(t, x0)
        return a * x0 + s * eps

    def x0_from_output(self, prediction: Prediction, z: Tensor, output: Tensor, t: int | Tensor) -> Tensor:
        """The clean estimate [N, C, H, W] of the noisy latent `z`, in closed form from the network's `output`.

        ``eps``: ``(z - s_t out) / a_t``; ``v``: ``a_t z - s_t out``; ``residual``: ``z - out``. Not by a step of a
        scheduler: those refuse a single step at t = 999 or move it, in some versions without a word. Raises
        `IcmsrError` for another `prediction`.
        """
        if prediction == "residual":
            return z - output
        a, s = self.a_s(t, z)
        if prediction == "eps":
            return (z - s * output) / a
        if prediction == "v":
            return a * z - s * output
        raise IcmsrError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")

    def eps_from_x0(self, z: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """The noise with which `x0` becomes `z` at timestep `t`: ``(z - a_t x0) / s_t``."""
        a, s = self.a_s(t, z)
        return (z - a * x0) / s

    def v_from_x0(self, z: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """The velocity of `z` at timestep `t` if the clean latent is `x0`: ``(a_t z - x0) / s_t``."""
        a, s = self.a_s(t, z)
        return (a * z - x0) / s

    def eps_from_output(self, prediction: Prediction, z: Tensor, output: Tensor, t: int | Tensor) -> Tensor:
        """The noise that a network's `output` means, whatever it predicts (for a residual through x0)."""
        if prediction == "eps":
            return output
        if prediction == "v":
            a, s = self.a_s(t, z)
            return a * output + s * z
        return self.eps_from_x0(z, self.x0_from_output(prediction, z, output, t), t)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # made while a sample is drawn, they serve training, too
def _roots_on(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``a_t`` and ``s_t`` of all timesteps, [T] each, on `device`. Rounded on the CPU: a device may lack float64."""
    cumprod = schedule.alphas_cumprod
    return cumprod.sqrt().to(dtype).to(device), (1 - cumprod).sqrt().to(dtype).to(device)
