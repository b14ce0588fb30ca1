"""The weights that ship: better than bicubic on pictures no training saw, no tint, no grid, quiet where it is flat."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from icmsr_core.measures.artefacts import edge_shape
from icmsr_core.measures.metrics import high_frequency_ratio, psnr_y, ssim_y
from icmsr_core.pictures.files import from_tensor, to_tensor
from icmsr_core.pictures.ranges import unit_to_signed
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.data.degradation import degrade
from icmsr_core.train.data.presets import PRESETS
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import EMBEDDED_FIDELITY, embedded_generator
from icmsr_core.weights.generator_file import load_generator

FACTOR = 4
PICTURES = ("coffee", "brick", "gravel", "text", "page", "rocket")


@pytest.fixture(scope="module")
def nano() -> DiffusersBackbone:
    return load_backbone(Recipe(generator=embedded_generator()))


@pytest.fixture(scope="module")
def results(nano) -> dict[str, tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    """By picture: nano's result, bicubic's, and the truth of 160 x 160 pixels."""
    found = {}
    for seed, name in enumerate(PICTURES):
        truth = original(name)
        low = to_tensor(poor(truth, seed))
        found[name] = upscale(nano, low), resize(low, 160, 160), truth
    return found


def original(name: str) -> np.ndarray:
    """160 x 160 pixels of a picture of scikit-image, uint8."""
    picture = getattr(data, name)()
    return np.ascontiguousarray((picture if picture.ndim == 3 else np.dstack([picture] * 3))[:160, :160, :3])


def poor(truth: np.ndarray, seed: int) -> np.ndarray:
    """What the preset `camera` makes of `truth` (uint8), in [0, 1]."""
    return degrade(truth, PRESETS["camera"], np.random.default_rng(seed)).astype(np.float32) / np.float32(255)


def flat(*colour: float, size: int = 48) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, size, size)


def test_both_sets_are_there_and_the_file_says_which_is_the_default() -> None:
    generator = load_generator(embedded_generator())
    assert generator.has_two_sets
    assert generator.info.realistic_default == EMBEDDED_FIDELITY
    for part in generator.info.training["average"]:
        assert part["training"]["generator"]["losses"]["latent"] > 0
    assert generator.info.realistic_training["generator"]["losses"]["perceptual"] > 0


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_its_latents_are_in_the_code_of_the_vae(fidelity) -> None:
    """By channel, against the latents of the originals; a latent regulariser works on no other generator."""
    nano = load_backbone(Recipe(generator=embedded_generator(), fidelity=fidelity))
    base = load_backbone(Recipe())
    made, true = [], []
    with torch.inference_mode():
        for seed, name in enumerate(PICTURES):
            picture = original(name)
            given = resize(to_tensor(poor(picture, seed)), *picture.shape[:2])
            latent = nano.encode(unit_to_signed(given))
            output = nano.predict_noise(latent, nano.descriptor.timestep)
            made.append(nano.descriptor.clean(latent, output))
            true.append(base.encode(unit_to_signed(to_tensor(picture.astype(np.float32) / 255))))
    made, true = (torch.cat(latents).movedim(1, 0).flatten(1) for latents in (made, true))
    deviation = true.std(1)
    assert ((made.mean(1) - true.mean(1)).abs() / deviation).max() < 0.25
    assert ((made - true).square().mean(1) / deviation.square()).max() < 1.1


@pytest.mark.parametrize("generator", [embedded_generator(), None], ids=["nano", "its prior"])
def test_every_activation_fits_float16_eight_times_over(generator) -> None:
    """Most graphics cards run it in float16, whose largest number is 65504."""
    backbone = load_backbone(Recipe(generator=generator))
    largest = 0.0

    def note(_module: torch.nn.Module, _given: object, made: object) -> None:
        nonlocal largest
        if isinstance(made, torch.Tensor):
            largest = max(largest, float(made.abs().max()))

    for network in (backbone.unet, backbone.vae):
        for module in network.modules():
            module.register_forward_hook(note)
    with torch.inference_mode():
        for seed, name in enumerate(("coffee", "text")):
            picture = original(name)
            latent = backbone.encode(unit_to_signed(resize(to_tensor(poor(picture, seed)), *picture.shape[:2])))
            for t in (backbone.descriptor.timestep,) if generator else (20, 500, 980):
                noisy = (
                    latent
                    if generator
                    else backbone.descriptor.schedule.add_noise(
                        latent, torch.randn(latent.shape, generator=torch.Generator().manual_seed(t)), torch.tensor([t])
                    )
                )
                backbone.predict_noise(noisy, t)
            backbone.decode(latent)
    assert 1 < largest < 65504 / 8


def test_detail_is_gained_over_bicubic(results) -> None:
    """More of the fine detail for every picture; closer to the truth where there is structure."""
    for name, (result, bicubic, truth) in results.items():
        ours, plain = (from_tensor(picture) for picture in (result, bicubic))
        assert high_frequency_ratio(ours, truth) > 1.05 * high_frequency_ratio(plain, truth), name
        assert psnr_y(ours, truth) > psnr_y(plain, truth) - 1.2, name
    for name in ("brick", "text"):
        result, bicubic, truth = results[name]
        ours, plain = from_tensor(result), from_tensor(bicubic)
        assert psnr_y(ours, truth) > psnr_y(plain, truth), name
        assert ssim_y(ours, truth) > ssim_y(plain, truth) + 0.01, name


def test_the_result_has_no_tint(results) -> None:
    for name, (result, bicubic, _) in results.items():
        assert ((result - bicubic).mean((2, 3)).abs() * 255).max() < 0.5, name


def test_the_result_shows_no_grid_of_the_input_s_pixels(results) -> None:
    """Along the lattice of the input's pixels, the gradients' energy varies less than bicubic's."""

    def spread(picture: torch.Tensor) -> float:
        energy = picture.diff(dim=-1).abs().mean((0, 1, 2))[:156].view(-1, FACTOR).mean(0)
        return float((energy.max() - energy.min()) / energy.mean())

    ours, plain = (np.mean([spread(found[index]) for found in results.values()]) for index in (0, 1))
    assert ours < 0.9 * plain


def test_slanted_edges_are_straighter_than_bicubic_s(nano) -> None:
    """How far they leave the straight line, row by row: a staircase has the input's pixels as steps."""
    ratios = []
    for angle in (3, 7, 12, 20, 30):
        places = (torch.arange(256 * FACTOR) + 0.5) / FACTOR - 128
        right = (places[None] > math.tan(math.radians(angle)) * places[:, None]).float()
        small = F.avg_pool2d(right[None, None], FACTOR**2).expand(1, 3, -1, -1) * 0.5 + 0.25
        shapes = [edge_shape(luma(way(small))) for way in (lambda low: upscale(nano, low), enlarged)]
        assert shapes[0].jitter < shapes[1].jitter, angle
        assert shapes[0].width < 0.6 * shapes[1].width, angle
        ratios.append(shapes[0].jitter / shapes[1].jitter)
    assert np.mean(ratios) < 0.75


def enlarged(low: torch.Tensor) -> torch.Tensor:
    return resize(low, low.shape[-2] * FACTOR, low.shape[-1] * FACTOR)


def luma(picture: torch.Tensor) -> np.ndarray:
    """The middle of a grey picture [1, 3, H, W] as [H, W]."""
    return picture[0, 0, 32:-32, 32:-32].double().numpy()


@pytest.mark.parametrize("fix", ["wavelet", "none"])
@pytest.mark.parametrize("colour", [(0.5, 0.5, 0.5), (0, 0, 0), (1, 1, 1), (0.8, 0.1, 0.1), (0.02, 0.02, 0.05)])
def test_flat_areas_stay_flat(nano, colour, fix) -> None:
    """Inside, where a cell pattern would show; the picture's edge is another matter (the model card)."""
    result = upscale(nano, flat(*colour), UpscaleSettings(color_fix=fix))
    inner = result[..., 32:-32, 32:-32]
    assert (inner.std((2, 3)) * 255).max() < 0.25
    if fix == "wavelet":
        assert ((inner - flat(*colour)[..., :1, :1]).abs() * 255).max() < 1


def test_a_smooth_ramp_has_no_steps(nano) -> None:
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 3, 64, 64)
    rows = upscale(nano, ramp)[..., 32:-32, 32:-32].mean((0, 1, 2))
    assert (rows.diff() > 0).all()
    assert ((rows - resize(ramp, 256, 256)[0, 0, 100, 32:-32]).abs() * 255).max() < 1


def test_noise_of_a_flat_area_is_not_amplified(nano) -> None:
    """Frame by frame, as flicker would show: at most what the input itself has."""
    random = torch.Generator().manual_seed(0)
    frames = flat(0.5, 0.5, 0.5, size=32) + torch.randn(6, 3, 32, 32, generator=random) * 2 / 255
    assert float(upscale(nano, frames).std(0).mean()) < 1.2 * float(frames.std(0).mean())


def test_fidelity_trades_closeness_for_detail(results) -> None:
    """More detail in every picture, and on average farther from the truth by pixels."""
    faithful = load_backbone(Recipe(generator=embedded_generator(), fidelity=0.0))
    lost = []
    for seed, name in enumerate(PICTURES):
        truth = original(name)
        close = from_tensor(upscale(faithful, to_tensor(poor(truth, seed))))
        detailed = from_tensor(results[name][0])
        assert high_frequency_ratio(detailed, truth) > 1.1 * high_frequency_ratio(close, truth), name
        lost.append(psnr_y(close, truth) - psnr_y(detailed, truth))
    assert np.mean(lost) > 0
