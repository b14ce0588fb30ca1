"""The schedule against diffusers' schedulers, and the closed forms against each other in float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.backbone.prediction import PREDICTIONS, check_prediction
from icmsr_core.errors import IcmsrError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
schedule = NoiseSchedule()
timesteps = st.integers(0, 999)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_alphas_are_those_of_diffusers(kind: type) -> None:
    theirs = kind(**SD).alphas_cumprod
    assert schedule.alphas_cumprod.shape == (1000,)
    assert schedule.alphas_cumprod.dtype == torch.float64
    # diffusers multiplies a thousand factors in float32.
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.double(), rtol=2e-5, atol=0)


def test_alphas_of_other_betas_and_steps_are_those_of_diffusers() -> None:
    other = {**SD, "beta_start": 0.0015, "beta_end": 0.0195, "num_train_timesteps": 50}
    theirs = DDPMScheduler(**other).alphas_cumprod
    torch.testing.assert_close(NoiseSchedule(0.0015, 0.0195, 50).alphas_cumprod, theirs.double(), rtol=2e-5, atol=0)


def test_alphas_are_the_running_product_of_one_minus_the_betas() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)


def test_last_timestep_has_the_published_alpha() -> None:
    a, s = schedule.a_s(999, torch.zeros(1, dtype=torch.float64))
    assert round(a.item(), 5) == 0.06826
    assert math.isclose(a.item() ** 2 + s.item() ** 2, 1, abs_tol=1e-12)
    assert (s / a).item() == pytest.approx(14.6, abs=0.05)


@pytest.mark.parametrize("t", [0, 1, 200, 999])
def test_noised_latents_are_those_of_diffusers(t: int) -> None:
    x0, eps = noise(2, 3, 4, 5, dtype=torch.float32), noise(2, 3, 4, 5, seed=1, dtype=torch.float32)
    theirs = DDPMScheduler(**SD).add_noise(x0, eps, torch.tensor([t, t]))
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("t", [1, 250, 999])
def test_clean_estimates_are_those_of_ddim(prediction: str, theirs: str, t: int) -> None:
    z, output = noise(1, 4, 6, 5, dtype=torch.float32), noise(1, 4, 6, 5, seed=1, dtype=torch.float32)
    scheduler = DDIMScheduler(**SD, prediction_type=theirs, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(1000)
    expected = scheduler.step(output, t, z).pred_original_sample
    found = schedule.x0_from_output(prediction, z, output, t)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_velocity_is_that_of_diffusers(t: int) -> None:
    x0, eps = noise(2, 3, 2, 2, dtype=torch.float32), noise(2, 3, 2, 2, seed=1, dtype=torch.float32)
    theirs = DDPMScheduler(**SD).get_velocity(x0, eps, torch.tensor([t, t]))
    z = schedule.add_noise(x0.double(), eps.double(), t)
    torch.testing.assert_close(schedule.v_from_x0(z, x0.double(), t), theirs.double(), rtol=0, atol=2e-6)


@given(t=timesteps, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_every_prediction_leads_back_to_x0_and_eps(t: int, seed: int) -> None:
    x0, eps = noise(1, 2, 3, 4, seed=seed), noise(1, 2, 3, 4, seed=seed + 1000)
    z = schedule.add_noise(x0, eps, t)
    outputs = {"eps": eps, "v": schedule.v_from_x0(z, x0, t), "residual": z - x0}
    assert set(outputs) == set(PREDICTIONS)
    assert (schedule.eps_from_x0(z, x0, t) - eps).abs().max() < 1e-10
    for prediction, output in outputs.items():
        assert (schedule.x0_from_output(prediction, z, output, t) - x0).abs().max() < 1e-10, prediction
        assert (schedule.eps_from_output(prediction, z, output, t) - eps).abs().max() < 1e-10, prediction


@given(t=timesteps)
@settings(deadline=None, max_examples=30)
def test_outputs_of_any_network_convert_consistently(t: int) -> None:
    """The output need not be consistent with any x0: eps form and x0 form must still describe the same point."""
    z, output = noise(1, 2, 3, 4), noise(1, 2, 3, 4, seed=5)
    for prediction in PREDICTIONS:
        x0 = schedule.x0_from_output(prediction, z, output, t)
        eps = schedule.eps_from_output(prediction, z, output, t)
        assert (schedule.add_noise(x0, eps, t) - z).abs().max() < 1e-10, prediction


def test_residual_is_the_difference_at_every_timestep() -> None:
    z, output = noise(1, 2, 3, 4), noise(1, 2, 3, 4, seed=5)
    for t in (0, 999):
        assert torch.equal(schedule.x0_from_output("residual", z, output, t), z - output)


def test_timesteps_of_each_sample() -> None:
    t = torch.tensor([3, 999, 400])
    x0, eps, output = (noise(3, 2, 4, 4, seed=seed) for seed in range(3))
    z = schedule.add_noise(x0, eps, t)
    for index, one in enumerate(t.tolist()):
        row = slice(index, index + 1)
        assert torch.equal(z[row], schedule.add_noise(x0[row], eps[row], one))
        for prediction in PREDICTIONS:
            together = schedule.x0_from_output(prediction, z, output, t)[row]
            assert torch.equal(together, schedule.x0_from_output(prediction, z[row], output[row], one)), prediction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coefficients_are_rounded_once(dtype: torch.dtype) -> None:
    """The product of a thousand factors is made in float64, so even float16 gets the nearest value."""
    a, s = schedule.a_s(999, torch.zeros(1, 1, 1, 1, dtype=dtype))
    cumprod = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert a.dtype == s.dtype == dtype
    assert a.shape == s.shape == (), "CPU scalars, which need not be copied to a device"
    assert a.item() == torch.tensor(cumprod**0.5, dtype=dtype).item()
    assert s.item() == torch.tensor((1 - cumprod) ** 0.5, dtype=dtype).item()


def test_a_schedule_first_used_in_inference_mode_still_trains() -> None:
    fresh = NoiseSchedule()
    with torch.inference_mode():
        fresh.add_noise(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 10)
    x0 = torch.ones(1, 1, 1, 1, requires_grad=True)
    fresh.add_noise(x0, torch.ones(1, 1, 1, 1), torch.tensor([999])).sum().backward()
    assert x0.grad is not None
    assert x0.grad.item() == pytest.approx(0.06826, abs=1e-5)


@pytest.mark.parametrize("t", [-1, 1000])
def test_timesteps_outside_the_schedule_are_refused(t: int) -> None:
    z = noise(1, 1, 1, 1)
    for call in (
        lambda: schedule.check_timestep(t),
        lambda: schedule.a_s(t, z),
        lambda: schedule.add_noise(z, z, torch.tensor([t])),
    ):
        with pytest.raises(IcmsrError, match=rf"between 0 and 999, got \[?{t}"):
            call()
    assert [schedule.check_timestep(t) for t in (0, 999)] == [0, 999]


@pytest.mark.parametrize("betas", [(0, 0.1), (0.2, 0.1), (0.1, 1.0), (-0.1, 0.1), (float("nan"), 0.1)])
def test_betas_out_of_order_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(IcmsrError, match="betas must satisfy"):
        NoiseSchedule(*betas)


def test_a_schedule_without_steps_is_refused() -> None:
    with pytest.raises(IcmsrError, match="at least 1 step, got 0"):
        NoiseSchedule(steps=0)


def test_unknown_predictions_are_named() -> None:
    z = noise(1, 1, 1, 1)
    assert [check_prediction(name) for name in PREDICTIONS] == ["eps", "v", "residual"]
    for call in (
        lambda: check_prediction("epsilon"),
        lambda: schedule.x0_from_output("epsilon", z, z, 5),
        lambda: schedule.eps_from_output("epsilon", z, z, 5),
    ):
        with pytest.raises(IcmsrError, match="eps, v, residual, got 'epsilon'"):
            call()
