"""A generator that goes on in the latent of its base after that was normalised."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import unit_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.networks.bases import save_base
from icmsr_core.train.networks.conditioning import ConditionConfig
from icmsr_core.train.networks.generator import NetworksConfig
from icmsr_core.train.networks.latent_scales import latent_change
from icmsr_core.train.tasks.autoencoder import normalise_latent
from icmsr_core.train.tasks.building import Loading, build_generator_task, check_generator
from icmsr_core.train.tasks.generator import GeneratorTask
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.weights.base import open_base
from icmsr_core.weights.embedded import embedded_base, embedded_generator
from tests.support.pictures import photo

CONDITION = ConditionConfig("none")
LOSSES = LossWeights(l2=1, perceptual=0, icm=0)


def settings(**networks) -> GeneratorConfig:
    return GeneratorConfig(
        timestep=200,
        prediction=networks.pop("prediction", "residual"),
        networks=NetworksConfig(weights="whole", train_encoder=False, **networks),
        losses=LOSSES,
    )


def build(base: Path, **networks) -> GeneratorTask:
    folder, config = open_base(base), settings(**networks)
    check_generator(folder, config, CONDITION)
    return build_generator_task(folder, config, CONDITION, (), 0, Loading())


def picture_of(task: GeneratorTask, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return task.networks.decode(task.denoised(task.networks.encode(picture)))


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's base as train/prior.py with normalise_latent makes it, over one picture."""
    folder = open_base(embedded_base())
    unet, vae = build_networks(folder)
    with torch.no_grad():
        normalise_latent(vae, unit_to_signed(photo(128, 128)))
    path = tmp_path_factory.mktemp("normalised") / "base"
    save_base(path, unet, vae, folder.prompt_embedding(), folder.info)
    return path


def test_a_moved_generator_gives_its_picture(normalised: Path):
    """Not at the border, where the first convolution is padded with another latent's zero."""
    start, picture = str(embedded_generator()), unit_to_signed(photo(192, 192))
    before = picture_of(build(embedded_base(), start=start, start_fidelity=1.0), picture)
    moved = build(normalised, start=start, start_fidelity=1.0, start_base=str(embedded_base()))
    unmoved = build(normalised, start=start, start_fidelity=1.0)
    inner = (..., slice(64, -64), slice(64, -64))
    near, far = ((picture_of(task, picture) - before)[inner].abs() * 127.5 for task in (moved, unmoved))
    assert near.mean() < 0.2
    assert near.max() < 2
    assert far.mean() > 10 * near.mean(), "the latents differ, so the step matters"


def test_the_sets_of_a_start_are_merged_at_its_fidelity():
    start = str(embedded_generator())
    name = "down_blocks.0.resnets.0.conv1.weight"
    none, half, whole = (
        build(embedded_base(), start=start, start_fidelity=fidelity).networks.generator_unet.state_dict()[name]
        for fidelity in (0.0, 0.5, 1.0)
    )
    assert (whole - none).abs().max() > 1e-3
    torch.testing.assert_close(half, (none + whole) / 2)


def test_gain_and_shift_are_those_of_the_latents(normalised: Path):
    old, new = (build_networks(open_base(path))[1] for path in (embedded_base(), normalised))
    gain, shift = latent_change(old, new)
    picture = unit_to_signed(photo(64, 96))
    with torch.no_grad():
        before, after = (
            vae.encode(picture).latent_dist.mode()[0] * float(vae.config.scaling_factor) for vae in (old, new)
        )
    torch.testing.assert_close(gain.view(-1, 1, 1) * before + shift.view(-1, 1, 1), after, atol=5e-3, rtol=0)


def test_a_latent_that_is_not_only_scaled_is_refused(base: Path, normalised: Path):
    old, new = (build_networks(open_base(path))[1] for path in (embedded_base(), normalised))
    with pytest.raises(IcmsrError, match="another VAE"):
        latent_change(build_networks(open_base(base))[1], new)
    with torch.no_grad():
        new.quant_conv.weight[0] = new.quant_conv.weight[1].clone()
    with pytest.raises(IcmsrError, match="more than scaled"):
        latent_change(old, new)


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        ({"start_base": "base"}, "networks.start_base is for"),
        ({"start_fidelity": 1.0}, "networks.start_fidelity is for"),
        ({"start": "file", "start_fidelity": 2.5}, "from 0 to 2, got 2.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(networks, words):
    with pytest.raises(IcmsrError, match=words):
        settings(**networks)


def test_a_start_base_that_is_not_there_is_refused_before_anything_is_built():
    config = settings(start=str(embedded_generator()), start_base="nowhere")
    with pytest.raises(IcmsrError, match="nowhere"):
        check_generator(open_base(embedded_base()), config, CONDITION)


def test_a_start_with_one_set_has_no_fidelity(tmp_path: Path):
    build(embedded_base(), zero_output=True).export(tmp_path, {})
    with pytest.raises(IcmsrError, match="single set"):
        build(embedded_base(), start=str(tmp_path / "generator.safetensors"), start_fidelity=1.0)
