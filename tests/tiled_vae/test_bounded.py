"""Bounded mode: no seams, memory for stripes only, near to exact mode on the embedded model."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from icmsr_core.backbone.vae_steps import Sample
from icmsr_core.cli.demo import demo_picture
from icmsr_core.pictures.files import read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.tiled_vae import estimate as tiled_vae_statistics
from icmsr_core.tiled_vae.estimate import FIELD, FIELD_MARGIN, estimate_whole
from icmsr_core.tiled_vae.modes import BoundedStream, Estimate, ExactStream
from icmsr_core.upscale import color
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.embedded import embedded_generator
from tests.support.live_bytes import LiveBytes
from tests.support.stripes import encode_in_stripes
from tests.support.vaes import TOLERANCE, backbone_of, decoded, own_statistics, random_vae, run_bounded, uneven_picture


@pytest.mark.parametrize("axis", [2, 3])
@torch.inference_mode()
def test_bounded_has_no_seams_beside_its_statistics(backbone, axis: int) -> None:
    """With the true statistics, and one window for the attention, it is the untiled result."""
    factor = backbone.descriptor.latent_factor
    image = 2 * uneven_picture(13 * factor, 11 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    latent = backbone.encode(image)
    got = run_bounded(half, image, 2 * factor, own_statistics(half, image), axis)
    torch.testing.assert_close(got, latent, rtol=0, atol=TOLERANCE)
    half = backbone.vae_half("decoder", 0)
    got = run_bounded(half, latent, 2, own_statistics(half, latent), axis)
    torch.testing.assert_close(got, backbone.decode(latent), rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_the_more_a_window_sees_around_itself_the_nearer_it_is_to_the_whole() -> None:
    """Windows whose margin reaches everywhere are the whole; with less margin they are near it, with none far."""
    backbone = backbone_of(random_vae(3, True, True))
    latent = torch.randn(1, 4, 20, 22, generator=torch.Generator().manual_seed(2))
    half, whole = backbone.vae_half("decoder", 0), backbone.decode(latent)
    known = own_statistics(half, latent)
    errors = []
    for margin in (22, 4, 0):  # without a sample of the rest
        got = run_bounded(half, latent, 3, known, window=6, margin=margin)
        errors.append(float((got - whole).square().mean().sqrt()))
    assert errors[0] < TOLERANCE
    assert 100 * TOLERANCE < errors[1] < 0.8 * errors[2]


@torch.inference_mode()
def test_a_sample_stands_for_what_a_window_does_not_see() -> None:
    """Exactly, if it is all of the map; nearly, if it is the fields that are drawn."""
    backbone = backbone_of(random_vae(3, True, True))
    latent = torch.randn(1, 4, 80, 72, generator=torch.Generator().manual_seed(2))
    half, whole = backbone.vae_half("decoder", 0), backbone.decode(latent)
    known = own_statistics(half, latent)
    drawn = estimate_whole(half, latent, 1, 4, 16)
    assert [sample.total for sample in drawn.samples.values()] == [80 * 72]
    attention = next(iter(drawn.samples))
    errors = []
    for samples in ({}, drawn.samples):
        got = run_bounded(half, latent, 8, Estimate(known, samples), window=16, margin=4)
        errors.append(float((got - whole).square().mean().sqrt()))
    print(errors)
    assert errors[1] < 0.8 * errors[0]
    field = torch.randn(1, 24, 6, 5, generator=torch.Generator().manual_seed(3))
    every = Sample(field.flatten(2), torch.full((30,), 1 / 30), 30)
    torch.testing.assert_close(attention.run(field, None, every), attention.run(field, field), rtol=0, atol=1e-5)
    # A place that stands for three is three places.
    doubled = torch.cat([field, field[:, :, :2], field[:, :, :2]], 2)
    shares = torch.tensor([3.0] * 10 + [1.0] * 20) / 50
    weighted = attention.run(field, None, Sample(field.flatten(2), shares, 50))
    torch.testing.assert_close(weighted, attention.run(field, doubled), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_no_place_is_computed_twice(backbone) -> None:
    """The operations of all stripes together are those of the whole."""
    factor = backbone.descriptor.latent_factor
    image = torch.rand(1, 3, 12 * factor, 10 * factor)
    half = backbone.vae_half("encoder", 0)
    known = own_statistics(half, image)

    def operations(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    whole = operations(lambda: backbone.encode(image))
    striped = operations(lambda: run_bounded(half, image, 2 * factor, known))
    assert whole > 0
    assert abs(striped / whole - 1) < 0.01


def test_live_bytes_count_what_is_held() -> None:
    with LiveBytes() as memory:
        one = torch.zeros(1000)
        for _ in range(5):
            two = one + 1
            del two
        view = torch.zeros(500)[:10]
        del one
        three = torch.zeros(1000)
    assert memory.peak == 4 * 2000
    assert view.numel() + three.numel() == 1010


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@torch.no_grad()
def test_bounded_keeps_no_more_than_stripes(part: str) -> None:
    """Pictures two and four times as long take no more memory at all; the exact mode takes as much more."""
    backbone = backbone_of(random_vae(3, True, True))
    half = backbone.vae_half(part, 0)
    unit, channels = (4, 3) if part == "encoder" else (1, 4)
    known = own_statistics(half, torch.randn(1, channels, 8 * unit, 8 * unit))
    peaks: dict[str, list[int]] = {"bounded": [], "exact": []}
    for length in (40, 80, 160):
        source = torch.randn(1, channels, length * unit, 16 * unit)
        for name, stream in (
            ("bounded", BoundedStream(half, 2, Estimate(known), 8, 2)),
            ("exact", ExactStream(half, 2)),
        ):
            with LiveBytes() as memory:
                made = 0
                for chunk in stream.through(half.steps, stream.source(source, 4 * unit)).chunks:
                    made += chunk.shape[2]
                    del chunk
            assert made == (length if part == "encoder" else 4 * length)
            peaks[name].append(memory.peak - 4 * source.numel())  # which its first stripe counts with
    print(peaks)
    assert peaks["bounded"][0] == peaks["bounded"][1] == peaks["bounded"][2]
    assert peaks["exact"][2] > 2 * peaks["exact"][0]


@pytest.mark.long
@torch.no_grad()
def test_memory_of_a_long_picture_grows_by_the_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, enlarged input, result, latents; the fields are as many in both, and the colours run in stripes."""
    monkeypatch.setattr(color, "STRIPE_ROWS", 64)
    monkeypatch.setattr(tiled_vae_statistics, "FEWEST", 16)
    monkeypatch.setattr(tiled_vae_statistics, "LARGEST", 16 * ((FIELD + 2 * FIELD_MARGIN) * 4) ** 2)
    # As many windows whatever the picture: none is dropped.
    monkeypatch.setattr(tiled_vae_statistics, "calibrate", lambda off, weights: weights / weights.sum())
    backbone = backbone_of(random_vae(3, False, True))
    settings = UpscaleSettings(scale=2, tile=64, overlap=16, vae="bounded")
    peaks = []
    for length in (512, 1024):
        with LiveBytes() as memory:
            upscale(backbone, torch.rand(1, 3, length, 32), settings)
        peaks.append(memory.peak)
    # In pictures of the result's size: the input is a fourth, each of at most three latents a twelfth.
    growth = (peaks[1] - peaks[0]) / (4 * 3 * 1024 * 64)
    print(growth)
    assert growth < 2 + 1 / 4 + 3 / 12 + 0.2


@pytest.fixture(scope="module")
def nano() -> DiffusersBackbone:
    return load_backbone(Recipe(generator=embedded_generator()))


@torch.inference_mode()
def test_bounded_stays_close_to_exact_on_the_embedded_model(nano) -> None:
    """At least 45 dB on a photograph, encoder and decoder together."""
    image = to_tensor(read_picture(demo_picture()).rgb).float()
    factor = nano.descriptor.latent_factor
    image = torch.nn.functional.interpolate(image[:, :, :64, :96], scale_factor=4, mode="bicubic").clamp(0, 1)
    results = {}
    for exact in (True, False):
        latent = encode_in_stripes(nano, image, tile=256 // factor, exact=exact)
        results[exact] = decoded(nano, latent, tile=256 // factor, exact=exact)
    psnr = -10 * torch.log10(((results[True] - results[False]) / 2).square().mean())
    print(f"{psnr:.1f} dB")
    assert 45 < psnr < 120


def mosaic_of_the_demo(side: int) -> torch.Tensor:
    """Sixteen parts of the demo's photograph, each enlarged, darkened, faded and mirrored in its own way."""
    photograph = to_tensor(read_picture(demo_picture()).rgb).float()
    part = side // 16
    parts = []
    for index in range(16):
        y, x = (index * 37) % (photograph.shape[2] - part), (index * 53) % (photograph.shape[3] - part)
        crop = photograph[:, :, y : y + part, x : x + part].flip(2 + index % 2)
        contrast, light = (0.05, 1.0, 0.4, 0.8)[index % 4], (0.5, 0.0, 0.55, 0.1)[index % 4]
        parts.append(contrast * crop.roll(index, 1) + light)
    rows = [torch.cat(parts[index : index + 4], 3) for index in range(0, 16, 4)]
    whole = torch.nn.functional.interpolate(torch.cat(rows, 2), scale_factor=4, mode="bicubic")
    return whole.clamp(0, 1)


@pytest.mark.long
@torch.inference_mode()
def test_bounded_stays_close_to_exact_where_every_part_has_other_statistics(nano) -> None:
    """The aim of 45 dB, encoder and decoder together, on the hardest kind of picture; without windows it is missed."""
    image = mosaic_of_the_demo(768)
    results = {}
    for exact in (True, False):
        latent = encode_in_stripes(nano, image, tile=64, exact=exact)
        results[exact] = decoded(nano, latent, tile=64, exact=exact)
    psnr = -10 * torch.log10(((results[True] - results[False]) / 2).square().mean())
    print(f"{psnr:.1f} dB")
    assert 45 < psnr < 120
