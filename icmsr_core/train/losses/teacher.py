"""A test for the teacher: does it know the generator's latents, and does it ask for more detail or for less?

ICM moves the generator along teacher minus auxiliary. This looks at that direction, by noise level, before a generator
is trained along it: it needs an auxiliary that knows the generator's latents, and no step of the generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbone.noise_schedule import NoiseSchedule
from ...measures.metrics import high_frequency_ratio
from ...pictures.files import FloatArray, from_tensor
from ...pictures.ranges import signed_to_unit

TIMESTEPS = (50, 100, 200, 350, 500, 700)
"""Noise levels: t of a schedule of 1000 steps."""
STEP = 0.1
"""How far along teacher minus auxiliary the decoded picture is looked at."""


@dataclass(frozen=True)
class Reading:
    """What the test found at one noise level: means over samples."""

    teacher: float
    """The teacher's mean squared error on the generator's latents, as a prediction of the noise."""
    auxiliary: float
    """The auxiliary's: below the teacher's once it has learned the generator's latents."""
    truth: float
    """The teacher's on the truth's latents. The teacher's error on the generator's must not be far above it."""
    cosine: float
    """Cosine of teacher minus auxiliary (of the clean estimates) with truth minus generator."""
    detail: float
    """High-frequency power of the picture after a step of `STEP` along teacher minus auxiliary, over that before."""


Judge = Callable[[Literal["teacher", "auxiliary"], Tensor, Tensor], Tensor]
"""The noise that ``teacher`` or ``auxiliary`` sees in a noised latent at timesteps t."""
Decode = Callable[[Tensor], Tensor]
"""From latents to pictures [N, 3, H, W] in [-1, 1]."""


@torch.no_grad()
def read_teacher(
    latent: Tensor, truth: Tensor, schedule: NoiseSchedule, judge: Judge, decode: Decode
) -> dict[int, Reading]:
    """The readings at `TIMESTEPS` (those within the schedule) for the generator's latents and the truth's [N, C, h, w].

    The noise is the same in every call (ours).
    """
    before = _pictures(decode(latent))
    readings = {}
    for timestep in TIMESTEPS:
        if timestep >= schedule.steps:
            continue
        t = torch.full((len(latent),), timestep, device=latent.device)
        eps = torch.randn(latent.shape, generator=torch.Generator().manual_seed(timestep)).to(latent)
        noisy = schedule.add_noise(latent, eps, t)
        teacher, auxiliary = judge("teacher", noisy, t), judge("auxiliary", noisy, t)
        of_truth = judge("teacher", schedule.add_noise(truth, eps, t), t)
        clean = [schedule.x0_from_output("eps", noisy, noise, t) for noise in (teacher, auxiliary)]
        direction = clean[0] - clean[1]
        after = _pictures(decode(latent + STEP * direction))
        ratios = [high_frequency_ratio(one, other) for one, other in zip(after, before)]
        defined = [ratio for ratio in ratios if not math.isnan(ratio)]
        readings[timestep] = Reading(
            teacher=float(F.mse_loss(teacher, eps)),
            auxiliary=float(F.mse_loss(auxiliary, eps)),
            truth=float(F.mse_loss(of_truth, eps)),
            cosine=float(F.cosine_similarity(direction.flatten(1), (truth - latent).flatten(1), dim=1).mean()),
            detail=sum(defined) / len(defined) if defined else math.nan,
        )
    return readings


def logged(readings: Mapping[int, Reading]) -> dict[str, float]:
    """Values for a log: ``detail/350`` and so on."""
    return {f"{name}/{t}": value for t, reading in readings.items() for name, value in vars(reading).items()}


def table(readings: Mapping[int, Reading]) -> str:
    """The readings as a Markdown table."""
    lines = [
        "| t | teacher's error | auxiliary's | teacher's on the truth | cosine with the way home | detail of a step |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for t, r in readings.items():
        lines.append(
            f"| {t} | {r.teacher:.4f} | {r.auxiliary:.4f} | {r.truth:.4f} | {r.cosine:+.3f} | x {r.detail:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _pictures(decoded: Tensor) -> list[FloatArray]:
    return [from_tensor(one[None]) for one in signed_to_unit(decoded.float().cpu()).clamp(0, 1)]
