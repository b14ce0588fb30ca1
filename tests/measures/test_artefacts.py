"""Jagged edges and repeated patterns are found, at the strength that was planted."""

import math

import numpy as np
import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.artefacts import edge_shape, lattice_peak


def edge(slope: float, step: int = 1, side: int = 128, blur: float = 1.0) -> np.ndarray:
    """A bright right half; its edge moves by `slope` a row, and only every `step` rows."""
    rows = np.arange(side) // step * step + (step - 1) / 2
    distance = np.arange(side)[None, :] - (side / 2 - slope * side / 2 + slope * rows)[:, None]
    return 0.2 + 0.6 * np.clip(distance / (2 * blur) + 0.5, 0, 1)


def test_a_straight_edge_has_no_jitter_and_its_own_width() -> None:
    shape = edge_shape(edge(0.2))
    assert shape.jitter < 0.02
    assert shape.width == pytest.approx(1.6 / math.hypot(1, 0.2), abs=0.5)
    assert shape.overshoot < 1e-9


@pytest.mark.parametrize("step", [4, 8])
def test_a_staircase_is_measured_as_one(step) -> None:
    """Positions of a staircase of n equal steps are spread as n evenly spaced numbers are."""
    expected = 0.2 * math.sqrt((step**2 - 1) / 12) / math.hypot(1, 0.2)
    assert edge_shape(edge(0.2, step)).jitter == pytest.approx(expected, rel=0.05)


def test_a_wide_edge_and_a_halo_are_measured() -> None:
    assert edge_shape(edge(0.1, blur=4)).width == pytest.approx(6.4, abs=0.6)
    halo = edge(0.1)
    halo[:, -20:-10] += 0.06
    assert edge_shape(halo).overshoot == pytest.approx(0.1, abs=1e-6)


def test_a_picture_without_an_edge_is_refused() -> None:
    with pytest.raises(IcmsrError, match=r"no edge: the left side is 0\.50"):
        edge_shape(np.full((32, 32), 0.5))
    broken = edge(0.0)
    broken[7] = 0.2
    with pytest.raises(IcmsrError, match="does not cross every row"):
        edge_shape(broken)
    with pytest.raises(IcmsrError, match="at least 8 x 8"):
        edge_shape(np.zeros((4, 4)))


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_pattern_far_below_the_noise_is_found(period) -> None:
    noise = np.random.default_rng(0).normal(0.5, 4 / 255, (256, 256))
    dots = np.zeros((256, 256))
    dots[::period, ::period] = 1
    pattern = (dots - dots.mean()) / dots.std() * 2 / 255
    assert lattice_peak(noise, period) < 14
    assert lattice_peak(noise + pattern, period) > 22


def test_what_does_not_repeat_at_that_period_does_not_count() -> None:
    waves = np.sin(2 * math.pi * np.arange(256) * 37 / 256)[None, :].repeat(256, 0)
    noise = np.random.default_rng(1).normal(0, 0.02, (256, 256))
    assert lattice_peak(0.5 + 0.1 * waves + noise, 4) < 14


def test_a_flat_picture_has_no_pattern_and_a_small_one_is_refused() -> None:
    assert lattice_peak(np.full((64, 64), 0.3), 4) == 0
    with pytest.raises(IcmsrError, match="needs sides of 64, got 60 x 64"):
        lattice_peak(np.zeros((64, 60)), 4)
    with pytest.raises(IcmsrError, match="at least 2 pixels, got 1"):
        lattice_peak(np.zeros((64, 64)), 1)
