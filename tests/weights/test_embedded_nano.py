"""The weights that ship: better than bicubic on pictures no training saw, no tint, no grid, quiet where it is flat."""

import numpy as np
import pytest
import torch
from skimage import data

from icmsr_core.measures.metrics import high_frequency_ratio, psnr_y, ssim_y
from icmsr_core.pictures.files import from_tensor, to_tensor
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
        truth = getattr(data, name)()
        truth = (truth if truth.ndim == 3 else np.repeat(truth[..., None], 3, axis=-1))[:160, :160, :3]
        low = to_tensor(poor(truth, seed))
        found[name] = upscale(nano, low), resize(low, 160, 160), truth
    return found


def poor(truth: np.ndarray, seed: int) -> np.ndarray:
    """What the preset `camera` makes of `truth` (uint8), in [0, 1]."""
    return degrade(truth, PRESETS["camera"], np.random.default_rng(seed)).astype(np.float32) / np.float32(255)


def flat(*colour: float, size: int = 48) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, size, size)


def test_both_sets_are_there_and_the_file_says_which_is_the_default() -> None:
    generator = load_generator(embedded_generator())
    assert generator.has_two_sets
    assert generator.info.realistic_default == EMBEDDED_FIDELITY
    assert generator.info.training["generator"]["losses"]["icm"] == 0
    assert generator.info.realistic_training["generator"]["losses"]["icm"] > 0


def test_detail_is_gained_over_bicubic(results) -> None:
    """More of the fine detail for every picture; closer to the truth where there is structure."""
    for name, (result, bicubic, truth) in results.items():
        ours, plain = (from_tensor(picture) for picture in (result, bicubic))
        assert high_frequency_ratio(ours, truth) > 1.2 * high_frequency_ratio(plain, truth), name
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
    """Along the lattice of the input's pixels, energy of the gradients varies little more than bicubic's does."""

    def spread(picture: torch.Tensor) -> float:
        energy = picture.diff(dim=-1).abs().mean((0, 1, 2))[:156].view(-1, FACTOR).mean(0)
        return float((energy.max() - energy.min()) / energy.mean())

    ours, plain = (np.mean([spread(found[index]) for found in results.values()]) for index in (0, 1))
    assert ours < 1.1 * plain


@pytest.mark.parametrize("fix", ["wavelet", "none"])
@pytest.mark.parametrize("colour", [(0.5, 0.5, 0.5), (0, 0, 0), (1, 1, 1), (0.8, 0.1, 0.1), (0.02, 0.02, 0.05)])
def test_flat_areas_stay_flat(nano, colour, fix) -> None:
    """Inside, where a cell pattern would show; the picture's edge is another matter (the model card)."""
    result = upscale(nano, flat(*colour), UpscaleSettings(color_fix=fix))
    inner = result[..., 32:-32, 32:-32]
    assert (inner.std((2, 3)) * 255).max() < 0.1
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


def test_fidelity_trades_detail_for_closeness() -> None:
    """Toward the set trained with ICM as well: softer, as docs/nano.md says."""
    truth = data.coffee()[100:228, 200:328]
    low = to_tensor(poor(truth, 0))
    ratios = []
    for fidelity in (0.0, 0.5, 1.0):
        result = upscale(load_backbone(Recipe(generator=embedded_generator(), fidelity=fidelity)), low)
        ratios.append(high_frequency_ratio(from_tensor(result), truth))
    assert ratios[0] > ratios[1] > ratios[2] > 0.1
