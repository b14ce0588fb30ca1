"""NIQE against the published algorithm, written out with scipy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import correlate
from scipy.special import gamma

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.niqe import NaturalStatistics, load_niqe, natural_statistics, niqe


@pytest.fixture(scope="module")
def natural(metric_weights: Path) -> NaturalStatistics:
    return load_niqe(metric_weights / "niqe.safetensors")


def textured(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random field with noise, whose Y is nowhere half an integer."""
    random = np.random.default_rng(seed)
    coarse = np.kron(random.random((height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))[:height, :width]
    pixels = (200 * coarse + 40 * random.random((height, width, 3))).astype(np.int64)
    ties = pixels @ [299, 587, 114] % 1000 == 500
    pixels[ties] = 0
    return pixels


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


def half_matrix(size: int) -> np.ndarray:
    """MATLAB's imresize by one half along an axis, as a matrix [size / 2, size]."""
    matrix = np.zeros((size // 2, size))
    for row in range(size // 2):
        center = 2 * row + 0.5
        taps = np.arange(math.floor(center) - 6, math.floor(center) + 8)
        weights = cubic((taps - center) / 2)
        mirrored = np.where(taps < 0, -1 - taps, np.where(taps >= size, 2 * size - 1 - taps, taps))
        np.add.at(matrix[row], mirrored, weights / weights.sum())
    return matrix


def slow_fit(values: np.ndarray) -> tuple[float, float, float]:
    shapes = np.arange(0.2, 10.001, 0.001)
    ratios = gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))
    left, right = (np.sqrt((side**2).mean()) for side in (values[values < 0], values[values > 0]))
    r = np.abs(values).mean() ** 2 / (values**2).mean()
    g = left / right
    alpha = shapes[np.argmin((ratios - r * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2) ** 2)]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * scale, right * scale


def slow_niqe(pixels: np.ndarray, natural: NaturalStatistics) -> float:
    line = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.float32(np.outer(line, line) / line.sum() ** 2).astype(np.float64)
    rows, columns = pixels.shape[0] // 96, pixels.shape[1] // 96
    luma = np.rint(pixels[: 96 * rows, : 96 * columns] @ [299, 587, 114] / 1000)
    features = [[] for _ in range(rows * columns)]
    for side in (96, 48):
        mean = correlate(luma, window, mode="nearest")
        deviation = np.sqrt(np.abs(correlate(luma**2, window, mode="nearest") - mean**2))
        normal = (luma - mean) / (deviation + 1)
        for block in range(rows * columns):
            top, left = side * (block // columns), side * (block % columns)
            part = normal[top : top + side, left : left + side]
            alpha, below, above = slow_fit(part)
            features[block] += [alpha, (below + above) / 2]
            for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
                alpha, below, above = slow_fit(part * np.roll(part, shift, (0, 1)))
                features[block] += [alpha, (above - below) * gamma(2 / alpha) / gamma(1 / alpha), below, above]
        luma = half_matrix(luma.shape[0]) @ luma @ half_matrix(luma.shape[1]).T
    difference = natural.mean - np.mean(features, axis=0)
    inverse = np.linalg.pinv((natural.covariance + np.cov(np.array(features).T)) / 2)
    return float(np.sqrt(difference @ inverse @ difference))


def test_niqe_is_the_published_algorithm(natural):
    for pixels in (textured(1, 200, 300), textured(2, 96, 192)):  # the rest behind whole blocks does not count
        value = niqe((pixels / 255).astype(np.float32), natural)
        assert value == pytest.approx(slow_niqe(pixels, natural), rel=1e-8)
    cropped = niqe((textured(1, 200, 300)[:192, :288] / 255).astype(np.float32), natural)
    assert cropped == niqe((textured(1, 200, 300) / 255).astype(np.float32), natural)


def test_blocks_without_texture_have_no_statistics(natural):
    pixels = textured(1, 192, 288)
    flat = pixels.copy()
    flat[:96, :96] = 77
    assert math.isfinite(niqe((flat / 255).astype(np.float32), natural))
    flat[:] = 77
    assert math.isnan(niqe((flat / 255).astype(np.float32), natural))


@pytest.mark.parametrize("size", [(95, 400), (191, 191)])
def test_pictures_of_fewer_than_two_blocks_are_refused(natural, size):
    with pytest.raises(IcmsrError, match=rf"two blocks of 96 x 96 pixels, got {size[1]} x {size[0]}"):
        niqe(np.zeros((*size, 3), np.float32), natural)


def test_loading_refuses_other_files(metric_weights, tmp_path):
    with pytest.raises(IcmsrError, match=r"no such file: make it with .* --niqe niqe_pris_params\.npz"):
        load_niqe(tmp_path / "niqe.safetensors")
    with pytest.raises(IcmsrError, match="not a converted NIQE file"):
        load_niqe(metric_weights / "lpips_vgg.safetensors")
    tensors = load_file(metric_weights / "niqe.safetensors")
    assert tensors["mean"].dtype == torch.float64
    with pytest.raises(IcmsrError, match=r"other: .*mean is \[35\]"):
        natural_statistics("other", {**tensors, "mean": tensors["mean"][:35]})
