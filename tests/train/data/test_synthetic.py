"""Procedural training pictures: shapes, determinism, variety, and the statistics of dead leaves."""

from itertools import pairwise

import numpy as np
import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data import synthetic
from icmsr_core.train.data.synthetic import SYNTHETIC_KINDS, synthetic_picture


@pytest.mark.parametrize("kind", [*SYNTHETIC_KINDS, None])
@pytest.mark.parametrize("size", [16, 97, 128])
def test_pictures_are_8_bit_rgb_of_the_size_asked_for_and_not_flat(kind: str | None, size: int) -> None:
    for seed in range(4):
        picture = synthetic_picture(size, np.random.default_rng(seed), kind)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous
        assert np.ptp(picture) > 20


@pytest.mark.parametrize("kind", [*SYNTHETIC_KINDS, None])
def test_the_seed_decides_the_picture(kind: str | None) -> None:
    pictures = [synthetic_picture(64, np.random.default_rng(seed), kind) for seed in range(6)]
    again = [synthetic_picture(64, np.random.default_rng(seed), kind) for seed in range(6)]
    assert all(np.array_equal(first, second) for first, second in zip(pictures, again))
    assert len({picture.tobytes() for picture in pictures}) == 6


def test_one_generator_gives_a_sequence() -> None:
    rng = np.random.default_rng(0)
    assert not np.array_equal(synthetic_picture(64, rng), synthetic_picture(64, rng))


def test_every_kind_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def noted(kind: str):  # type: ignore[no-untyped-def]
        draw = synthetic._DRAW[kind]
        return lambda size, rng: (drawn.append(kind), draw(size, rng))[1]

    monkeypatch.setattr(synthetic, "_DRAW", {kind: noted(kind) for kind in SYNTHETIC_KINDS})
    rng = np.random.default_rng(0)
    for _ in range(120):
        synthetic_picture(16, rng)
    assert set(drawn) == set(SYNTHETIC_KINDS)
    assert len(drawn) > 125  # some pictures join two kinds


@pytest.mark.parametrize("kind", SYNTHETIC_KINDS)
def test_pictures_of_a_kind_differ_in_colour_and_brightness(kind: str) -> None:
    means = np.array([synthetic_picture(64, np.random.default_rng(seed), kind).mean(axis=(0, 1)) for seed in range(30)])
    assert means.std(axis=0).min() > 15
    assert 60 < means.mean() < 195
    assert np.ptp(means, axis=1).max() > 30  # not all grey


def test_edges_are_anti_aliased(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard diagonal edge on the canvas, which has twice the size, gets the levels between in the picture."""

    def diagonal(size: int, rng: np.random.Generator) -> np.ndarray:
        assert size == 128
        line = np.arange(size)
        return np.repeat(np.where(line[:, None] * 3 > line[None] * 2 + 31, 255.0, 0.0)[..., None], 3, axis=2)

    monkeypatch.setitem(synthetic._DRAW, "leaves", diagonal)
    picture = synthetic_picture(64, np.random.default_rng(0), "leaves")
    assert {0, 64, 128, 191, 255} >= set(np.unique(picture).tolist()) > {0, 255}


def spectral_slope(picture: np.ndarray) -> float:
    """a of power ~ f^-a, from the rotational average of the windowed spectrum, f from 1/32 to 1/4 per pixel."""
    size = len(picture)
    plane = picture.astype(np.float64).mean(axis=2)
    window = np.outer(np.hanning(size), np.hanning(size))
    power = np.abs(np.fft.fft2((plane - plane.mean()) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    edges = np.geomspace(1 / 32, 1 / 4, 9)
    rings = [power[(frequency >= low) & (frequency < high)].mean() for low, high in pairwise(edges)]
    return -float(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(rings), 1)[0])


def test_the_slope_of_a_known_spectrum_is_measured() -> None:
    for slope in (1.0, 2.0, 3.0):
        field = synthetic._noise(256, slope, np.random.default_rng(0))
        assert field.std() == pytest.approx(1, abs=1e-3)
        assert spectral_slope(field[..., None]) == pytest.approx(slope, abs=0.2)


def test_dead_leaves_have_a_natural_spectrum() -> None:
    slopes = [spectral_slope(synthetic_picture(256, np.random.default_rng(seed), "leaves")) for seed in range(12)]
    assert all(1 < slope < 3.2 for slope in slopes)
    assert 1.5 < np.mean(slopes) < 2.8


@pytest.mark.parametrize("size", [0, 15, -64])
def test_wrong_sizes_are_named(size: int) -> None:
    with pytest.raises(IcmsrError, match=str(size)):
        synthetic_picture(size, np.random.default_rng(0))


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(IcmsrError, match=r"'cats'.*leaves.*bricks"):
        synthetic_picture(64, np.random.default_rng(0), "cats")
