"""Blur kernels: sums, shapes, directions."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.blur_kernels import gaussian_kernel, motion_kernel, plateau_kernel
from icmsr_core.train.data.degradation import draw_blur_kernel
from icmsr_core.train.data.presets import StageConfig


@pytest.mark.parametrize("kind", range(6))
def test_blur_kernels_sum_to_one_and_are_positive(kind: int) -> None:
    probs = tuple(float(index == kind) for index in range(6))
    stage = StageConfig(kernel_probs=probs, sinc_prob=0.0)  # type: ignore[arg-type]
    rng = np.random.default_rng(kind)
    sizes = set()
    for _ in range(100):
        kernel = draw_blur_kernel(stage, rng)
        sizes.add(len(kernel))
        assert kernel.shape == (len(kernel), len(kernel))
        assert kernel.sum() == pytest.approx(1.0)
        assert kernel.min() >= 0
        assert kernel.argmax() == kernel.size // 2
        assert np.allclose(kernel, kernel[::-1, ::-1])
        if kind % 2 == 0:
            assert np.allclose(kernel, kernel.T)
    assert sizes == set(range(7, 22, 2))


def test_gaussian_kernel_is_the_gaussian() -> None:
    line = cv2.getGaussianKernel(21, 2.3)
    assert np.allclose(gaussian_kernel(21, 2.3, 2.3, 0.0), line @ line.T, atol=1e-12)
    wide = gaussian_kernel(41, 4.0, 1.5, math.pi / 6)
    y, x = np.mgrid[-20:21, -20:21]
    covariance = np.array([[(wide * x * x).sum(), (wide * x * y).sum()], [(wide * x * y).sum(), (wide * y * y).sum()]])
    turn = np.array([[math.cos(math.pi / 6), -math.sin(math.pi / 6)], [math.sin(math.pi / 6), math.cos(math.pi / 6)]])
    assert np.allclose(covariance, turn @ np.diag([16.0, 2.25]) @ turn.T, rtol=1e-3, atol=1e-3)


def test_beta_shapes_the_kernels() -> None:
    def kurtosis(kernel: np.ndarray) -> float:
        x = np.arange(len(kernel)) - len(kernel) // 2
        row = kernel.sum(axis=0)
        return float((row * x**4).sum() / (row * x**2).sum() ** 2)

    values = [kurtosis(gaussian_kernel(41, 3.0, 3.0, 0.0, beta)) for beta in (0.6, 1.0, 3.0)]
    assert values[0] > values[1] > values[2]
    flat = plateau_kernel(21, 3.0, 3.0, 0.0, 2.0)
    assert flat.min() > 0
    assert flat.sum() == pytest.approx(1.0)
    assert flat[10, 12] / flat[10, 10] == pytest.approx(1 / (1 + (4 / 9) ** 2))
    assert flat[10, 16] / flat[10, 10] == pytest.approx(1 / (1 + 4**2))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 20).map(lambda half: 2 * half + 1),
    share=st.floats(0.05, 1.0),
    angle=st.floats(-4, 4),
    bend=st.floats(-math.pi, math.pi),
)
def test_motion_kernel_is_a_centred_trace(size: int, share: float, angle: float, bend: float) -> None:
    length = share * (size - 1)
    kernel = motion_kernel(size, length, angle, bend)
    assert kernel.shape == (size, size)
    assert kernel.sum() == pytest.approx(1.0)
    assert kernel.min() >= 0
    y, x = np.mgrid[-(size // 2) : size // 2 + 1, -(size // 2) : size // 2 + 1]
    assert (kernel * x).sum() == pytest.approx(0, abs=1e-6)
    assert (kernel * y).sum() == pytest.approx(0, abs=1e-6)
    # Spread along the arc: a straight line of length L has the variance L^2 / 12; spreading a point over its four
    # neighbours adds up to 1/4 a dimension.
    spread = (kernel * (x * x + y * y)).sum()
    assert spread <= length**2 / 12 + 0.51
    if abs(bend) < 0.1:
        assert spread >= 0.95 * length**2 / 12


def test_motion_kernel_has_its_direction_and_length() -> None:
    kernel = motion_kernel(21, 16.0, math.pi / 2, 0.0)
    assert kernel[:, 10].sum() == pytest.approx(1.0)
    assert np.count_nonzero(kernel[:, 10]) in (16, 17, 18)
    assert motion_kernel(21, 16.0, 0.0, 2.0)[10, 10] == 0  # the middle of a bow lies off the string
    for length in (0.0, 20.5):
        with pytest.raises(IcmsrError, match="length"):
            motion_kernel(21, length, 0.0, 0.0)
