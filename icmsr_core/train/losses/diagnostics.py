"""Diagnostics of the regulariser: whether it is alive or has collapsed, by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .icm import at_least_float32

BINS = 5
"""Equal bins of the timestep in which diagnostics are logged: at high t every error is small, at low t none can be."""
AT_ONCE = 256
"""Steps whose values are copied from the device together."""


def diagnostics(teacher: Tensor, auxiliary: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """What tells a living regulariser from a collapsed one, each [N]. Lemma 1 of ICM-SR in measurable form (ours).

    - ``rho``: mean|eps_phi - eps_psi| / mean|eps_phi - eps|, which is also mean|g|;
    - ``cos``: cosine between g and the SDS direction eps_phi - eps;
    - ``mse_auxiliary``, ``mse_teacher``: mean squared error of either prediction against the true noise.

    Collapse, VSD fallen back to SDS, is rho -> 1 AND cos -> 1 AND mse_auxiliary -> 0 at t in [.2, .8] T: the auxiliary
    then names the very noise that was added. None of the three says it alone.
    """
    teacher, auxiliary, eps = (at_least_float32(value.detach()) for value in (teacher, auxiliary, eps))
    g, sds = (teacher - auxiliary).flatten(1), (teacher - eps).flatten(1)
    return {
        "rho": g.abs().mean(1) / sds.abs().mean(1).clamp_min(1e-12),
        "cos": F.cosine_similarity(g, sds, dim=1, eps=1e-12),
        "mse_auxiliary": (auxiliary - eps).square().flatten(1).mean(1),
        "mse_teacher": sds.square().mean(1),
    }


def saturation(image: Tensor) -> Tensor:
    """Share of the values of `image` [N, 3, H, W] outside [-1, 1], a scalar: grows when distillation overshoots."""
    return (image.detach().abs() > 1).float().mean()


def variety(image: Tensor, truth: Tensor) -> Tensor:
    """Spread of a batch over the spread of its truth, a scalar: falls below 1 when the outputs grow alike (ours).

    Spread is the standard deviation over the batch, pixel by pixel, averaged. NaN for a single picture, which has none.
    """
    if len(image) < 2:
        return torch.full((), float("nan"), device=image.device)

    def spread(pictures: Tensor) -> Tensor:
        return pictures.detach().float().std(dim=0).mean()

    return spread(image) / spread(truth).clamp_min(1e-12)


@dataclass
class BinnedMeans:
    """Running sums by timestep bin, so that means over a logging interval, and over processes, are exact."""

    steps: int
    """T of the schedule."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    _waiting: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Timesteps and values that were added and may still be on a device."""

    def add(self, values: Mapping[str, Tensor], t: Tensor) -> None:
        """Adds `values` (each [N]) seen at timesteps `t` [N]. Waits for the device in every `AT_ONCE`-th call only."""
        for name, value in values.items():
            waiting = self._waiting.setdefault(name, [])
            waiting.append((t, value.detach()))
            if len(waiting) == AT_ONCE:
                self._settle()

    def _settle(self) -> None:
        for name, waiting in self._waiting.items():
            table = self.sums.setdefault(name, torch.zeros(2, BINS, dtype=torch.float64))
            t, values = (torch.cat(part).cpu() for part in zip(*waiting))
            bins = (t * BINS // self.steps).clamp(0, BINS - 1)
            table[0].index_add_(0, bins, values.double())
            table[1].index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))
        self._waiting.clear()

    def take(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Means as ``NAME/0.2-0.4`` since the last call, over all processes, without empty bins."""
        self._settle()
        found = {}
        if accelerator is not None and accelerator.num_processes > 1:
            for name in sorted(self.sums):
                table = accelerator.reduce(self.sums[name].to(accelerator.device), "sum")
                self.sums[name] = table.cpu()
        for name, (total, count) in self.sums.items():
            for index in range(BINS):
                if count[index] > 0:
                    found[f"{name}/{index / BINS:.1f}-{(index + 1) / BINS:.1f}"] = float(total[index] / count[index])
        self.sums.clear()
        return found
