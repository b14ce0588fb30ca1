"""The teacher's test where the answer is known: Gaussian latents, for which the best denoiser is a formula."""

import math

import pytest
import torch
from torch import Tensor

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.train.losses.teacher import STEP, TIMESTEPS, Reading, logged, read_teacher, table

SCHEDULE = NoiseSchedule()


def latents(spread: float, seed: int = 0, mean: float = 0.0) -> Tensor:
    return mean + spread * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def gaussian(spread: float, mean: float = 0.0):
    """The best prediction of the noise for latents N(mean, spread^2)."""

    def predicted(noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in alphas(t))
        return sigma * (noisy - alpha * mean) / (alpha.square() * spread**2 + sigma.square())

    return predicted


def alphas(t: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones(len(t), 1, 1, 1)
    alpha = SCHEDULE.add_noise(one, torch.zeros_like(one), t).flatten()
    return alpha, (1 - alpha.square()).sqrt()


def readings_of(teacher, auxiliary, latent: Tensor, truth: Tensor) -> dict[int, Reading]:
    networks = {"teacher": teacher, "auxiliary": auxiliary}
    return read_teacher(latent, truth, SCHEDULE, lambda role, noisy, t: networks[role](noisy, t), lambda z: z / 8)


def test_errors_are_those_of_the_formula():
    readings = readings_of(gaussian(1.0), gaussian(0.5), latents(0.5), latents(1.0, seed=1))
    assert list(readings) == list(TIMESTEPS)
    for timestep, reading in readings.items():
        alpha, sigma = (float(value) for value in alphas(torch.tensor([timestep])))
        for found, spread, of in (
            (reading.auxiliary, 0.5, 0.5),
            (reading.truth, 1.0, 1.0),
            (reading.teacher, 1.0, 0.5),
        ):
            gain = sigma / (alpha**2 * spread**2 + sigma**2)
            expected = (1 - gain * sigma) ** 2 + gain**2 * alpha**2 * of**2
            assert found == pytest.approx(expected, rel=0.1), timestep
        assert reading.auxiliary < reading.teacher, "an auxiliary that knows the generator is better on its latents"


def test_a_generator_that_is_too_smooth_is_led_to_more_detail_and_one_that_is_too_rough_to_less():
    smooth = readings_of(gaussian(1.0), gaussian(0.5), latents(0.5), latents(1.0, seed=1))
    rough = readings_of(gaussian(0.5), gaussian(1.0), latents(1.0), latents(0.5, seed=1))
    assert all(reading.detail > 1 for reading in smooth.values())
    assert all(reading.detail < 1 for reading in rough.values())
    # The clean estimates are multiples of the noised latent, so the step's length is known.
    alpha, sigma = (float(value) for value in alphas(torch.tensor([350])))
    gains = [alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) for spread in (1.0, 0.5)]
    moved = STEP * (gains[0] - gains[1])
    noise = (moved * sigma) ** 2 / 0.25
    assert smooth[350].detail == pytest.approx((1 + moved * alpha) ** 2 + noise, rel=0.05)


def test_the_cosine_tells_a_way_home():
    """A generator whose latents are off by a constant: the teacher leads straight back."""
    home = readings_of(gaussian(0.3), gaussian(0.3, mean=1.0), latents(0.3, mean=1.0), latents(0.3))
    assert home[350].cosine > 0.8
    away = readings_of(gaussian(0.3, mean=1.0), gaussian(0.3), latents(0.3, mean=1.0), latents(0.3))
    assert away[350].cosine < -0.8


def test_equal_networks_lead_nowhere():
    for reading in readings_of(gaussian(1.0), gaussian(1.0), latents(1.0), latents(1.0, seed=1)).values():
        assert reading.cosine == 0
        assert reading.detail == 1


def test_noise_is_the_same_in_every_call():
    first, second = (readings_of(gaussian(1.0), gaussian(0.5), latents(1.0), latents(1.0, seed=1)) for _ in range(2))
    assert first == second


def test_flat_pictures_have_no_detail_to_compare():
    flat = torch.zeros(2, 3, 16, 16)
    found = read_teacher(flat, flat, SCHEDULE, lambda role, noisy, t: noisy, lambda z: z * 0)
    assert all(math.isnan(reading.detail) for reading in found.values())


def test_log_and_table_hold_every_reading():
    readings = {350: Reading(0.25, 0.125, 0.2, -0.5, 1.0625)}
    assert logged(readings) == {
        "teacher/350": 0.25,
        "auxiliary/350": 0.125,
        "truth/350": 0.2,
        "cosine/350": -0.5,
        "detail/350": 1.0625,
    }
    assert table(readings).splitlines()[-1] == "| 350 | 0.2500 | 0.1250 | 0.2000 | -0.500 | x 1.062 |"
