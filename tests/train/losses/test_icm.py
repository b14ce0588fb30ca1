"""The ICM regulariser against its published form, on toy problems with known scores."""

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.draws import TimestepConfig, all_timesteps, timesteps
from icmsr_core.train.losses.diagnostics import BINS, BinnedMeans, diagnostics, saturation, variety
from icmsr_core.train.losses.icm import auxiliary_loss, guided, icm_gradient, icm_loss
from tests.support.icm_arithmetic import SCHEDULE, normal, published_gradient

SHAPE = (5, 4, 6, 6)


def test_the_gradient_is_that_of_clean_estimates():
    latent, teacher, auxiliary, eps = (normal(*SHAPE, seed=seed) for seed in range(4))
    t = torch.tensor([0, 20, 500, 979, 999])
    noisy = SCHEDULE.add_noise(latent, eps, t)
    published = published_gradient(latent, noisy, t, teacher, auxiliary)
    g = icm_gradient(teacher, auxiliary, eps)
    assert g.dtype == torch.float64
    for ours, theirs in zip(g, published):
        assert float((ours - theirs).abs().max()) < 1e-9 * float(theirs.abs().max())


def test_the_loss_puts_two_g_over_n_on_the_latent():
    latent, g = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1).requires_grad_()
    loss = icm_loss(latent, g)
    loss.backward()
    assert torch.allclose(latent.grad, 2 * g.detach() / g.numel(), rtol=1e-12, atol=1e-15)
    assert g.grad is None, "g is a constant of the loss"
    assert loss.item() == pytest.approx(g.square().mean().item(), rel=1e-12)
    other = latent.detach().clone().requires_grad_()
    F.mse_loss(other, (other - g).detach()).backward()  # the published surrogate
    assert torch.equal(latent.grad, other.grad)


def test_the_auxiliary_loss_is_the_mean_squared_error():
    auxiliary, eps = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1)
    loss = auxiliary_loss(auxiliary, eps)
    assert loss.item() == pytest.approx(((auxiliary - eps) ** 2).mean().item(), rel=1e-12)
    loss.backward()
    assert torch.allclose(auxiliary.grad, 2 * (auxiliary.detach() - eps) / eps.numel(), rtol=1e-12)


def gaussian_noise(noisy: Tensor, mean: Tensor | float, variance: float, t: Tensor) -> Tensor:
    """The exact noise prediction for data N(mean, variance): -s_t times the score of N(a mean, a^2 variance + s^2)."""
    a, s = SCHEDULE.a_s(t, noisy)
    return s * (noisy - a * mean) / (a * a * variance + s * s)


@pytest.mark.parametrize("spread", [1.0, 0.0], ids=["cloud", "point"])
@pytest.mark.parametrize("sign", [1, -1], ids=["along -g", "along +g"])
def test_the_gradient_points_at_the_teacher(spread, sign):
    """Teacher N(2, 1); the generator is N(m, spread^2) with m trained; the auxiliary knows the generator exactly."""
    mean = torch.full((), -1.0, dtype=torch.float64, requires_grad=True)
    distances = []
    for step in range(60):
        latent = mean + spread * normal(64, 1, 2, 2, seed=2 * step)
        eps = normal(64, 1, 2, 2, seed=2 * step + 1)
        t = torch.randint(20, 980, (64,), generator=torch.Generator().manual_seed(step))
        noisy = SCHEDULE.add_noise(latent.detach(), eps, t)
        teacher = gaussian_noise(noisy, 2.0, 1.0, t)
        auxiliary = gaussian_noise(noisy, mean.detach(), spread**2, t)
        (slope,) = torch.autograd.grad(icm_loss(latent, sign * icm_gradient(teacher, auxiliary, eps)), mean)
        with torch.no_grad():
            mean -= 0.1 * slope
        distances.append(abs(mean.item() - 2.0))
    if sign > 0:
        assert distances[-1] < 0.15
        assert all(later <= sooner + 1e-9 for sooner, later in itertools.pairwise(distances[:16]))
    else:
        assert distances[-1] > 5.0, "the wrong sign drives the generator away"


def test_full_collapse_is_seen_and_its_gradient_never_shrinks():
    teacher, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    for nearness in (1.0, 1e-2):  # however good the teacher is
        close = eps + nearness * (teacher - eps)
        g, found = icm_gradient(close, eps, eps), diagnostics(close, eps, eps)
        assert torch.allclose(g.abs().mean(dim=(1, 2, 3)), torch.ones(5, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(found["rho"], torch.ones(5, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(found["cos"], torch.ones(5, dtype=torch.float64), rtol=1e-9)
        assert torch.equal(found["mse_auxiliary"], torch.zeros(5, dtype=torch.float64))
        assert bool((found["mse_teacher"] > 0).all())


def test_where_teacher_and_auxiliary_agree_there_is_no_gradient():
    teacher, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert not icm_gradient(teacher, teacher.clone(), eps).any()
    assert torch.equal(diagnostics(teacher, teacher, eps)["rho"], torch.zeros(5, dtype=torch.float64))


def test_diagnostics_are_those_of_numpy():
    teacher, auxiliary, eps = (normal(*SHAPE, seed=seed) for seed in range(3))
    found = diagnostics(teacher, auxiliary, eps)
    for n in range(SHAPE[0]):
        phi, psi, e = (value[n].numpy().ravel() for value in (teacher, auxiliary, eps))
        cosine = np.dot(phi - psi, phi - e) / np.linalg.norm(phi - psi) / np.linalg.norm(phi - e)
        assert found["rho"][n].item() == pytest.approx(np.abs(phi - psi).mean() / np.abs(phi - e).mean(), rel=1e-12)
        assert found["cos"][n].item() == pytest.approx(cosine, rel=1e-12)
        assert found["mse_auxiliary"][n].item() == pytest.approx(((psi - e) ** 2).mean(), rel=1e-12)
        assert found["mse_teacher"][n].item() == pytest.approx(((phi - e) ** 2).mean(), rel=1e-12)
    g = icm_gradient(teacher, auxiliary, eps)
    assert torch.allclose(found["rho"], g.abs().mean(dim=(1, 2, 3)), rtol=1e-12)
    assert all(not value.requires_grad for value in diagnostics(teacher.requires_grad_(), auxiliary, eps).values())


def test_one_sample_does_not_change_anothers_gradient():
    teacher, auxiliary, eps = (normal(*SHAPE, seed=seed) for seed in range(3))
    before = icm_gradient(teacher, auxiliary, eps)
    easy = teacher.clone()
    easy[0] = eps[0] + 1e-3 * (teacher[0] - eps[0])
    after = icm_gradient(easy, auxiliary, eps)
    assert torch.equal(before[1:], after[1:])
    assert float(after[0].abs().mean()) > 100 * float(before[0].abs().mean())


def test_the_floor_bounds_the_gain():
    teacher, auxiliary = normal(*SHAPE), normal(*SHAPE, seed=1)
    for floor in (1e-4, 0.5):
        g = icm_gradient(teacher, auxiliary, teacher.clone(), floor)  # the teacher names the noise perfectly
        assert torch.allclose(g, (teacher - auxiliary) / floor, rtol=1e-12)
    assert torch.equal(
        icm_gradient(teacher, auxiliary, normal(*SHAPE, seed=2), 1e-4),
        icm_gradient(teacher, auxiliary, normal(*SHAPE, seed=2), 1e-9),
    ), "no part above the floor"


def test_non_finite_predictions_give_no_gradient():
    teacher, auxiliary, eps = (normal(*SHAPE, seed=seed) for seed in range(3))
    good = icm_gradient(teacher, auxiliary, eps)
    auxiliary[1, 2, 3, 4] = float("nan")
    auxiliary[2, 0, 0, 0] = float("inf")
    teacher[3] = float("nan")
    g = icm_gradient(teacher, auxiliary, eps)
    assert bool(g.isfinite().all())
    assert g[1, 2, 3, 4] == 0
    assert g[2, 0, 0, 0] == 0
    assert not g[3].any()
    for sample in (0, 4):
        assert torch.equal(g[sample], good[sample])
    assert float((g[1] - good[1]).abs().sum()) == pytest.approx(float(good[1, 2, 3, 4].abs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Where mean|eps_phi - eps| is small, a sum in half precision would be rounded away."""
    teacher, auxiliary, eps = (normal(2, 4, 64, 64, seed=seed).to(dtype) for seed in range(3))
    wide = [value.float() for value in (teacher, auxiliary, eps)]
    g = icm_gradient(teacher, auxiliary, eps)
    assert g.dtype == torch.float32
    assert torch.equal(g, icm_gradient(*wide))
    assert all(value.dtype == torch.float32 for value in diagnostics(teacher, auxiliary, eps).values())
    latent = normal(2, 4, 64, 64, seed=4).to(dtype).requires_grad_()
    assert icm_loss(latent, g).dtype == torch.float32
    assert auxiliary_loss(auxiliary, eps).dtype == torch.float32
    assert auxiliary_loss(auxiliary, eps).item() == pytest.approx(F.mse_loss(wide[1], wide[2]).item(), rel=1e-6)


def test_uniform_timesteps_are_drawn_equally_often():
    law = TimestepConfig()
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = timesteps(u, 1000, law)
    assert t.dtype == torch.int64
    assert (int(t.min()), int(t.max())) == (20, 979), "[20, 980), as OSEDiff draws"
    counts = torch.bincount(t, minlength=980)[20:]
    expected = len(u) / 960
    # Chi-square of 959 degrees of freedom: mean 959, deviation 44; five deviations.
    assert float(((counts - expected) ** 2 / expected).sum()) < 959 + 5 * 44
    assert torch.equal(
        timesteps(torch.arange(1000, dtype=torch.float64) / 1000 + 5e-4, 1000, all_timesteps()), torch.arange(1000)
    )


def test_cubic_timesteps_follow_their_law():
    """t = (1 - u^3) T: P(t < x T) = 1 - (1 - x)^(1/3), mean 3/4."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    share = timesteps(u, 1000, all_timesteps("cubic")).double() / 1000
    assert share.mean().item() == pytest.approx(0.75, abs=1e-3)
    for x in (0.1, 0.5, 0.9):
        assert float((share < x).double().mean()) == pytest.approx(1 - (1 - x) ** (1 / 3), abs=2e-3)


@pytest.mark.parametrize("law", ["uniform", "cubic"])
@pytest.mark.parametrize(
    ("low", "high", "steps"), [(0.02, 0.98, 1000), (0.0, 1.0, 1000), (0.0, 1.0, 1), (0.5, 0.501, 10)]
)
def test_timesteps_stay_in_range_at_the_ends(law, low, high, steps):
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    t = timesteps(u, steps, TimestepConfig(low, high, law))
    first = round(low * steps)
    last = max(first, round(high * steps) - 1)
    assert bool(((first <= t) & (t <= last)).all())
    at_zero, at_one = (first, last) if law == "uniform" else (last, first)
    assert (int(t[0]), int(t[2])) == (at_zero, at_one)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.5, 0.5, "uniform"), "0.5"),
        ((-0.1, 0.5, "uniform"), "-0.1"),
        ((0.0, 1.1, "uniform"), "1.1"),
        ((0.0, 1.0, "square"), "uniform, cubic, got 'square'"),
    ],
)
def test_wrong_timestep_ranges_are_refused(values, words):
    with pytest.raises(IcmsrError, match=words):
        TimestepConfig(*values)


def test_guidance_moves_from_the_unconditional_prediction_through_the_conditional_one():
    c, u = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert torch.allclose(guided(c, u, 1.0), c, rtol=1e-12)
    assert torch.equal(guided(c, u, 0.0), u)
    assert torch.allclose(guided(c, u, 7.5), 7.5 * c - 6.5 * u, rtol=1e-9)


def test_saturation_is_the_share_of_samples_outside_the_range():
    image = torch.tensor([[-1.5, -1.0, 0.0, 1.0], [1.001, 2.0, 0.5, -0.5]]).reshape(1, 2, 2, 2)
    assert saturation(image).item() == pytest.approx(3 / 8)


def test_variety_is_the_spread_of_the_outputs_over_that_of_the_truths():
    truth = normal(6, 3, 8, 8, dtype=torch.float32)
    middle = truth.mean(dim=0, keepdim=True)
    assert variety(truth, truth).item() == pytest.approx(1, rel=1e-6)
    assert variety(middle + 0.25 * (truth - middle), truth).item() == pytest.approx(0.25, rel=1e-5)
    assert variety(middle.expand_as(truth), truth).item() == pytest.approx(0, abs=1e-5), "all outputs alike"
    expected = truth.numpy().std(axis=0, ddof=1).mean() / (2 * truth).numpy().std(axis=0, ddof=1).mean()
    assert variety(truth, 2 * truth).item() == pytest.approx(expected, rel=1e-5)


def test_a_single_picture_has_no_variety():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert variety(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)).isnan()


def test_binned_means_are_exact():
    meter = BinnedMeans(1000)
    t = torch.tensor([0, 199, 200, 999, 799])
    first, second = normal(5, seed=1), normal(5, seed=2)
    meter.add({"rho": first, "cos": second}, t)
    meter.add({"rho": second}, torch.flip(t, [0]))
    found = meter.take()
    expected = {}
    for name, values, steps in (("rho", [*first, *second], [*t, *t.flip(0)]), ("cos", second, t)):
        for index in range(BINS):
            chosen = [float(value) for value, step in zip(values, steps) if int(step) * BINS // 1000 == index]
            if chosen:
                expected[f"{name}/{index / 5:.1f}-{(index + 1) / 5:.1f}"] = float(np.mean(chosen))
    assert found == pytest.approx(expected, rel=1e-12)
    assert "rho/0.4-0.6" not in found, "a bin that nothing fell into is left out"
    assert meter.take() == {}, "and a new interval begins"
