"""What the training scripts are made of: the generator's task and networks, losses, schedules, averages."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.precision import autocast
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.data.draws import draw_corners, draw_noise, draw_uniform
from icmsr_core.train.losses.perceptual import PerceptualConfig
from icmsr_core.train.losses.reconstruction import charbonnier, gradient_l1, with_low_frequencies
from icmsr_core.train.losses.spectra import fourier_l1
from icmsr_core.train.networks.adapters import make_adapter
from icmsr_core.train.networks.bases import BaseNetworks
from icmsr_core.train.networks.conditioning import ConditionConfig, Contexts, GeneratorConditioning, StructureFeatures
from icmsr_core.train.networks.generator import GeneratorNetworks, NetworksConfig
from icmsr_core.train.run.loop_config import LoopConfig, learning_rate
from icmsr_core.train.run.state import RunState
from icmsr_core.train.tasks.generator import GeneratorTask, input_of
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.train.tasks.task import Player
from icmsr_core.upscale.color import wavelet_color_fix
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator
from tests.support.model_files import TINY

RECONSTRUCTION = LossWeights(icm=0, perceptual=0)
BATCH = {
    "sharp": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "low": torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    "index": torch.tensor([4, 9]),
    "caption": torch.zeros(2, dtype=torch.int64),
}


def make_task(base: Path, config: GeneratorConfig, condition: ConditionConfig | None = None) -> GeneratorTask:
    folder = open_base(base)
    torch.manual_seed(7)
    judged = config.losses.icm > 0
    networks = GeneratorNetworks(BaseNetworks(*build_networks(folder), folder.info), config.networks, judged)
    condition = condition or ConditionConfig()
    features = None
    if judged and condition.names:
        adapter = make_adapter(condition.channels, 8, TINY.unet_channels)
        features = StructureFeatures([adapter], [condition.channels], [1.0])
    contexts = Contexts(folder.prompt_embedding())
    return GeneratorTask(networks, GeneratorConditioning(condition, contexts, features), folder, config, 0)


def config(losses: LossWeights = RECONSTRUCTION, **networks: object) -> GeneratorConfig:
    return GeneratorConfig(200, "residual", NetworksConfig(**networks), losses)


def losses_of(task: GeneratorTask, player: str = "generator", images: int = 0) -> dict[str, torch.Tensor]:
    batch = task.prepare("generator", BATCH, images, 0)
    losses, brings = task("generator", batch)
    if player == "auxiliary":
        losses, _ = task("auxiliary", task.prepare("auxiliary", {**BATCH, **brings}, images, 0))
    return losses


def reached(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


@pytest.mark.parametrize("decoder", [True, False])
def test_whole_weights_train_what_they_should(tmp_path, base, decoder):
    task = make_task(base, config(weights="whole", train_decoder=decoder))
    networks = task.networks
    before = {key: value.clone() for key, value in networks.generator_vae.decoder.state_dict().items()}
    teacher = {key: value.clone() for key, value in networks.unet.state_dict().items()}
    optimizer = torch.optim.AdamW(task.players()[0].parameters.values(), lr=1e-3)
    losses_of(task)["loss"].backward()
    assert reached(networks.generator_vae.encoder)
    assert reached(networks.generator_unet)
    assert reached(networks.generator_vae.decoder) == decoder
    assert not reached(networks.unet)
    assert not reached(networks.vae)
    optimizer.step()
    same = all(torch.equal(value, before[key]) for key, value in networks.generator_vae.decoder.state_dict().items())
    assert same != decoder
    assert all(torch.equal(value, teacher[key]) for key, value in networks.unet.state_dict().items())
    weights = load_generator(task.export(tmp_path, {})[0])
    assert any(key.startswith("decoder.") for key in weights.vae.tensors) == decoder
    assert any(key.startswith("encoder.") for key in weights.vae.tensors)
    assert not weights.unet.lora


def test_lora_trains_unet_and_encoder_and_nothing_else(tmp_path, base):
    task = make_task(base, config())
    with torch.no_grad():  # B starts at zero, and then A has no gradient
        for parameter in task.players()[0].parameters.values():
            parameter.add_(0.01)
    losses_of(task)["loss"].backward()
    names = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert len(names) == len(task.players()[0].parameters)
    assert all(".lora_" in name and ".generator." in name for name in names)
    assert not any("decoder" in name and "vae" in name for name in names)
    generator = load_generator(task.export(tmp_path, {})[0])
    assert generator.unet.lora
    assert all(name.startswith(("encoder.", "quant_conv")) for name in generator.vae.lora)
    assert (generator.info.rank, generator.info.alpha) == (4, 4.0)


def test_zero_output_starts_as_the_autoencoder(base):
    task = make_task(base, config(weights="whole", zero_output=True))
    vae = task.networks.vae
    with torch.no_grad():
        plain = vae.decode(vae.encode(input_of(BATCH)).latent_dist.mode()).sample
        assert torch.allclose(task.generate(input_of(BATCH))[1], plain, atol=1e-5)


@pytest.mark.parametrize("weights", ["lora", "whole"])
def test_exported_generator_is_the_trained_network(tmp_path, base, weights):
    """The training's own forward pass and the inference path give the same picture from the same weights."""
    task = make_task(base, config(weights=weights))
    with torch.no_grad():
        for parameter in task.players()[0].parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            parameter.copy_(parameter.half().float())  # the file holds 16 bits: nothing is then rounded
    backbone = load_backbone(Recipe(base, task.export(tmp_path, {})[0]))
    result = upscale(backbone, BATCH["low"].float() / 255, UpscaleSettings(color_fix="none"))
    with torch.no_grad():
        expected = task.generate(input_of(BATCH))[1].add(1).div(2).clamp(0, 1)
    assert (result - expected).abs().max() < 5e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", ["lora", "whole"])
def test_the_two_players_move_only_themselves(base, weights, checkpointing):
    task = make_task(base, config(LossWeights(), weights=weights, checkpointing=checkpointing))
    generator, auxiliary = task.players()
    assert not set(map(id, generator.parameters.values())) & set(map(id, auxiliary.parameters.values()))
    for player, other in ((generator, auxiliary), (auxiliary, generator)):
        losses_of(task, player.name)["loss"].backward()
        assert all(p.grad is None for p in other.parameters.values())
        assert all(p.grad is not None for p in player.parameters.values())
        assert not any(
            parameter.grad is not None
            for name, parameter in task.named_parameters()
            if not any(parameter is own for own in player.parameters.values())
        )
        for parameter in player.parameters.values():
            parameter.grad = None


def test_checkpointing_changes_no_gradient(base):
    """With the whole method: roles switch between the forward pass and its recomputation."""
    found = []
    for checkpointing in (False, True):
        task = make_task(base, config(LossWeights(), checkpointing=checkpointing))
        with torch.no_grad():
            for player in task.players():
                for parameter in player.parameters.values():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        losses_of(task)["loss"].backward()
        found.append([parameter.grad for parameter in task.players()[0].parameters.values()])
    for plain, recomputed in zip(*found):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-7)


def test_terms_are_weighted_and_warm_up(base):
    losses = LossWeights(
        l2=2, perceptual=0.5, icm=3, charbonnier=1, gradient=1, fourier=1, tone=1, warmup={"icm": 100, "perceptual": 50}
    )
    task = make_task(base, GeneratorConfig(200, "residual", losses=losses, color_fix=True))
    for images, icm, perceptual in ((0, 0.0, 0.0), (25, 0.75, 0.25), (1000, 3.0, 0.5)):
        found = losses_of(task, images=images)
        others = 2 * found["l2"] + sum(found[name] for name in ("charbonnier", "gradient", "fourier", "tone"))
        expected = others + icm * found["icm"] + perceptual * found["perceptual"]
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_l2_is_the_mean_squared_error_of_the_picture(base):
    task = make_task(base, config())
    found = losses_of(task)
    with torch.no_grad():
        picture = task.generate(input_of(BATCH))[1]
    assert found["l2"].item() == pytest.approx(F.mse_loss(picture, bytes_to_signed(BATCH["sharp"])).item(), rel=1e-6)
    mse = (picture.clamp(-1, 1) - bytes_to_signed(BATCH["sharp"])).square().mean().item() / 4
    assert found["psnr"].item() == pytest.approx(-10 * math.log10(mse), rel=1e-5)


@pytest.mark.parametrize("kind", ["icm", "colormap", "edges", "image", "sketch", "colormap+segmentation", "none"])
def test_any_condition_trains_without_a_change_to_the_loop(base, kind):
    task = make_task(base, config(LossWeights()), ConditionConfig(kind=kind))
    losses = losses_of(task, "auxiliary")
    assert bool(losses["loss"].isfinite())
    values = task.meter.take()
    assert {name.split("/")[0] for name in values} == {"rho", "cos", "mse_auxiliary", "mse_teacher"}
    # Untrained, the auxiliary is the teacher: nothing to tell them apart.
    assert all(value == 0 for name, value in values.items() if name.startswith("rho"))


def test_the_source_of_the_condition_is_heeded(base):
    maps = [
        make_task(base, config(LossWeights()), ConditionConfig(source=source)).prepare("generator", BATCH, 0, 0)["maps"]
        for source in ("truth", "input")
    ]
    assert maps[0].shape == maps[1].shape == (2, 4, 32, 32)
    assert not torch.equal(*maps)


def test_draws_depend_on_the_sample_alone():
    index = torch.tensor([5, 3, 8])
    noise, uniform = draw_noise(0, index, "a", (2, 3)), draw_uniform(0, index, "a")
    assert torch.equal(draw_noise(0, index[1:2], "a", (2, 3))[0], noise[1])
    assert torch.equal(draw_uniform(0, index[1:2], "a")[0], uniform[1])
    assert not torch.equal(draw_noise(0, index, "b", (2, 3)), noise)
    assert not torch.equal(draw_noise(1, index, "a", (2, 3)), noise)
    many = draw_noise(0, torch.arange(2000), "a", (5,))
    assert float(many.mean()) == pytest.approx(0, abs=0.03)
    assert float(many.std()) == pytest.approx(1, abs=0.03)
    assert float(draw_uniform(0, torch.arange(2000), "t").mean()) == pytest.approx(0.5, abs=0.02)


def test_reconstruction_losses_are_those_of_numpy():
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 12, 10, generator=random, dtype=torch.float64) for _ in range(2))
    x, y = a.numpy(), b.numpy()
    d = x - y
    assert charbonnier(a, b).item() == pytest.approx(np.sqrt(d**2 + 1e-6).mean(), abs=1e-12)
    expected = np.abs(np.diff(d, axis=3)).mean() + np.abs(np.diff(d, axis=2)).mean()
    assert gradient_l1(a, b).item() == pytest.approx(expected, abs=1e-12)
    spectra = [np.abs(np.fft.rfft2(image, norm="ortho")) for image in (x, y)]
    assert fourier_l1(a, b).item() == pytest.approx(np.abs(spectra[0] - spectra[1]).mean(), abs=1e-4)
    shifted = torch.roll(a, (3, 2), dims=(2, 3))
    assert fourier_l1(a, shifted).item() == pytest.approx(0, abs=1e-6)  # blind to phase


def test_the_loss_sees_the_colour_correction_of_inference():
    random = torch.Generator().manual_seed(0)
    result, reference = (torch.rand(2, 3, 45, 70, generator=random) for _ in range(2))
    leaf = result.clone().requires_grad_()
    corrected = with_low_frequencies(leaf, reference)
    assert (corrected - wavelet_color_fix(result, reference)).abs().max() < 1e-6
    corrected.square().sum().backward()
    assert float(leaf.grad.abs().sum()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(with_low_frequencies(result, reference), corrected), "float32 whatever the networks run in"


def test_averaged_puts_the_live_weights_back_even_after_an_error():
    layer = nn.Linear(2, 2)
    live = layer.weight.detach().clone()
    players = [Player("a", {"weight": layer.weight}), Player("b", {"bias": layer.bias}, averaged=False)]
    state = RunState(players, LoopConfig(), 8, "{}")
    assert list(state.averages) == ["a"]
    state.averages["a"]["weight"].zero_()
    seen = []

    def interrupted_export() -> None:
        with state.averaged():
            seen.append(layer.weight.detach().clone())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        interrupted_export()
    assert torch.equal(seen[0], torch.zeros(2, 2))
    assert torch.equal(layer.weight, live)
    state.use_averages()
    assert torch.equal(layer.weight, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.05, 0), ("linear", 0.05, 0), ("constant", 0.1, 0.1)]
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule, middle, end):
    config = LoopConfig(images=1000, batch=10, warmup_images=100, learning_rate=0.1, schedule=schedule)
    rates = [learning_rate(config, images, 10) for images in range(0, 1001, 10)]
    assert rates[:11] == sorted(rates[:11])
    assert max(rates) == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(end, abs=1e-12)
    assert learning_rate(config, 550, 10) == pytest.approx(middle)


@pytest.mark.parametrize(
    "wrong", [{"precision": "int8"}, {"schedule": "step"}, {"accumulate": 0}, {"keep": 0}, {"patience": 0}]
)
def test_loop_configuration_is_checked(wrong):
    with pytest.raises(IcmsrError, match=next(iter(wrong))):
        LoopConfig(**wrong)


def test_corners_are_each_sample_s_own_and_reach_every_pixel():
    index = torch.arange(400)
    corners = draw_corners(3, index, 7)
    assert corners.dtype == torch.int64
    assert {tuple(row) for row in corners.unique(dim=0).tolist()} <= {(y, x) for y in range(8) for x in range(8)}
    for axis in (0, 1):
        assert torch.bincount(corners[:, axis], minlength=8).min() > 25  # of 50
    assert torch.equal(draw_corners(3, index[100:110], 7), corners[100:110])
    assert not torch.equal(draw_corners(4, index, 7), corners)
    assert draw_corners(3, index, 0).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LossWeights(l2=0, perceptual=0, icm=0), "every loss weight is 0"),
        (lambda: LossWeights(l2=float("nan")), "negative"),
        (lambda: NetworksConfig(rank=0), "rank must be at least 1, got 0"),
        (lambda: NetworksConfig(train_decoder=True), "for networks.weights whole"),
        (lambda: NetworksConfig(weights="whole", base_dtype="bf16"), "must be fp32 with whole weights"),
        (lambda: GeneratorConfig(gradient_floor=0), "gradient_floor must be above 0"),
        (lambda: PerceptualConfig(kind="vgg"), "none, decoder, lpips"),
        (lambda: GeneratorConfig(losses=LossWeights(dists=1)), r"losses\.dists needs .*perceptual\.dists_weights"),
        (lambda: GeneratorConfig(perceptual=PerceptualConfig(split=True)), r"split shares .* between LPIPS-VGG and"),
        (lambda: PerceptualConfig(dists_weights="no.file"), r"dists_weights must be .* 'no\.file'.*metric_weights\.py"),
    ],
)
def test_errors_name_the_value(build, words):
    with pytest.raises(IcmsrError, match=words):
        build()


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_base_files_are_readable_by_others(base):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in base.rglob("*") if path.is_file())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_bf16_base_trains_float32_lora(base, checkpointing):
    """With features of an adapter: in float32 they would turn the activations of a bf16 base into float32."""
    folder = open_base(base)
    loaded = BaseNetworks(*build_networks(folder, torch.bfloat16), folder.info)
    settings = config(LossWeights(), base_dtype="bf16", checkpointing=checkpointing)
    networks = GeneratorNetworks(loaded, settings.networks, True)
    features = StructureFeatures([make_adapter(4, 8, TINY.unet_channels)], [4], [1.0])
    nn.Module.to(features, torch.bfloat16)
    contexts = Contexts(folder.prompt_embedding())
    task = GeneratorTask(networks, GeneratorConditioning(ConditionConfig(), contexts, features), folder, settings, 0)
    batch = BATCH
    for player in task.players():
        batch = task.prepare(player.name, batch, 0, 0)
        with autocast(torch.device("cpu"), "bf16"):
            losses, brings = task(player.name, batch)
            losses["loss"].backward()
        batch = {**batch, **brings}
        assert bool(losses["loss"].isfinite())
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in player.parameters.values())
