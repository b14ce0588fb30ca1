"""A generator in the code of the base's encoder: a frozen encoder, the latent loss, training on pairs of latents."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.data.synthetic import synthetic_picture
from icmsr_core.train.losses.teacher import TIMESTEPS
from icmsr_core.train.networks.conditioning import ConditionConfig
from icmsr_core.train.networks.generator import NetworksConfig
from icmsr_core.train.tasks import generator as generator_task
from icmsr_core.train.tasks.building import Loading, build_generator_task, check_latent_pairs
from icmsr_core.train.tasks.generator import GeneratorTask, input_of
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.train.tasks.teacher_test import TeacherTest
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator
from tests.support.script_process import ScriptProcess

PICTURES = {
    "sharp": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "low": torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    "index": torch.tensor([4, 9]),
    "caption": torch.zeros(2, dtype=torch.int64),
}
LATENT = LossWeights(l2=0, perceptual=0, icm=0, latent=1)


def config(losses: LossWeights = LATENT, **networks: object) -> GeneratorConfig:
    frozen = {"train_encoder": False, **networks}
    return GeneratorConfig(200, "residual", NetworksConfig(**frozen), losses)


def make_task(base: Path, settings: GeneratorConfig) -> GeneratorTask:
    torch.manual_seed(7)
    return build_generator_task(open_base(base), settings, ConditionConfig("none"), (), 0, Loading())


def losses_of(task: GeneratorTask, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return task("generator", task.prepare("generator", batch, 0, 0))[0]


def latents_of(task: GeneratorTask) -> dict[str, torch.Tensor]:
    """The pictures' batch as `LatentPairs` would hold it."""
    low, truth = task.latents_of(PICTURES)
    return {"index": PICTURES["index"], "caption": PICTURES["caption"], "low_latent": low, "truth_latent": truth}


@pytest.mark.parametrize("weights", ["lora", "whole"])
def test_a_frozen_encoder_is_the_base_s_and_no_part_of_the_file(tmp_path, base, weights):
    task = make_task(base, config(weights=weights))
    assert all(name.startswith("unet.") for name in task.players()[0].parameters)
    losses_of(task, PICTURES)["loss"].backward()
    vae = build_networks(open_base(base))[1]
    with torch.no_grad():
        expected = vae.encode(input_of(PICTURES)).latent_dist.mode() * vae.config.scaling_factor
        assert torch.allclose(task.latents_of(PICTURES)[0], expected, atol=1e-5)
    generator = load_generator(task.export(tmp_path, {})[0])
    assert not generator.vae.lora
    assert not generator.vae.tensors
    assert generator.unet.lora if weights == "lora" else generator.unet.tensors


def test_the_latent_loss_is_the_l1_distance_to_the_base_s_own_latent(base):
    task = make_task(base, config(train_encoder=True))
    latent, _ = task.generate(input_of(PICTURES))
    expected = F.l1_loss(latent, task.networks.encode_truth(bytes_to_signed(PICTURES["sharp"])))
    assert torch.allclose(losses_of(task, PICTURES)["latent"], expected)


@pytest.mark.parametrize("icm", [0.0, 0.5])
def test_pairs_of_latents_have_the_gradient_of_their_pictures(base, icm):
    """The same step with the VAE and without it."""
    found = []
    for latents in (False, True):
        task = make_task(base, config(LossWeights(l2=0, perceptual=0, icm=icm, latent=1), weights="whole"))
        losses = losses_of(task, latents_of(task) if latents else PICTURES)
        losses["loss"].backward()
        gradients = {name: parameter.grad for name, parameter in task.networks.trained("generator").items()}
        found.append((losses["loss"], gradients))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_the_log_has_the_agreement_of_latents_and_warns_where_it_is_lost(base, caplog):
    task = make_task(base, config(weights="whole", zero_output=True))
    assert task.measure() == {}, "without a probe nothing is measured"
    batch = latents_of(task)
    task.probe = {**batch, "truth_latent": batch["low_latent"]}  # the residual of zero: its output is its input
    values = task.measure()
    channels = batch["truth_latent"].shape[1]
    assert values.keys() == {f"latent/{n}/{c}" for n in ("offset", "correlation", "error") for c in range(channels)}
    assert max(values[f"latent/error/{channel}"] for channel in range(channels)) < 1e-8
    assert not caplog.text
    drifted = batch["low_latent"] + 3 * batch["low_latent"].std()
    task.probe = {**batch, "truth_latent": drifted}
    caplog.set_level(logging.WARNING)
    task.measure()
    assert "the generator's latents are not those of the base's encoder in channel 0" in caplog.text


def test_pictures_and_their_latents_measure_the_same(base):
    task = make_task(base, config(weights="whole"))
    task.probe = PICTURES
    pictures = task.measure()
    task.probe = latents_of(task)
    assert task.measure() == pytest.approx(pictures, rel=1e-4)


@pytest.mark.parametrize("together", [1, 3])
def test_how_many_samples_are_measured_at_once_does_not_matter(base, together, monkeypatch):
    """Also where the last part is smaller: no sample is left out or counted twice."""
    task = make_task(base, config(weights="whole"))
    task.probe = {name: value[[0, 1, 0, 1, 0]] for name, value in PICTURES.items()}
    whole, seen, denoised = task.measure(), [], task.denoised
    monkeypatch.setattr(generator_task, "PROBE_PIXELS", together * PICTURES["sharp"][0, 0].numel())
    monkeypatch.setattr(task, "denoised", lambda low: seen.append(len(low)) or denoised(low))
    assert task.measure() == pytest.approx(whole, rel=1e-4)
    assert (max(seen), sum(seen)) == (together, 5)


@pytest.mark.parametrize(
    ("settings", "condition", "words"),
    [
        (config(train_encoder=True), "none", "set generator.networks.train_encoder to false"),
        (config(LossWeights(latent=1, icm=0)), "none", "losses l2, perceptual cannot be computed: set them to 0"),
        (config(LossWeights(l2=0, perceptual=0, latent=1)), "icm", "no pictures to take the condition icm from"),
    ],
    ids=["encoder", "losses", "condition"],
)
def test_what_cannot_be_trained_without_pictures_is_refused(settings, condition, words):
    with pytest.raises(IcmsrError, match=words):
        check_latent_pairs(settings, ConditionConfig(condition))


@pytest.mark.long
def test_the_script_encodes_once_and_resumes(base, tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(3):
        Image.fromarray(synthetic_picture(80, np.random.default_rng(number))).save(photographs / f"{number}.png")
    flags = [
        "--run=run",
        f"--base={base}",
        f"--data.folders=['{photographs}']",
        "--data.crop=32",
        "--latents.pairs=9",
        "--generator.networks.weights=whole",
        "--generator.networks.train_encoder=false",
        "--generator.prediction=residual",
        *(f"--generator.losses.{name}={value}" for name, value in (("l2", 0), ("perceptual", 0), ("icm", 0))),
        "--generator.losses.latent=1",
        "--loop.batch=2",
        "--loop.log_every=4",
        "--loop.save_every=8",
        "--loop.precision=fp32",
        "--device=cpu",
    ]
    file = tmp_path / "run" / "latents" / "pairs.safetensors"
    written = []
    for images in (8, 8):
        process = ScriptProcess("distill.py", *flags, f"--loop.images={images}", folder=tmp_path)
        assert process.wait() == 0, process.output()
        written.append(file.stat().st_mtime_ns)
    assert written[0] == written[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [4, 8, 8]
    assert "loss/generator/latent" in lines[0]
    assert "latent/error/0" in lines[2]
    assert load_generator(tmp_path / "run" / "generator.safetensors").unet.tensors


def test_with_icm_the_log_has_what_the_teacher_makes_of_the_latents(base):
    losses = LossWeights(l2=0, perceptual=0, icm=1)
    task = build_generator_task(
        open_base(base), config(losses), ConditionConfig("none"), (), 0, Loading(), kind=TeacherTest
    )
    assert [player.name for player in task.players()] == ["auxiliary"]
    task.probe = PICTURES
    values = task.measure()
    assert {name.split("/")[1] for name in values if name.startswith("teacher/")} == {
        "teacher",
        "auxiliary",
        "truth",
        "cosine",
        "detail",
    }
    # The auxiliary begins as the teacher.
    assert values["teacher/teacher/350"] == pytest.approx(values["teacher/auxiliary/350"])
    before = {name: value.clone() for name, value in task.state_dict().items()}
    optimizer = torch.optim.SGD(task.players()[0].parameters.values(), lr=1.0)
    for _ in range(2):  # LoRA: the first step moves B alone
        task("auxiliary", task.prepare("auxiliary", PICTURES, 0, 0))[0]["loss"].backward()
        optimizer.step()
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".auxiliary." in name for name in moved)


@pytest.mark.long
def test_the_teacher_s_test_is_a_command(base, tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.fromarray(synthetic_picture(80, np.random.default_rng(0))).save(photographs / "a.png")
    flags = [
        "--run=run",
        f"--base={base}",
        f"--data.folders=['{photographs}']",
        "--data.crop=32",
        "--teacher_test=true",
        "--condition.kind=none",
        "--generator.prediction=residual",
        "--loop.images=4",
        "--loop.batch=2",
        "--loop.precision=fp32",
        "--device=cpu",
    ]
    process = ScriptProcess("distill.py", *flags, folder=tmp_path)
    assert process.wait() == 0, process.output()
    found = json.loads((tmp_path / "run" / "teacher_test.json").read_text())
    assert list(found) == [str(t) for t in TIMESTEPS]
    assert (tmp_path / "run" / "teacher_test.md").read_text().count("\n") == 2 + len(TIMESTEPS)
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    process = ScriptProcess("distill.py", *flags, "--generator.losses.icm=0", "--run=b", folder=tmp_path)
    assert process.wait() == 1
    assert "teacher_test needs a teacher: set generator.losses.icm above 0" in process.output()
