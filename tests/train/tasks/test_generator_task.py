"""The ICM regulariser inside the training of a generator: whose turn trains what, and with which gradient."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icmsr_core.measures.dists import load_dists
from icmsr_core.measures.lpips import load_lpips
from icmsr_core.measures.weight_files import DISTS, LPIPS_VGG
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.losses.icm import icm_gradient
from icmsr_core.train.losses.perceptual import PerceptualConfig
from icmsr_core.train.networks.adapters import make_adapter
from icmsr_core.train.networks.bases import BaseNetworks
from icmsr_core.train.networks.conditioning import ConditionConfig, Contexts, GeneratorConditioning, StructureFeatures
from icmsr_core.train.networks.generator import GeneratorNetworks, NetworksConfig
from icmsr_core.train.networks.roles import Roles
from icmsr_core.train.tasks.generator import GeneratorTask, input_of
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.weights.base import BaseFolder, open_base
from tests.support.icm_arithmetic import SCHEDULE, normal, published_gradient
from tests.support.model_files import TINY, write_base

# Two tokens: attention over a single one is constant, and its to_q and to_k would have no gradient.
TWO_TOKENS = replace(TINY, context_tokens=2)


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


def task_without_icm(base: BaseFolder, config: GeneratorConfig) -> GeneratorTask:
    networks = GeneratorNetworks(BaseNetworks(*build_networks(base), base.info), config.networks, False)
    conditioning = GeneratorConditioning(ConditionConfig(), Contexts(base.prompt_embedding()))
    return GeneratorTask(networks, conditioning, base, config, 0)


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


def test_each_network_looks_at_half_of_a_batch_when_it_is_split(base, metric_weights):
    files = {"weights": str(metric_weights / LPIPS_VGG.name), "dists_weights": str(metric_weights / DISTS.name)}
    losses = LossWeights(l2=0, perceptual=1, icm=0, dists=1)
    config = GeneratorConfig(losses=losses, perceptual=PerceptualConfig(kind="lpips", split=True, **files))
    task = task_without_icm(base, config)
    distances = load_lpips(metric_weights / LPIPS_VGG.name), load_dists(metric_weights / DISTS.name)
    batch = task.prepare("generator", make_batch(), 0, 0)
    assert len(batch["sharp"]) > 1
    for some in (slice(None), slice(1)):  # a batch of one is looked at by both
        small = {name: value if name.startswith("weight/") else value[some] for name, value in batch.items()}
        single = len(small["sharp"]) == 1
        with torch.no_grad():
            found, _ = task("generator", small)
            result, truth = task.generate(input_of(small))[1], bytes_to_signed(small["sharp"])
            for name, distance, first in zip(("perceptual", "dists"), distances, (0, 0 if single else 1)):
                wanted = distance(result[first::2], truth[first::2])
                assert found[name].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_without_the_regulariser_there_is_no_auxiliary(base):
    task = task_without_icm(base, GeneratorConfig(losses=LossWeights(l2=1, perceptual=0, icm=0)))
    assert [player.name for player in task.players()] == ["generator"]
    assert not task.networks.trained("auxiliary")
    losses, carried = task("generator", task.prepare("generator", make_batch(), 0, 0))
    assert "icm" not in losses
    assert carried == {}


def test_dists_is_measured_of_the_result_and_trains_the_generator(base, metric_weights):
    losses = LossWeights(l2=0, perceptual=0, icm=0, dists=2)
    config = GeneratorConfig(losses=losses, perceptual=PerceptualConfig(dists_weights=str(metric_weights / DISTS.name)))
    task = task_without_icm(base, config)
    batch = task.prepare("generator", make_batch(), 0, 0)
    found, _ = task("generator", batch)
    with torch.no_grad():
        result = task.generate(input_of(batch))[1]
        wanted = load_dists(metric_weights / DISTS.name)(result, bytes_to_signed(batch["sharp"]))
    assert found["dists"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx(2 * wanted.item(), rel=1e-5)
    found["loss"].backward()
    gradients = lora_gradients(task, "generator")
    assert any(bool(value.abs().max() > 0) for value in gradients.values() if value is not None)
    assert all(value.grad is None for value in task.dists.parameters())


def test_a_shift_lets_the_perceptual_networks_see_each_sample_from_its_own_corner(base, metric_weights):
    perceptual = PerceptualConfig("lpips", str(metric_weights / LPIPS_VGG.name), shift=7)
    config = GeneratorConfig(losses=LossWeights(l2=0, perceptual=1, icm=0), perceptual=perceptual)
    task = task_without_icm(base, config)
    batch = task.prepare("generator", make_batch(), 0, 0)
    corners = batch["corner"].tolist()
    assert len({tuple(corner) for corner in corners}) == 3
    with torch.no_grad():
        found = task("generator", batch)[0]["perceptual"]
        result, truth = task.generate(input_of(batch))[1], bytes_to_signed(batch["sharp"])
        measure = load_lpips(metric_weights / LPIPS_VGG.name)
        alone = [
            measure(*(pictures[n : n + 1, :, top : top + 57, left : left + 57] for pictures in (result, truth)))
            for n, (top, left) in enumerate(corners)
        ]
    assert found.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


def test_a_base_in_fewer_bits_still_trains_in_float32(base):
    loaded = BaseNetworks(*build_networks(base, torch.bfloat16), base.info)
    networks = GeneratorNetworks(loaded, NetworksConfig(base_dtype="bf16"), True)
    for player in ("generator", "auxiliary"):
        assert {value.dtype for value in networks.trained(player).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        latent = networks.encode(input_of(make_batch()))
        eps = networks.noise("auxiliary", latent, torch.tensor([1, 500, 900]), torch.zeros(3, 2, 32), None)
    assert latent.dtype == eps.dtype == torch.float32
