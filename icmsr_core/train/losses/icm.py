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

import torch
import torch.nn.functional as F
from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, ``u + scale (c - u)`` (Ho & Salimans, arXiv 2207.12598); 1 is `conditional` itself."""
    return unconditional + scale * (conditional - unconditional)


def icm_gradient(teacher: Tensor, auxiliary: Tensor, eps: Tensor, floor: float = 1e-4) -> Tensor:
    """The direction g [N, C, H, W] along which the generator's latent is to be lowered (ICM-SR equation 5; see above).

    ``(eps_phi - eps_psi) / max(mean|eps_phi - eps|, floor)``, the mean over each sample on its own: one easy picture
    must not weaken the others. Computed in float32 at least, without a graph; non-finite values become 0 (ours), and
    `floor` (ours) bounds the gain where the teacher predicts the noise perfectly.
    """
    teacher, auxiliary, eps = (at_least_float32(value.detach()) for value in (teacher, auxiliary, eps))
    scale = _sample_mean((teacher - eps).abs()).clamp_min(floor)
    g = (teacher - auxiliary) / scale.view(-1, *[1] * (teacher.ndim - 1))
    return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)


def icm_loss(latent: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient on `latent` is ``2 g / N``, N the number of elements of the batch (OSEDiff's scale).

    Its value, ``mean(g^2)``, measures nothing that falls while training: in full collapse mean|g| is 1 for ever. Read
    the `diagnostics` instead.
    """
    latent = at_least_float32(latent)
    return F.mse_loss(latent, (latent - gradient).detach())


def auxiliary_loss(auxiliary: Tensor, eps: Tensor) -> Tensor:
    """The plain diffusion loss ``mean |eps_psi - eps|^2`` (Ho et al., arXiv 2006.11239, equation 14), in float32."""
    return F.mse_loss(at_least_float32(auxiliary), at_least_float32(eps))


def at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _sample_mean(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1)
