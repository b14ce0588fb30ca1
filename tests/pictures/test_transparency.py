"""Colours that nobody can see: they do not matter for a result, and what is visible keeps its colour."""

import numpy as np
import pytest

from icmsr_core.pictures.transparency import fill_hidden


def disk(height: int = 40, width: int = 48) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((x - 24) ** 2 + (y - 20) ** 2 < 225).astype(np.float32)


@pytest.mark.parametrize("hidden", [0.0, 1.0, "random"])
def test_hidden_colours_do_not_matter(hidden):
    random = np.random.default_rng(0)
    alpha = disk()
    rgb = random.random((40, 48, 3), np.float32)
    other = np.where(alpha[..., None] > 0, rgb, random.random(rgb.shape, np.float32) if hidden == "random" else hidden)
    assert np.array_equal(fill_hidden(other.astype(np.float32), alpha), fill_hidden(rgb, alpha))


def test_each_hidden_pixel_has_the_colour_of_a_nearest_visible_one():
    random = np.random.default_rng(1)
    alpha = np.zeros((30, 40), np.float32)
    places = [(3, 5), (20, 8), (25, 35), (2, 38)]
    rgb = random.random((30, 40, 3), np.float32)
    for number, place in enumerate(places):
        alpha[place] = (1.0, 0.5, 1 / 255, 1.0)[number]
    filled = fill_hidden(rgb, alpha)
    for place in places:
        assert np.array_equal(filled[place], rgb[place]), "visible pixels are unchanged, however faint"
    for y in range(0, 30, 4):
        for x in range(0, 40, 4):
            distances = {place: np.hypot(place[0] - y, place[1] - x) for place in places}
            # OpenCV's 5 x 5 distances are off by up to 2%.
            near = [place for place, distance in distances.items() if distance <= 1.05 * min(distances.values())]
            assert any(np.array_equal(filled[y, x], rgb[place]) for place in near)


def test_a_picture_without_hidden_pixels_is_returned_as_it_is():
    rgb = np.random.default_rng(2).random((8, 9, 3), np.float32)
    assert fill_hidden(rgb, np.full((8, 9), 0.01, np.float32)) is rgb


def test_a_picture_that_is_all_hidden_is_black():
    rgb = np.random.default_rng(3).random((8, 9, 3), np.float32)
    filled = fill_hidden(rgb, np.zeros((8, 9), np.float32))
    assert filled.shape == rgb.shape
    assert filled.max() == 0
