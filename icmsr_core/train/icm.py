"""The ICM regulariser: variational score distillation under a sparse structural condition, as pure functions.

A frozen teacher ``eps_phi`` and a trainable auxiliary ``eps_psi`` see the generator's latent under the same noise, at
the same timestep, with the same features of the truth's structure F(x_H) (ICM-SR, arXiv 2511.22048, section 3). What
tells them apart pulls the generator towards the teacher's manifold:

    z_t = a_t z + s_t eps                                        z = the generator's latent (NoiseSchedule.add_noise)
    g   = (eps_phi(z_t | F) - eps_psi(z_t | F)) / mean|eps_phi(z_t | F) - eps|        `icm_gradient`
    L   = mean(|z - stopgrad(z - g)|^2),  dL/dz = 2 g / N                             `icm_loss`
    L_psi = mean(|eps_psi(z_t | F) - eps|^2)  on the detached z                       `auxiliary_loss`

Everything works on noise predictions, not on clean estimates: ``x0_psi - x0_phi = (s_t / a_t)(eps_phi - eps_psi)`` and
``mean|z - x0_phi| = (s_t / a_t) mean|eps_phi - eps|``, so the normalised difference of clean estimates that OSEDiff
(arXiv 2406.08177, equation 9) writes is this g exactly, without a division by a_t that half precision cannot bear.

Latents and predictions are [N, C, H, W]; results are float32, or float64 when float64 comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..errors import IcmsrError

TIMESTEP_LAWS = ("uniform", "cubic")
BINS = 5
"""Equal bins of the timestep in which diagnostics are logged: at high t every error is small, at low t none can be."""


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


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, ``u + scale (c - u)`` (Ho & Salimans, arXiv 2207.12598); 1 is `conditional` itself."""
    return unconditional + scale * (conditional - unconditional)


def icm_gradient(teacher: Tensor, auxiliary: Tensor, eps: Tensor, floor: float = 1e-4) -> Tensor:
    """The direction g [N, C, H, W] along which the generator's latent is to be lowered (ICM-SR equation 5; see above).

    ``(eps_phi - eps_psi) / max(mean|eps_phi - eps|, floor)``, the mean over each sample on its own: one easy picture
    must not weaken the others. Computed in float32 at least, without a graph; non-finite values become 0 (ours), and
    `floor` (ours) bounds the gain where the teacher predicts the noise perfectly.
    """
    teacher, auxiliary, eps = (_wide(value.detach()) for value in (teacher, auxiliary, eps))
    scale = _sample_mean((teacher - eps).abs()).clamp_min(floor)
    g = (teacher - auxiliary) / scale.view(-1, *[1] * (teacher.ndim - 1))
    return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)


def icm_loss(latent: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient on `latent` is ``2 g / N``, N the number of elements of the batch (OSEDiff's scale).

    Its value, ``mean(g^2)``, measures nothing that falls while training: in full collapse mean|g| is 1 for ever. Read
    the `diagnostics` instead.
    """
    latent = _wide(latent)
    return F.mse_loss(latent, (latent - gradient).detach())


def auxiliary_loss(auxiliary: Tensor, eps: Tensor) -> Tensor:
    """The plain diffusion loss ``mean |eps_psi - eps|^2`` (Ho et al., arXiv 2006.11239, equation 14), in float32."""
    return F.mse_loss(_wide(auxiliary), _wide(eps))


def diagnostics(teacher: Tensor, auxiliary: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """What tells a living regulariser from a collapsed one, each [N]. Lemma 1 of ICM-SR in measurable form (ours).

    - ``rho``: mean|eps_phi - eps_psi| / mean|eps_phi - eps|, which is also mean|g|;
    - ``cos``: cosine between g and the SDS direction eps_phi - eps;
    - ``mse_auxiliary``, ``mse_teacher``: mean squared error of either prediction against the true noise.

    Collapse, VSD fallen back to SDS, is rho -> 1 AND cos -> 1 AND mse_auxiliary -> 0 at t in [.2, .8] T: the auxiliary
    then names the very noise that was added. None of the three says it alone.
    """
    teacher, auxiliary, eps = (_wide(value.detach()) for value in (teacher, auxiliary, eps))
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


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _sample_mean(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1)


@dataclass
class BinnedMeans:
    """Running sums by timestep bin, so that means over a logging interval, and over processes, are exact."""

    steps: int
    """T of the schedule."""
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], t: Tensor) -> None:
        """Adds `values` (each [N]) seen at timesteps `t` [N]."""
        bins = (t.cpu() * BINS // self.steps).clamp(0, BINS - 1)
        for name, value in values.items():
            table = self.sums.setdefault(name, torch.zeros(2, BINS, dtype=torch.float64))
            table[0].index_add_(0, bins, value.detach().cpu().double())
            table[1].index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))

    def take(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Means as ``NAME/0.2-0.4`` since the last call, over all processes; empty bins are left out."""
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
