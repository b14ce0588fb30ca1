"""Perceptual distances on the decoder's features, and which one a configuration chooses."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import gaussian_blur

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.lpips import Lpips, load_lpips
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.losses.perceptual import DecoderPerceptual, PerceptualConfig, feature_distance, make_perceptual
from icmsr_core.train.run.launch import parse_config
from icmsr_core.weights.base import open_base
from icmsr_core.weights.embedded import embedded_base
from tests.support.loss_pictures import noisy, picture

CPU = torch.device("cpu")


def frozen(vae: AutoencoderKL) -> AutoencoderKL:
    return vae.eval().requires_grad_(False)


def small_vae(widths: tuple[int, ...] = (32, 32, 64, 64), attention: bool = True) -> AutoencoderKL:
    """In the shape of Stable Diffusion's, random."""
    torch.manual_seed(0)
    levels = len(widths)
    return frozen(
        AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=0.18215,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            mid_block_add_attention=attention,
        )
    )


@pytest.fixture(scope="module")
def converted(metric_weights: Path) -> Path:
    return metric_weights / "lpips_vgg.safetensors"


@pytest.fixture(scope="module")
def nano() -> AutoencoderKL:
    return frozen(build_networks(open_base(embedded_base()))[1])


def latent_of(vae: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(image).latent_dist.mode() * vae.config.scaling_factor


VAES = {
    "four levels": small_vae,
    "four levels, no attention": lambda: small_vae(attention=False),
    "two levels": lambda: small_vae((32, 64)),
}


@pytest.mark.parametrize("name", VAES)
def test_a_decoder_of_any_depth_has_features_and_a_gradient(name):
    vae = VAES[name]()
    perceptual = DecoderPerceptual(vae)
    truth = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    latent = noisy(truth).requires_grad_()
    image, features = perceptual.decode(latent)
    assert torch.equal(image, vae.decode(latent / 0.18215).sample)
    assert [entry.shape[-1] for entry in features] == [8, 16, 32 if len(vae.decoder.up_blocks) == 4 else 16]
    distance = perceptual.distance(features, perceptual.features(truth))
    assert 0 < distance < 4
    distance.backward()
    assert latent.grad.isfinite().all()
    assert (latent.grad != 0).all()
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_the_decoder_of_nano_gives_picture_and_features_in_one_pass(nano):
    truth = latent_of(nano, picture(64, 2))
    perceptual = DecoderPerceptual(nano)
    image, features = perceptual.decode(truth)
    assert torch.equal(image, nano.decode(truth / nano.config.scaling_factor).sample)
    targets = perceptual.features(truth)
    assert all(torch.equal(left, right) for left, right in zip(features, targets, strict=True))
    assert perceptual.distance(features, targets) == 0
    with torch.autocast("cpu", torch.bfloat16):
        image, features = perceptual.decode(truth)
        assert torch.equal(image, nano.decode(truth / nano.config.scaling_factor).sample.float())
        distance = perceptual.distance(features, targets)
    assert features[0].dtype == torch.bfloat16
    assert image.dtype == distance.dtype == torch.float32
    assert 0 < distance < 0.01


@pytest.mark.parametrize("levels", [1, 3, 4])
def test_decoder_distance_grows_with_blur(nano, levels):
    sharp = picture(128, 2)
    perceptual = DecoderPerceptual(nano, levels)
    targets = perceptual.features(latent_of(nano, sharp))
    assert len(targets) == levels
    distances = [0.0]
    for sigma in (0.4, 0.7, 1.0, 1.5, 2.5, 4.0):
        blurred = gaussian_blur(sharp, 25, sigma)
        distances.append(perceptual.distance(perceptual.decode(latent_of(nano, blurred))[1], targets).item())
    assert distances == sorted(set(distances))
    assert distances[-1] > 0.3


def test_a_step_along_the_gradient_comes_nearer(nano):
    sharp = picture(64)
    perceptual = DecoderPerceptual(nano)
    targets = perceptual.features(latent_of(nano, sharp))
    latent = latent_of(nano, gaussian_blur(sharp, 13, 1.5)).requires_grad_()
    optimiser = torch.optim.Adam([latent], lr=0.05)
    distances = []
    for _ in range(10):
        optimiser.zero_grad()
        distance = perceptual.distance(perceptual.decode(latent)[1], targets)
        distance.backward()
        optimiser.step()
        distances.append(distance.item())
    assert distances[-1] < 0.8 * distances[0]


def test_the_truth_is_decoded_no_deeper_than_needed(nano):
    passed = []
    hooks = [block.register_forward_hook(lambda *_: passed.append(1)) for block in nano.decoder.up_blocks]
    try:
        features = DecoderPerceptual(nano, 2).features(torch.zeros(1, 8, 4, 4).requires_grad_())
        assert len(features) == 2
        assert len(passed) == 1
        assert not any(entry.requires_grad for entry in features)
    finally:
        for hook in hooks:
            hook.remove()
    assert not any(block._forward_hooks for block in (nano.decoder.mid_block, *nano.decoder.up_blocks))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_collects_once_and_keeps_the_gradient(reentrant):
    truth = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    gradients = []
    for checkpointing in (False, True):
        vae = small_vae()
        if checkpointing and reentrant:
            vae.enable_gradient_checkpointing(lambda *block: checkpoint(*block, use_reentrant=True))
        elif checkpointing:
            vae.enable_gradient_checkpointing()
        perceptual = DecoderPerceptual(vae, 5)
        latent = noisy(truth).requires_grad_()
        image, features = perceptual.decode(latent)
        loss = perceptual.distance(features, perceptual.features(truth)) + image.square().mean()
        runs = []
        vae.decoder.mid_block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss.backward()
        assert len(runs) == checkpointing  # it does recompute
        assert len(features) == 5
        gradients.append(latent.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


def test_both_kinds_are_means_over_samples(nano, converted):
    truth = picture(48, 4)
    result = torch.cat([noisy(truth[:2], 0.05), noisy(truth[2:], 0.5)])
    decoder, measure = DecoderPerceptual(nano, 4), load_lpips(converted)

    def of_decoder(left, right):
        return decoder.distance(decoder.decode(left)[1], decoder.features(right))

    latents = latent_of(nano, result), latent_of(nano, truth)
    for distance, (left, right) in ((measure, (result, truth)), (of_decoder, latents)):
        whole = distance(left, right)
        halves = [distance(left[part], right[part]) for part in (slice(0, 2), slice(2, 4))]
        assert halves[1] > 1.5 * halves[0]
        assert sum(halves).item() / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_flat_truth_and_outliers_stay_bounded():
    random = torch.Generator().manual_seed(3)
    truth = torch.randn(1, 8, 16, 16, generator=random)
    given = truth.clone()
    given[0, 3, 5, 5] = 1e6
    assert 0 < feature_distance([given], [truth]) < 4 / 256 + 1e-6
    for flat in (torch.zeros_like(truth), torch.full_like(truth, 5.0)):
        result = (flat + 1e-3 * truth).requires_grad_()
        distance = feature_distance([result], [flat])
        distance.backward()
        assert 0 < distance <= 4
        assert result.grad.isfinite().all()
        assert feature_distance([flat], [flat]) == 0


def test_a_huge_channel_does_not_drown_the_others():
    truth = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    result = torch.cat([truth[:, :1], truth[:, 1:].flip(-1)], dim=1)
    sizes = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1]).view(1, 8, 1, 1)
    even, uneven = (feature_distance([result * size], [truth * size]).item() for size in (torch.ones(1), sizes))
    assert even > 1
    assert uneven == pytest.approx(even, rel=0.01)


def test_a_half_precision_decoder_takes_float32_latents():
    vae = small_vae().to(torch.bfloat16)
    image, features = DecoderPerceptual(vae).decode(torch.randn(1, 4, 8, 8).requires_grad_())
    assert image.dtype == torch.float32
    assert all(entry.requires_grad for entry in features)


def test_wrong_levels_trained_decoders_and_other_shapes_are_refused(nano):
    with pytest.raises(IcmsrError, match=r"1 to 4 for this VAE.*got 5"):
        DecoderPerceptual(nano, 5)
    vae = small_vae()
    vae.post_quant_conv.requires_grad_(True)
    with pytest.raises(IcmsrError, match="train_decoder to false"):
        DecoderPerceptual(vae)
    vae = small_vae()
    vae.encoder.requires_grad_(True)  # the generator trains it
    perceptual = DecoderPerceptual(vae)
    vae.enable_slicing()
    with pytest.raises(IcmsrError, match="disable_slicing"):
        perceptual.features(torch.zeros(2, 4, 8, 8))
    maps = torch.zeros(1, 4, 8, 8)
    for left, right in (([], []), ([maps], []), ([maps], [maps[..., 1:]])):
        with pytest.raises(IcmsrError, match="same shapes"):
            feature_distance(left, right)


def test_the_configuration_chooses_the_perceptual_loss(nano, converted):
    assert make_perceptual(PerceptualConfig("none"), nano, CPU) is None
    decoder = make_perceptual(PerceptualConfig(levels=2), nano, CPU)
    assert isinstance(decoder, DecoderPerceptual)
    assert len(decoder.features(torch.zeros(1, 8, 4, 4))) == 2
    measure = make_perceptual(PerceptualConfig("lpips", str(converted)), nano, CPU)
    assert not measure.bf16
    assert make_perceptual(PerceptualConfig("lpips", str(converted), precision="bf16"), nano, CPU).bf16
    assert isinstance(measure, Lpips)
    assert measure(noisy(picture(32)), picture(32)) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vgg"}, "one of none, decoder, lpips, got 'vgg'"),
        ({"levels": 0}, "levels must be 1 or more, got 0"),
        ({"shift": -1}, r"perceptual\.shift must be 0 to 15 pixels, got -1"),
        ({"shift": 16}, r"perceptual\.shift must be 0 to 15 pixels, got 16"),
        ({"precision": "fp16"}, r"perceptual\.precision must be fp32 or bf16, got 'fp16'"),
        ({"kind": "lpips"}, r"got '': .*train/metric_weights\.py.*perceptual\.kind=decoder"),
        ({"kind": "lpips", "weights": "/no/such/file"}, r"'/no/such/file' \(no such file\).*kind=decoder"),
    ],
)
def test_wrong_configurations_name_the_value(values, message):
    with pytest.raises(IcmsrError, match=message):
        PerceptualConfig(**values)


@dataclass(frozen=True)
class Config:
    """As a training script would hold it."""

    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The term."""


def test_flags_choose_the_perceptual_loss(converted):
    config = parse_config(Config, ["--perceptual.kind=lpips", f"--perceptual.weights={converted}"])
    assert config.perceptual == PerceptualConfig("lpips", str(converted))
    with pytest.raises(IcmsrError, match="kind=decoder"):
        parse_config(Config, ["--perceptual.kind=lpips"])
