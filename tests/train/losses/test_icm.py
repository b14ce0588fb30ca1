"""The ICM regulariser against its published form, on toy problems with known scores, and inside the training task."""

import copy
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.data.draws import TimestepConfig, all_timesteps, timesteps
from icmsr_core.train.losses.diagnostics import BINS, BinnedMeans, diagnostics, saturation, variety
from icmsr_core.train.losses.icm import auxiliary_loss, guided, icm_gradient, icm_loss
from icmsr_core.train.networks.adapters import make_adapter
from icmsr_core.train.networks.bases import BaseNetworks
from icmsr_core.train.networks.conditioning import ConditionConfig, Contexts, GeneratorConditioning, StructureFeatures
from icmsr_core.train.networks.generator import GeneratorNetworks, NetworksConfig
from icmsr_core.train.networks.roles import Roles
from icmsr_core.train.tasks.generator import GeneratorTask, input_of
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.weights.base import BaseFolder, open_base
from tests.support.model_files import TINY, write_base

# Two tokens: attention over a single one is constant, and its to_q and to_k would have no gradient.
TWO_TOKENS = replace(TINY, context_tokens=2)
SCHEDULE = NoiseSchedule()
SHAPE = (5, 4, 6, 6)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def published_gradient(latent: Tensor, noisy: Tensor, t: Tensor, teacher: Tensor, auxiliary: Tensor) -> Tensor:
    """OSEDiff's gradient from predicted noise, written out from its equation 9: clean estimates, then a division."""
    cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    a, s = cumprod.sqrt().view(-1, 1, 1, 1), (1 - cumprod).sqrt().view(-1, 1, 1, 1)
    x0_teacher, x0_auxiliary = (noisy - s * teacher) / a, (noisy - s * auxiliary) / a
    return (x0_auxiliary - x0_teacher) / (latent - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)


# The pure functions.


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


# Inside the task.


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseFolder:
    return open_base(write_base(tmp_path_factory.mktemp("base"), TWO_TOKENS))


def fill_lora(roles: Roles, seed: int) -> None:
    """LoRA as after some training: zero B would make all roles one."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role in roles.ranks:
            for parameter in roles.parameters(role).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))


def make_task(base: BaseFolder, kind: str = "icm", guidance: float = 1.0, **more: object) -> GeneratorTask:
    """ICM alone, with LoRA that is not zero; for text, captions that differ from one another and from the constant."""
    loaded = BaseNetworks(*build_networks(base), base.info)
    config = GeneratorConfig(losses=LossWeights(l2=0, perceptual=0, icm=1), prediction="residual", timestep=200, **more)
    networks = GeneratorNetworks(loaded, config.networks, True)
    fill_lora(networks.unet_roles, 1)
    fill_lora(networks.vae_roles, 2)
    condition = ConditionConfig(kind=kind, guidance=guidance)
    features = None
    if condition.names:
        torch.manual_seed(3)
        features = StructureFeatures([make_adapter(condition.channels, 8, (32, 64))], [condition.channels], [1.0])
    constant = base.prompt_embedding()
    captions, negative = normal(3, 2, 32, seed=5, dtype=torch.float32), normal(2, 32, seed=6, dtype=torch.float32)
    contexts = Contexts(constant, captions, negative) if kind == "text" else Contexts(constant)
    return GeneratorTask(networks, GeneratorConditioning(condition, contexts, features), base, config, 0)


def make_batch(count: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    return {
        "sharp": torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=random),
        "low": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random),
        "index": torch.arange(count) + 40,
        "caption": torch.tensor([2, 0, 1, 1][:count]),
    }


def lora_gradients(task: GeneratorTask, player: str) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in task.networks.trained(player).items()}


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two sets of gradients over the norm of the second."""
    difference = sum(float((found[name].double() - value.double()).square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def merged_double(bare: nn.Module, roles: Roles, lora: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """`bare` in float64 with W + B A, differentiable in the float64 LoRA matrices (alpha = rank)."""
    network = copy.deepcopy(bare).double().requires_grad_(False)
    for module, (down, up) in lora.items():
        parent, _, name = module.rpartition(".")
        owner = network.get_submodule(parent)
        layer = getattr(owner, name)
        update = (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
        weight = layer.weight.detach() + update
        del layer._parameters["weight"]
        layer.weight = weight
    return network


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_text_at_guidance_has_the_published_gradient(base, monkeypatch, dtype, tolerance):
    """The whole of OSEDiff's regulariser in plain float64 networks, against the task's own path.

    In float64 the two are one formula. In float32 the rounding of VAE encoder and UNet remains (5.6e-6 was measured).
    """
    task = make_task(base, "text", guidance=7.5)
    if dtype == torch.float64:
        torch.nn.Module.to(task, torch.float64)
        # The task casts results to float32 where networks may run in 16 bits; here float64 is to come through.
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    batch = task.prepare("generator", make_batch(), 10_000, 0)
    losses, carried = task("generator", batch)
    losses["loss"].backward()
    found = lora_gradients(task, "generator")

    # From here on nothing of the task's path is used: merged float64 copies of the base, plain diffusers calls.
    plain = {"unet": build_networks(base)[0], "vae": build_networks(base)[1]}
    matrices: dict[str, Tensor] = {}

    def lora(part: str, role: str) -> dict[str, tuple[Tensor, Tensor]]:
        roles = task.networks.unet_roles if part == "unet" else task.networks.vae_roles
        pairs = {}
        for name, parameter in roles.parameters(role).items():
            module, which = name.split(f".lora_{'A' if '.lora_A.' in name else 'B'}.")[0], "AB"[".lora_B." in name]
            matrices[f"{role}/{part}.{name}"] = value = parameter.detach().double().requires_grad_(role == "generator")
            pairs.setdefault(module, {})[which] = value
        return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}

    def unet(network: nn.Module, latent: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return network(latent, t, encoder_hidden_states=context).sample

    teacher = plain["unet"].double().requires_grad_(False)
    generator = merged_double(plain["unet"], task.networks.unet_roles, lora("unet", "generator"))
    auxiliary = merged_double(plain["unet"], task.networks.unet_roles, lora("unet", "auxiliary"))
    encoder = merged_double(plain["vae"], task.networks.vae_roles, lora("vae", "generator"))
    scaling = base.vae_config["scaling_factor"]
    given = input_of(batch).double()
    z = encoder.encode(given).latent_dist.mode() * scaling
    constant = base.prompt_embedding().double()[None].expand(3, -1, -1)
    latent = z - unet(generator, z, torch.full((3,), 200), constant)  # residual prediction
    with torch.no_grad():
        t, eps = batch["t"], batch["eps"].double()
        noisy = SCHEDULE.add_noise(latent, eps, t)
        text = normal(3, 2, 32, seed=5, dtype=torch.float32).double()[batch["caption"]]
        negative = normal(2, 32, seed=6, dtype=torch.float32).double()[None].expand(3, -1, -1)
        phi_text, phi_plain = unet(teacher, noisy, t, text), unet(teacher, noisy, t, negative)
        psi = unet(auxiliary, noisy, t, text)
        gradient = published_gradient(latent, noisy, t, phi_plain + 7.5 * (phi_text - phi_plain), psi)
    loss = F.mse_loss(latent, (latent - gradient).detach())
    loss.backward()
    expected = {
        name.removeprefix("generator/"): value.grad for name, value in matrices.items() if name.startswith("generator/")
    }
    assert expected.keys() == found.keys()
    assert len(expected) > 60
    assert relative({"latent": carried["latent"]}, {"latent": latent.detach()}) < tolerance
    assert losses["icm"].item() == pytest.approx(loss.item(), rel=tolerance)
    assert relative(found, expected) < tolerance


def test_guidance_sharpens_the_teacher_alone(base):
    """With guidance the auxiliary's prediction stays free of it: the diagnostics of the auxiliary do not change."""
    batch, seen = make_batch(), {}
    for guidance in (1.0, 3.0):
        task = make_task(base, "icm", guidance)
        task("generator", task.prepare("generator", batch, 0, 0))
        seen[guidance] = task.meter.take()
    auxiliary = [key for key in seen[1.0] if key.startswith("mse_auxiliary")]
    assert auxiliary
    for key in auxiliary:
        assert seen[1.0][key] == seen[3.0][key]
        teacher = key.replace("auxiliary", "teacher")
        assert seen[1.0][teacher] != seen[3.0][teacher]


def test_guidance_over_an_image_condition_has_zero_features_in_its_other_half(base):
    task = make_task(base, "icm", guidance=4.0)
    batch = task.prepare("generator", make_batch(), 0, 0)
    with torch.no_grad():
        latent = task.generate(input_of(batch))[0]
        g, _ = task._icm_gradient(latent, batch)
        noisy = task.schedule.add_noise(latent, batch["eps"], batch["t"])
        context, features = base.prompt_embedding()[None].expand(3, -1, -1), task.features(batch["maps"])
        noise = task.networks.noise
        plain = noise("teacher", noisy, batch["t"], context, [torch.zeros_like(level) for level in features])
        sharp = plain + 4 * (noise("teacher", noisy, batch["t"], context, features) - plain)
        psi = noise("auxiliary", noisy, batch["t"], context, features)
    assert torch.allclose(g, icm_gradient(sharp, psi, batch["eps"]), rtol=1e-4, atol=1e-5)


def test_the_generators_turn_trains_the_generator_through_the_latent_alone(base, monkeypatch):
    task = make_task(base)
    task.features.requires_grad_(True)  # even an adapter that could be trained
    batch = task.prepare("generator", make_batch(), 0, 0)
    noise, judged = task.networks.noise, []

    def watched(role: str, *rest: object) -> Tensor:
        judged.append((role, noise(role, *rest)))
        return judged[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(task.networks, "noise", watched)
        losses, carried = task("generator", batch)
    assert [role for role, _ in judged] == ["teacher", "auxiliary"]
    assert not any(value.requires_grad for _, value in judged), "no graph, and no activations kept, for either"
    losses["loss"].backward()
    found = lora_gradients(task, "generator")
    assert all(value is not None and bool(value.any()) for value in found.values())
    others = [parameter for name, parameter in task.named_parameters() if ".generator." not in name]
    assert all(parameter.grad is None for parameter in others), "auxiliary, base and adapter are constants here"
    assert all(value is None for value in lora_gradients(task, "auxiliary").values())
    assert not carried["latent"].requires_grad

    # The same from the two halves: g as a constant, then the generator's own Jacobian at 2 g / N.
    with torch.no_grad():
        noisy = task.schedule.add_noise(carried["latent"], batch["eps"], batch["t"])
        context, features = base.prompt_embedding()[None].expand(3, -1, -1), task.features(batch["maps"])
        roles = ("teacher", "auxiliary")
        phi, psi = (task.networks.noise(role, noisy, batch["t"], context, features) for role in roles)
        g = icm_gradient(phi, psi, batch["eps"])
    parameters = task.networks.trained("generator")
    z = task.networks.encode(input_of(batch))
    latent = task.networks.denoise(z, 200, "residual", context)
    wanted = torch.autograd.grad(latent, list(parameters.values()), 2 * g / g.numel())
    assert relative(found, dict(zip(parameters, wanted))) < 1e-5


def test_the_auxiliarys_turn_trains_the_auxiliary_alone(base):
    task = make_task(base)
    task.features.requires_grad_(True)
    batch = task.prepare("generator", make_batch(), 0, 0)
    _, carried = task("generator", batch)
    attached = {**batch, **carried, "latent": task.generate(input_of(batch))[0]}  # a latent that still has its graph
    assert attached["latent"].requires_grad
    batch = task.prepare("auxiliary", attached, 0, 0)
    losses, _ = task("auxiliary", batch)
    losses["loss"].backward()
    assert all(value is None for value in lora_gradients(task, "generator").values())
    assert all(value is not None and bool(value.any()) for value in lora_gradients(task, "auxiliary").values())
    others = [parameter for name, parameter in task.named_parameters() if ".auxiliary." not in name]
    assert all(parameter.grad is None for parameter in others)
    with torch.no_grad():
        noisy = task.schedule.add_noise(batch["latent"], batch["eps"], batch["t"])
        context = base.prompt_embedding()[None].expand(3, -1, -1)
        predicted = task.networks.noise("auxiliary", noisy, batch["t"], context, task.features(batch["maps"]))
    assert losses["loss"].item() == pytest.approx(F.mse_loss(predicted, batch["eps"]).item(), rel=1e-6)


def test_both_turns_have_noise_of_their_own_and_share_the_latent(base):
    task = make_task(base, networks=NetworksConfig(), auxiliary_steps=2)
    batch = make_batch()
    first = task.prepare("generator", batch, 0, 0)
    _, carried = task("generator", first)
    turns = [task.prepare("auxiliary", {**batch, **carried}, 0, turn) for turn in range(2)]
    assert not torch.equal(first["eps"], turns[0]["eps"])
    assert not torch.equal(turns[0]["eps"], turns[1]["eps"])
    assert torch.equal(turns[0]["latent"], carried["latent"])
    assert torch.equal(turns[0]["maps"], first["maps"])
    again = task.prepare("auxiliary", {**batch, **carried}, 0, 1)
    assert torch.equal(again["eps"], turns[1]["eps"])
    assert torch.equal(again["t"], turns[1]["t"])
    # The auxiliary sees all timesteps, the regulariser its own range.
    many = {**make_batch(1), "index": torch.arange(2000)}
    generator, auxiliary = (task.prepare(player, many, 0, 0)["t"] for player in ("generator", "auxiliary"))
    assert 20 <= int(generator.min()) < int(generator.max()) < 980
    assert int(auxiliary.min()) < 20
    assert int(auxiliary.max()) >= 980


def test_without_the_regulariser_there_is_no_auxiliary(base):
    loaded = BaseNetworks(*build_networks(base), base.info)
    config = GeneratorConfig(losses=LossWeights(l2=1, perceptual=0, icm=0))
    networks = GeneratorNetworks(loaded, config.networks, False)
    task = GeneratorTask(
        networks, GeneratorConditioning(ConditionConfig(), Contexts(base.prompt_embedding())), base, config, 0
    )
    assert [player.name for player in task.players()] == ["generator"]
    assert not networks.trained("auxiliary")
    losses, carried = task("generator", task.prepare("generator", make_batch(), 0, 0))
    assert "icm" not in losses
    assert carried == {}


def test_a_base_in_fewer_bits_still_trains_in_float32(base):
    loaded = BaseNetworks(*build_networks(base, torch.bfloat16), base.info)
    networks = GeneratorNetworks(loaded, NetworksConfig(base_dtype="bf16"), True)
    for player in ("generator", "auxiliary"):
        assert {value.dtype for value in networks.trained(player).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        latent = networks.encode(input_of(make_batch()))
        eps = networks.noise("auxiliary", latent, torch.tensor([1, 500, 900]), torch.zeros(3, 2, 32), None)
    assert latent.dtype == eps.dtype == torch.float32
