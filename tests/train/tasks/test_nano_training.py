"""The steps that make nano: a start from a generator, a decoder trained along, a prior on a base, local spectra."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.losses.lattice import lattice_l1
from icmsr_core.train.losses.reconstruction import with_low_frequencies
from icmsr_core.train.losses.spectra import local_spectrum
from icmsr_core.train.networks.bases import NetworkConfig, make_vae
from icmsr_core.train.networks.conditioning import ConditionConfig
from icmsr_core.train.networks.decoders import exchange_decoder
from icmsr_core.train.networks.generator import NetworksConfig
from icmsr_core.train.tasks.building import Loading, build_generator_task, check_generator
from icmsr_core.train.tasks.generator import input_of
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import PartWeights, load_generator, save_generator
from tests.support.model_files import TINY, write_base
from tests.support.script_process import ScriptProcess

BATCH = {
    "sharp": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "low": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    "index": torch.tensor([4, 9, 11, 12]),
    "caption": torch.zeros(4, dtype=torch.int64),
}
CONDITION = ConditionConfig("none")


def config(losses: LossWeights, **networks) -> GeneratorConfig:
    return GeneratorConfig(
        timestep=200, prediction="residual", networks=NetworksConfig(**networks), losses=losses, color_fix=True
    )


def build(base, settings: GeneratorConfig):
    folder = open_base(base)
    check_generator(folder, settings, CONDITION)
    torch.manual_seed(3)
    return build_generator_task(folder, settings, CONDITION, (), 0, Loading())


def step(task, player: str = "generator", rate: float = 1e-2):
    batch = task.prepare(player, BATCH, 1000, 0)
    terms, carried = task(player, batch)
    terms["loss"].backward()
    with torch.no_grad():
        for parameter in next(entry for entry in task.players() if entry.name == player).parameters.values():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return terms, carried


@pytest.fixture(scope="module")
def faithful(base, tmp_path_factory):
    """A run with its decoder trained along: the folder of what it exports."""
    losses = LossWeights(l2=1, perceptual=0, icm=0, autoencoder=0.5)
    task = build(base, config(losses, weights="whole", train_decoder=True, zero_output=True))
    for _ in range(2):
        step(task)
    folder = tmp_path_factory.mktemp("faithful")
    assert task.export(folder, {}) == [folder / "generator.safetensors", folder / "base"]
    return folder


def test_a_decoder_trained_along_goes_into_a_base_and_not_into_the_generator(base, faithful):
    old, new = build_networks(open_base(base)), build_networks(open_base(faithful / "base"))
    generator = load_generator(faithful / "generator.safetensors")
    assert not [name for name in generator.vae.tensors if name.startswith(("decoder.", "post_quant_conv."))]
    assert [name for name in generator.vae.tensors if name.startswith("encoder.")]
    for one, other in zip(old[0].parameters(), new[0].parameters()):
        assert torch.equal(one.half(), other.half())  # the prior is the base's; files hold half precision
    before, after = ({name: value.half() for name, value in vae.state_dict().items()} for vae in (old[1], new[1]))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_generator_and_new_base_give_what_the_run_saw(base, tmp_path):
    losses = LossWeights(l2=1, perceptual=0, icm=0, autoencoder=0.5)
    task = build(base, config(losses, weights="whole", train_decoder=True, zero_output=True))
    step(task)
    task.export(tmp_path, {})
    backbone = load_backbone(Recipe(tmp_path / "base", tmp_path / "generator.safetensors"))
    with torch.no_grad():
        wanted = task.generate(input_of(BATCH))[0]
        again = build(
            tmp_path / "base",
            config(LossWeights(icm=0, perceptual=0), weights="whole", start=str(tmp_path / "generator.safetensors")),
        )
        latent, picture = again.generate(input_of(BATCH))
        assert (latent - wanted).abs().max() < 0.01 * wanted.abs().max()  # files hold half precision
        assert (backbone.decode(latent) - picture).abs().max() < 1e-4


def test_the_autoencoder_term_moves_the_decoder_by_the_base_latents(base):
    task = build(
        base, config(LossWeights(l2=0, perceptual=0, icm=0, autoencoder=1), weights="whole", train_decoder=True)
    )
    batch = task.prepare("generator", BATCH, 0, 0)
    terms, _ = task("generator", batch)
    terms["loss"].backward()
    moved = {
        name
        for name, value in task.networks.trained("generator").items()
        if value.grad is not None and value.grad.abs().max() > 0
    }
    assert moved
    assert all(name.startswith(("vae.decoder", "vae.post_quant")) for name in moved)


def test_lora_on_a_start_is_exported_as_the_realistic_set(base, faithful, tmp_path):
    start = faithful / "generator.safetensors"
    losses = LossWeights(l2=1, perceptual=0, icm=1)
    settings = config(losses, weights="lora", rank=2, auxiliary_rank=2, start=str(start))
    task = build(faithful / "base", settings)
    with torch.no_grad():  # LoRA begins at zero: the start itself
        plain = build(faithful / "base", config(LossWeights(icm=0, perceptual=0), weights="whole", start=str(start)))
        assert (task.generate(input_of(BATCH))[0] - plain.generate(input_of(BATCH))[0]).abs().max() < 1e-5
    terms, carried = step(task)
    assert terms["icm"].isfinite()
    step(task)
    task("auxiliary", task.prepare("auxiliary", {**BATCH, **carried}, 0, 0))[0]["loss"].backward()
    assert any(value.grad is not None for value in task.networks.trained("auxiliary").values())
    task.export(tmp_path, {})
    first, both = load_generator(start), load_generator(tmp_path / "generator.safetensors")
    for part in ("unet", "vae"):
        assert all(
            torch.equal(value, getattr(both, part).tensors[name])
            for name, value in getattr(first, part).tensors.items()
        )
        assert both.realistic[part].lora
        assert not both.realistic[part].tensors
    assert (both.info.rank, both.info.realistic_rank, both.info.realistic_alpha) == (0, 2, 2.0)
    # From a file of two sets the faithful one is taken, whatever its default is.
    save_generator(tmp_path / "asked.safetensors", replace(both, info=replace(both.info, realistic_default=0.5)))
    settings = config(losses, weights="lora", rank=2, start=str(tmp_path / "asked.safetensors"))
    check_generator(open_base(faithful / "base"), settings, CONDITION)
    again = build(faithful / "base", settings)
    with torch.no_grad():
        assert (again.generate(input_of(BATCH))[0] - plain.generate(input_of(BATCH))[0]).abs().max() < 1e-5
    again.export(tmp_path / "again", {})
    assert load_generator(tmp_path / "again" / "generator.safetensors").info.realistic_default == 1.0
    with torch.no_grad():
        wanted = task.generate(input_of(BATCH))[0]
        for fidelity, same in ((1.0, True), (0.0, False)):
            backbone = load_backbone(Recipe(faithful / "base", tmp_path / "generator.safetensors", fidelity=fidelity))
            latent = backbone.encode(input_of(BATCH))
            clean = latent - backbone.predict_noise(latent, 200)
            assert bool((clean - wanted).abs().max() < 0.02 * wanted.abs().max()) is same


def test_the_realistic_set_of_a_start_goes_on(base, faithful, tmp_path):
    settings = config(LossWeights(l2=1, perceptual=0, icm=0), rank=2, start=str(faithful / "generator.safetensors"))
    task = build(faithful / "base", settings)
    step(task)
    task.export(tmp_path, {})
    made = load_generator(tmp_path / "generator.safetensors")
    # Another tool's alpha: the update counts, not how it is split.
    save_generator(tmp_path / "twice.safetensors", replace(made, info=replace(made.info, realistic_alpha=4.0)))
    wanted = task.networks.trained("generator")
    for name, factor in (("generator", 1), ("twice", 2)):
        start = replace(settings.networks, start=str(tmp_path / f"{name}.safetensors"), continue_realistic=True)
        again = build(faithful / "base", replace(settings, networks=start))
        found = again.networks.trained("generator")
        assert found.keys() == wanted.keys()
        for parameter, value in found.items():
            stored = wanted[parameter] * (factor if ".lora_B." in parameter else 1)
            assert (value - stored).abs().max() < 1e-3 * stored.abs().max().clamp_min(1e-3)
    before = {name: value.detach().clone() for name, value in found.items()}
    step(again)
    after = again.networks.trained("generator")
    assert all(not torch.equal(after[name], value) for name, value in before.items() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        ({"rank": 3}, "has LoRA of rank 2: set networks.rank to that"),
        ({"rank": 2, "start": "FAITHFUL"}, "has no realistic set as LoRA"),
        ({"rank": 2, "start": ""}, "set networks.weights to lora and networks.start to a generator file with two sets"),
        ({"weights": "whole"}, "set networks.weights to lora and networks.start to a generator file with two sets"),
    ],
)
def test_a_realistic_set_that_cannot_go_on_is_refused(base, faithful, tmp_path, networks, words):
    faithful_file, both = faithful / "generator.safetensors", tmp_path / "generator.safetensors"
    losses = LossWeights(l2=1, perceptual=0, icm=0)
    build(faithful / "base", config(losses, rank=2, start=str(faithful_file))).export(tmp_path, {})
    networks = {"start": str(both), **networks, "continue_realistic": True}
    networks["start"] = networks["start"].replace("FAITHFUL", str(faithful_file))
    with pytest.raises(IcmsrError, match=words):
        check_generator(open_base(faithful / "base"), config(losses, **networks), CONDITION)


def test_a_realistic_set_that_was_trained_with_an_encoder_does_not_go_on_without_it(base, faithful, tmp_path):
    losses = LossWeights(l2=1, perceptual=0, icm=0)
    settings = config(losses, rank=2, start=str(faithful / "generator.safetensors"))
    build(faithful / "base", settings).export(tmp_path, {})
    start = str(tmp_path / "generator.safetensors")
    with pytest.raises(IcmsrError, match=r"does not fit that of generator: .* modules differ"):
        build(faithful / "base", config(losses, rank=2, start=start, continue_realistic=True, train_encoder=False))


def test_teacher_stays_the_base_when_the_generator_starts_elsewhere(base, faithful):
    settings = config(
        LossWeights(l2=1, perceptual=0, icm=1), weights="lora", rank=2, start=str(faithful / "generator.safetensors")
    )
    task = build(faithful / "base", settings)
    unet, _ = build_networks(open_base(faithful / "base"))
    latent, t = torch.randn(2, 4, 4, 4), torch.tensor([100, 700])
    context = task.constant[None].expand(2, -1, -1)
    for _ in range(2):
        with torch.no_grad():
            seen = task.networks.noise("teacher", latent, t, context, None)
            wanted = unet(latent, t, encoder_hidden_states=context).sample
        assert (seen - wanted).abs().max() < 1e-5
        step(task)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep": 300}, "generator.timestep is 300"),
        ({"prediction": "eps"}, "generator.prediction is eps"),
    ],
)
def test_a_start_of_another_kind_is_refused(base, faithful, change, words):
    settings = replace(
        config(LossWeights(icm=0, perceptual=0), weights="whole", start=str(faithful / "generator.safetensors")),
        **change,
    )
    with pytest.raises(IcmsrError, match=words):
        check_generator(open_base(faithful / "base"), settings, CONDITION)


def test_a_start_with_its_own_decoder_is_refused_for_icm(base, tmp_path):
    task = build(base, config(LossWeights(l2=1, perceptual=0, icm=0), weights="whole", train_decoder=True))
    task.export(tmp_path, {})
    settings = config(LossWeights(perceptual=0), weights="whole", start=str(tmp_path / "generator.safetensors"))
    with pytest.raises(IcmsrError, match="decoder of its own"):
        check_generator(open_base(base), settings, CONDITION)


@pytest.fixture(scope="module")
def two_sets(base, tmp_path_factory):
    """A generator file with two sets of weights, in the code of the base."""
    folder = tmp_path_factory.mktemp("two_sets")
    frozen = {"train_encoder": False}
    task = build(base, config(LossWeights(l2=1, perceptual=0, icm=0), weights="whole", **frozen))
    step(task)
    task.export(folder, {"generator": {"networks": {"train_decoder": False}}})
    start = str(folder / "generator.safetensors")
    task = build(base, config(LossWeights(l2=1, perceptual=0, icm=0), weights="lora", rank=2, start=start, **frozen))
    for _ in range(3):
        step(task)
    return task.export(folder / "both", {})[0]


def test_the_decoder_alone_is_trained_and_both_sets_stay(base, two_sets, tmp_path):
    settings = config(
        LossWeights(l2=1, perceptual=0, icm=0), weights="decoder", start=str(two_sets), start_fidelity=0.5
    )
    task = build(base, settings)
    trained = task.networks.trained("generator")
    assert trained
    assert all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in trained)
    with torch.no_grad():
        latent, before = task.generate(input_of(BATCH))
    step(task)
    with torch.no_grad():
        same, after = task.generate(input_of(BATCH))
    assert torch.equal(latent, same)
    assert (after - before).abs().max() > 1e-3
    (path,) = task.export(tmp_path, {"seed": 5})
    start, written = load_generator(two_sets), load_generator(path)
    for one, other in ((start.unet, written.unet), (start.realistic["unet"], written.realistic["unet"])):
        assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
        assert all(
            torch.equal(value, other.lora[name][part])
            for name, pair in one.lora.items()
            for part, value in enumerate(pair)
        )
        assert one.parameters() == other.parameters()
    assert set(written.vae.tensors) == {name.removeprefix("vae.") for name in trained}
    assert written.info.training == {"decoder": {"seed": 5}, "before": start.info.training}
    assert written.info.realistic_alpha == start.info.realistic_alpha
    backbone = load_backbone(Recipe(base, path, fidelity=0.5))
    with torch.no_grad():
        assert (backbone.decode(same) - after).abs().max() < 1e-2  # the file holds half precision


def test_icm_goes_on_from_a_generator_whose_latents_are_the_base_s(base, two_sets, tmp_path):
    """Its decoder was trained alone, or with a loss on the latents; else they may be anything."""
    start = {"weights": "decoder", "start": str(two_sets)}
    task = build(base, config(LossWeights(l2=1, perceptual=0, icm=0), **start))
    for name, record, refused in (
        ("alone", {"generator": {"networks": {"train_decoder": False}}}, False),
        ("held", {"generator": {"networks": {"train_decoder": True}, "losses": {"latent": 0.1}}}, False),
        ("along", {"generator": {"networks": {"train_decoder": True}, "losses": {"latent": 0}}}, True),
    ):
        (path,) = task.export(tmp_path / name, record)
        settings = config(LossWeights(perceptual=0), weights="lora", start=str(path))
        if refused:
            with pytest.raises(IcmsrError, match="decoder of its own"):
                check_generator(open_base(base), settings, CONDITION)
        else:
            check_generator(open_base(base), settings, CONDITION)


def test_the_picture_comes_from_the_start_s_own_decoder(base, two_sets, tmp_path):
    """Not from the base's, whose features the perceptual distance compares."""
    task = build(base, config(LossWeights(perceptual=0, icm=0), weights="decoder", start=str(two_sets)))
    step(task, rate=0.05)
    (path,) = task.export(tmp_path, {})
    task = build(base, config(LossWeights(l2=1, perceptual=1, icm=0), weights="lora", start=str(path)))
    with torch.no_grad():
        terms, _ = task("generator", task.prepare("generator", BATCH, 1000, 0))
        given = input_of(BATCH)
        latent, picture = task.generate(given)
        truth = bytes_to_signed(BATCH["sharp"])
        wanted, other = (
            F.mse_loss(with_low_frequencies(shown, given), truth)
            for shown in (picture, task.perceptual.decode(latent)[0])
        )
    assert (wanted - other).abs() > 1e-3
    assert terms["l2"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_realistic_set_that_changes_the_decoder_is_refused(base, two_sets, tmp_path):
    generator = load_generator(two_sets)
    name = "decoder.conv_out.bias"
    changed = {**generator.realistic, "vae": PartWeights(tensors={name: torch.zeros(3)})}
    save_generator(tmp_path / "g.safetensors", replace(generator, realistic=changed))
    settings = config(LossWeights(l2=1, perceptual=0, icm=0), weights="decoder", start=str(tmp_path / "g.safetensors"))
    with pytest.raises(IcmsrError, match="changes the decoder, which would then be changed twice"):
        check_generator(open_base(base), settings, CONDITION)


@pytest.mark.parametrize(
    ("losses", "networks", "words"),
    [
        ({"icm": 0}, {"start": ""}, "set networks.start to its file"),
        ({"icm": 1}, {}, "have nothing to train with networks.weights decoder"),
        ({"icm": 0, "latent": 0.1}, {}, "have nothing to train with networks.weights decoder"),
        ({"icm": 0, "perceptual": 2}, {}, "perceptual.kind decoder compares latents, which stay as they are"),
        ({"icm": 0}, {"train_decoder": True}, "is for networks.weights whole, got it with decoder"),
        ({"icm": 0}, {"base_dtype": "bf16"}, "base_dtype must be fp32 .* got bf16 with decoder"),
        ({"icm": 0}, {"start_base": "base"}, "start_base is for networks.weights whole"),
        ({"icm": 0, "autoencoder": 1}, {}, "set networks.train_decoder to true"),
    ],
)
def test_what_the_decoder_alone_cannot_do_is_said(losses, networks, words):
    with pytest.raises(IcmsrError, match=words):
        config(
            LossWeights(**{"perceptual": 0, **losses}),
            **{"weights": "decoder", "start": "generator.safetensors", **networks},
        )


def test_the_autoencoder_term_needs_a_decoder_that_trains():
    with pytest.raises(IcmsrError, match="train_decoder to true"):
        config(LossWeights(icm=0, perceptual=0, autoencoder=1), weights="whole")


def test_the_lattice_term_has_the_period_of_the_latent_s_cells(base):
    task = build(base, config(LossWeights(l2=0, perceptual=0, icm=0, lattice=2), weights="whole"))
    batch = task.prepare("generator", BATCH, 1000, 0)
    with torch.no_grad():
        terms, _ = task("generator", batch)
        given = input_of(batch)
        result = with_low_frequencies(task.networks.decode(task.denoised(task.networks.encode(given))), given)
    expected = lattice_l1(result, bytes_to_signed(batch["sharp"]), open_base(base).descriptor().latent_factor)
    torch.testing.assert_close(terms["lattice"], expected)
    torch.testing.assert_close(terms["loss"], 2 * expected)
    assert expected > 0.01


def test_the_local_spectrum_is_that_of_scipy_in_float64():
    torch.manual_seed(0)
    pictures = [torch.rand(1, 3, 32, 40) * 2 - 1 for _ in range(2)]
    amplitudes = []
    for picture in pictures:
        luma = picture[0].double().mean(0).numpy()
        rows, columns = (32 - 8) // 4 + 1, (40 - 8) // 4 + 1
        energy = [
            [(dctn(luma[4 * y : 4 * y + 8, 4 * x : 4 * x + 8], norm="ortho") / 8) ** 2 for x in range(columns)]
            for y in range(rows)
        ]
        energy = torch.from_numpy(np.array(energy))
        local = energy.unfold(0, 3, 1).unfold(1, 3, 1).mean((-1, -2)).flatten(2)[..., 1:]
        amplitudes.append((local + 1e-8).sqrt() + 0.02)
    u, v = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    weights = 1 / (u**2 + v**2).flatten()[1:].double()
    wanted = ((amplitudes[0] / amplitudes[1]).log().square().mean((0, 1)) * weights / weights.sum()).sum()
    assert float(local_spectrum(*pictures)) == pytest.approx(float(wanted), rel=1e-5)


def test_local_spectrum_counts_texture_and_not_its_place():
    torch.manual_seed(0)
    texture, other = torch.randn(2, 1, 3, 128, 128) * 0.1
    flat = torch.zeros_like(texture)
    assert local_spectrum(texture, texture) == 0
    assert local_spectrum(other, texture) < 0.4 * local_spectrum(flat, texture)
    assert local_spectrum(flat + 0.3, flat) < 1e-5  # tone is no texture
    half = flat.clone().requires_grad_()
    local_spectrum(half, texture).backward()
    assert half.grad.isfinite().all()
    assert math.isfinite(float(local_spectrum(flat, flat)))


@pytest.mark.long
def test_a_prior_goes_on_from_a_base(base, tmp_path):
    def run(name: str, *flags):
        process = ScriptProcess(
            "prior.py",
            "--run",
            tmp_path / name,
            "--start",
            base,
            "--device",
            "cpu",
            "--data.synthetic=1",
            "--data.crop=32",
            "--prior.images=4",
            "--prior.batch=2",
            "--prior.workers=0",
            *flags,
            folder=tmp_path,
        )
        return process.wait(120), process.output(), tmp_path / name / "prior" / "base"

    code, output, made = run("on", "--prior.learning_rate=1e-30")
    assert code == 0, output
    old, new = build_networks(open_base(base)), build_networks(open_base(made))
    for one, other in zip(old, new):
        assert all(
            torch.allclose(value, other.state_dict()[name], atol=1e-3) for name, value in one.state_dict().items()
        )
    code, output, made = run(
        "fresh", "--fresh_unet=true", "--networks.unet_channels=[64,128]", "--networks.latent_channels=4"
    )
    assert code == 0, output
    assert build_networks(open_base(made))[0].config.block_out_channels in ((64, 128), [64, 128])
    code, output, _ = run("wrong", "--fresh_unet=true", "--networks.latent_channels=12")
    assert code == 1
    assert "the base in start has 4" in output


def test_a_prior_takes_the_decoder_that_was_trained_along(base, faithful, tmp_path):
    """The decoder of the distilled base, everything else of the prior's own; another latent's decoder is refused."""
    vae = build_networks(open_base(base))[1]
    distilled = open_base(faithful / "base")
    exchange_decoder(vae, distilled)
    before, donor = build_networks(open_base(base))[1].state_dict(), distilled.vae_state()
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.split(".")[0] in ("decoder", "post_quant_conv") for name in changed)
    assert all(torch.equal(vae.state_dict()[name], donor[name].float()) for name in changed)
    with pytest.raises(IcmsrError, match="reads another latent"):
        exchange_decoder(vae, open_base(write_base(tmp_path / "other", TINY, seed=5)))
    wider = write_base(tmp_path / "wider", replace(TINY, vae_channels=(32, 32, 32, 64)))
    with pytest.raises(IcmsrError, match="another shape"):
        exchange_decoder(vae, open_base(wider))


@pytest.mark.long
def test_the_autoencoder_alone_makes_a_base(tmp_path):
    """With the other half's decoder then exchanged by the script, as the recipe of the embedded model does."""

    def run(name: str, *flags):
        process = ScriptProcess(
            "prior.py",
            "--run",
            tmp_path / name,
            "--device",
            "cpu",
            "--data.synthetic=1",
            "--data.crop=32",
            *(f"--{half}.{flag}" for half in ("autoencoder", "prior") for flag in ("images=4", "batch=2", "workers=0")),
            *flags,
            folder=tmp_path,
        )
        return process.wait(120), process.output()

    alone = "--autoencoder_only=true"
    code, output = run(
        "a",
        alone,
        "--networks.latent_channels=4",
        "--networks.vae_channels=[32,32]",
        "--networks.unet_channels=[32,32]",
        "--networks.unet_self_attention=false",
    )
    assert code == 0, output
    folder = open_base(tmp_path / "a" / "autoencoder" / "base")
    assert folder.descriptor().latent_factor == 2
    assert not [name for name, _ in build_networks(folder)[0].mid_block.named_modules() if "attentions." in name]
    code, output = run("b", "--start", folder.path, "--decoder", folder.path)
    assert code == 0, output
    for flags, words in (
        (["--decoder", folder.path], "decoder is for a prior that goes on from a base"),
        ([alone, "--start", folder.path], "give only one of them"),
    ):
        code, output = run("c", *flags)
        assert code == 1
        assert words in output


@pytest.mark.parametrize("widths", [(32, 32, 64, 96), (32, 64, 96)])
def test_an_untrained_vae_keeps_colours_and_coarse_shapes(widths):
    torch.manual_seed(0)
    vae = make_vae(NetworkConfig(vae_channels=widths))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    picture = torch.stack([0.7 * x, -0.4 + 0.3 * y, 0.5 - 0.5 * x * y])[None]
    with torch.no_grad():
        latent = vae.encode(picture).latent_dist.mode()
        again = vae.decode(latent).sample
    small = F.avg_pool2d(picture, 2 ** (len(widths) - 1))
    inside = (..., slice(1, -1), slice(1, -1))
    slope = (latent[:, :3][inside] * small[inside]).sum() / small[inside].square().sum()
    assert (latent[:, :3] / slope - small)[inside].abs().max() < 0.08  # thumbnails, but for one factor
    assert (again - picture)[..., 12:-12, 12:-12].abs().max() < 0.15
    assert (again - picture)[..., 12:-12, 12:-12].mean((2, 3)).abs().max() < 0.05


def test_groups_too_narrow_for_the_thumbnail_are_refused():
    with pytest.raises(IcmsrError, match="fewer groups"):
        make_vae(NetworkConfig(vae_groups=8))
