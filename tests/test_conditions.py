"""Structures against OpenCV called directly, and the registry."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch
from skimage import data

from icmsr_core import conditions
from icmsr_core.conditions import (
    Structure,
    canny_edges,
    check_structures,
    colormap,
    extract,
    register_structure,
    segmentation,
    sketch,
    structure,
    structure_names,
)
from icmsr_core.errors import IcmsrError

ICM = ("colormap", "edges")
"""The structures of ICM-SR's 4-channel hint."""


def to_tensor(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return cv2.resize(data.astronaut(), (333, 500), interpolation=cv2.INTER_AREA)


def cv2_colormap(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(1, 1, (1, 1)), (63, 65, (1, 1)), (500, 333, (7, 5)), (128, 192, (2, 3)), (512, 512, (8, 8)), (1, 640, (1, 10))],
)
def test_maps_of_random_pictures_are_those_of_cv2(height: int, width: int, grid: tuple[int, int]) -> None:
    picture = noise(height, width)
    image = to_tensor(picture)
    colours, edges = colormap(image), canny_edges(image)
    assert colours.shape == (1, 3, height, width)
    assert edges.shape == (1, 1, height, width)
    assert colours.dtype == edges.dtype == torch.float32
    assert torch.equal(colours, to_tensor(cv2_colormap(picture, *grid)))
    assert np.array_equal(edges[0, 0].numpy() * 255, cv2.Canny(picture, 100, 200))


def test_maps_of_a_photograph_are_those_of_cv2(photo: np.ndarray) -> None:
    image = to_tensor(photo)
    assert torch.equal(colormap(image), to_tensor(cv2_colormap(photo, 7, 5)))
    assert torch.equal(colormap(image, cells=(8, 8)), to_tensor(cv2_colormap(photo, 8, 8)))
    for low, high in ((100, 200), (30, 60), (0, 0), (200, 200)):
        expected = cv2.Canny(photo, low, high)
        assert np.array_equal(canny_edges(image, low, high)[0, 0].numpy() * 255, expected)
    assert 0.01 < canny_edges(image).mean() < 0.4
    assert canny_edges(image, 30, 60).sum() > canny_edges(image).sum()


def test_edges_see_colours_of_equal_brightness() -> None:
    """Run on RGB, not on grey: red against a green of the same brightness is an edge."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16, 0], picture[:, 16:, 1] = 196, 100
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    assert cv2.Canny(grey, 100, 200).max() == 0
    assert canny_edges(to_tensor(picture)).sum() >= 30


def test_512_pixels_have_8x8_cells() -> None:
    colours = colormap(to_tensor(noise(512, 512)))[0].permute(1, 2, 0)
    blocks = colours.reshape(8, 64, 8, 64, 3)
    assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
    assert len(torch.unique(colours.reshape(-1, 3), dim=0)) == 64


def test_training_grid_is_8x8_of_any_crop() -> None:
    for size in (64, 96, 128):
        colours = colormap(to_tensor(noise(size, size)), cells=(8, 8))[0].permute(1, 2, 0)
        assert len(torch.unique(colours.reshape(-1, 3), dim=0)) == 64


@pytest.mark.parametrize("cells", [(1, 1), (1, 3), (5, 2), (8, 8), (16, 16), (64, 64)])
@pytest.mark.parametrize("size", [64, 96, 512])
def test_any_grid_fits_any_crop(size: int, cells: tuple[int, int]) -> None:
    picture = noise(size, size, seed=size)
    for sampling, how in (("cubic", cv2.INTER_CUBIC), ("area", cv2.INTER_AREA)):
        result = colormap(to_tensor(picture), cells, sampling)
        grid = cv2.resize(picture, cells[::-1], interpolation=how)
        rows, columns = np.arange(size) * cells[0] // size, np.arange(size) * cells[1] // size
        assert torch.equal(result, to_tensor(grid[rows][:, columns]))


def test_one_cell_is_the_middle_of_the_picture_or_its_mean(photo: np.ndarray) -> None:
    picture = np.ascontiguousarray(photo[:256, :256])
    weights = np.array([-3, 19, 19, -3]) / 32
    middle = np.einsum("y,x,yxc->c", weights, weights, picture[126:130, 126:130].astype(np.float64)).clip(0, 255)
    assert np.abs(colormap(to_tensor(picture), (1, 1))[0, :, 0, 0].numpy() * 255 - middle).max() <= 1
    mean = colormap(to_tensor(picture), (1, 1), sampling="area")[0, :, 0, 0].numpy() * 255
    assert np.abs(mean - picture.mean(axis=(0, 1))).max() <= 1


def test_flat_colours_come_back_and_orientation_is_kept() -> None:
    picture = np.zeros((128, 256, 3), np.uint8)
    picture[:64, :64] = (255, 0, 0)
    picture[64:, 192:] = (0, 0, 255)
    colours = colormap(to_tensor(picture))
    assert colours[0, :, 32, 32].tolist() == [1.0, 0.0, 0.0]
    assert colours[0, :, 96, 224].tolist() == [0.0, 0.0, 1.0]
    assert colours[0, :, 32, 128].tolist() == [0.0, 0.0, 0.0]


def test_batch_equals_one_by_one() -> None:
    image = to_tensor(noise(90, 130, 1), noise(90, 130, 2), np.full((90, 130, 3), 127, np.uint8))
    whole = extract(image, ICM)
    assert whole.shape == (3, 4, 90, 130)
    assert torch.equal(whole, torch.cat([extract(image[i : i + 1], ICM) for i in range(3)]))


def test_grey_pictures_have_grey_colormaps() -> None:
    grey = np.repeat(noise(130, 70)[..., :1], 3, axis=2)
    result = extract(to_tensor(grey), ICM)[0]
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])
    assert np.array_equal(result[3].numpy() * 255, cv2.Canny(np.ascontiguousarray(grey[..., 0]), 100, 200))


def test_the_hint_is_the_colormap_then_the_edges(photo: np.ndarray) -> None:
    image = to_tensor(photo)
    result = extract(image, ICM, {"colormap": {"cells": (4, 6)}, "edges": {"low": 50, "high": 150}})
    assert torch.equal(result[:, :3], colormap(image, (4, 6)))
    assert torch.equal(result[:, 3:], canny_edges(image, 50, 150))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_and_values_outside_the_range(dtype: torch.dtype, photo: np.ndarray) -> None:
    image = (to_tensor(photo) * 1.5 - 0.25).to(dtype)
    kept = image.clone()
    result = extract(image, ICM)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(image, kept)
    assert torch.equal(result, extract(image.float().clamp(0, 1), ICM))


def test_gradient_needing_input_gives_a_plain_map() -> None:
    assert not extract(torch.rand(1, 3, 64, 64, requires_grad=True), ICM).requires_grad


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8),
    ],
)
def test_wrong_pictures_are_named(image: torch.Tensor) -> None:
    for function in (colormap, canny_edges, sketch, segmentation):
        with pytest.raises(IcmsrError, match="image must be"):
            function(image)


@pytest.mark.parametrize(("low", "high"), [(200, 100), (-1, 100), (0, 3000), (float("nan"), 100)])
def test_wrong_thresholds_are_named(low: float, high: float) -> None:
    with pytest.raises(IcmsrError, match="low"):
        extract(torch.zeros(1, 3, 8, 8), ICM, {"edges": {"low": low, "high": high}})


@pytest.mark.parametrize("cells", [(0, 8), (8, -1), (9, 8)])
def test_wrong_cells_are_named(cells: tuple[int, int]) -> None:
    with pytest.raises(IcmsrError, match="cells"):
        colormap(torch.zeros(1, 3, 8, 8), cells)


SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (1, 640), (700, 1), (31, 97), (64, 64), (300, 200)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", ["sketch", "segmentation"])
def test_further_structures_on_any_size(name: str, height: int, width: int) -> None:
    image = to_tensor(noise(height, width), noise(height, width, 1), np.full((height, width, 3), 77, np.uint8))
    whole = extract(image, [name])
    assert whole.shape == (3, structure(name).channels, height, width)
    assert whole.dtype == torch.float32
    assert whole.min() >= 0
    assert whole.max() <= 1
    cv2.setRNGSeed(height)  # whatever OpenCV's own random numbers are: no structure draws any
    assert torch.equal(whole, torch.cat([extract(image[i : i + 1], [name]) for i in range(3)]))


def test_sketch_of_flat_pictures_is_blank() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (180, 20, 90)):
        assert sketch(to_tensor(np.full((50, 70, 3), colour, np.uint8))).max() == 0


def test_sketch_is_soft_where_edges_decide(photo: np.ndarray) -> None:
    lines = sketch(to_tensor(photo))
    assert len(torch.unique(canny_edges(to_tensor(photo)))) == 2
    assert len(torch.unique(lines)) > 150
    assert 0.01 < lines.mean() < 0.2
    near = torch.nn.functional.max_pool2d(canny_edges(to_tensor(photo)), 5, stride=1, padding=2) > 0
    assert lines[near].mean() > 5 * lines[~near].mean()  # both draw the same things


def test_sketch_draws_the_dark_side_as_strongly_as_the_step_is_high() -> None:
    strongest = []
    for bright in (120, 140, 190):
        picture = np.full((40, 40, 3), 100, np.uint8)
        picture[:, 20:] = bright
        lines = sketch(to_tensor(picture))[0, 0]
        assert lines[:, 15:20].max() > 0
        assert lines[:, 20:].max() == 0
        assert lines[:, :10].max() == 0
        strongest.append(float(lines.max()))
        assert sketch(to_tensor(picture), strength=4).max() < lines.max()
    assert strongest == sorted(strongest)
    assert strongest[0] < 0.2 < 0.4 < strongest[2] < 1


def test_segmentation_has_few_flat_colours_that_are_means(photo: np.ndarray) -> None:
    image = to_tensor(photo)
    for segments in (1, 4, 16):
        painted = segmentation(image, segments)[0].flatten(1).T
        colours, region = torch.unique(painted, dim=0, return_inverse=True)
        assert segments / 2 <= len(colours) <= segments
        for index, colour in enumerate(colours):
            mean = image[0].flatten(1)[:, region == index].mean(dim=1)
            assert (mean - colour).abs().max() <= 0.5 / 255 + 1e-5
    assert (segmentation(image, 16) - image).square().mean() < (segmentation(image, 4) - image).square().mean()
    # .47 measured; the clusters' first choice without k-means, .60.
    assert (segmentation(image, 2) - image).square().mean() < 0.53 * (segmentation(image, 1) - image).square().mean()


def test_segmentation_has_short_outlines(photo: np.ndarray) -> None:
    """Share of neighbours that differ, across and down: .045 measured; .053 without the mean shift."""
    painted = segmentation(to_tensor(photo), 16)[0]
    across = (painted[:, :, 1:] != painted[:, :, :-1]).any(dim=0).float().mean()
    down = (painted[:, 1:] != painted[:, :-1]).any(dim=0).float().mean()
    assert 0.02 < across + down < 0.049


def test_segmentation_finds_what_is_drawn() -> None:
    """Three plain areas under noise come back as three, apart from their outlines."""
    truth = np.full((256, 256, 3), (60, 90, 160), np.uint8)
    truth[150:] = (120, 110, 60)
    cv2.circle(truth, (90, 100), 50, (220, 200, 190), -1)
    noisy = np.clip(truth + np.random.default_rng(0).normal(0, 6, truth.shape), 0, 255).astype(np.uint8)
    painted = segmentation(to_tensor(noisy), 3)
    assert len(torch.unique(painted[0].flatten(1).T, dim=0)) == 3
    assert ((painted - to_tensor(truth)).abs().amax(dim=1) < 5 / 255).float().mean() > 0.97


def test_segmentation_of_flat_pictures_is_the_picture() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (180, 20, 90)):
        flat = to_tensor(np.full((50, 170, 3), colour, np.uint8))
        assert torch.equal(segmentation(flat), flat)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sketch", "sigma", 0),
        ("sketch", "sigma", float("nan")),
        ("sketch", "strength", 0),
        ("sketch", "strength", float("inf")),
        ("segmentation", "segments", 0),
        ("segmentation", "segments", 65),
        ("colormap", "sampling", "linear"),
        ("colormap", "cells", (9, 1)),
        ("edges", "low", 300),
    ],
)
def test_wrong_options_are_named(name: str, option: str, value: object) -> None:
    with pytest.raises(IcmsrError, match=rf"{option}.*{value}" if isinstance(value, str) else option):
        extract(torch.zeros(1, 3, 8, 8), [name], {name: {option: value}})


def test_options_reach_their_structures(photo: np.ndarray) -> None:
    image = to_tensor(photo)
    options = {"colormap": {"cells": [3, 5]}, "edges": {"low": 30, "high": 60}, "segmentation": {"segments": 3}}
    result = extract(image, ["segmentation", "edges", "sketch", "colormap"], options)
    expected = [segmentation(image, 3), canny_edges(image, 30, 60), sketch(image), colormap(image, (3, 5))]
    assert torch.equal(result, torch.cat(expected, dim=1))
    assert structure("edges").options() == {"low": 100, "high": 200}
    assert [found.name for found in check_structures(["sketch", "edges"], {"edges": {"low": 1}})] == ["sketch", "edges"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": {}}, "'depth'.*colormap, edges"),
        ({"edges": {"lo": 3, "high": 200}}, r"\['lo'\].*'edges'.*low, high"),
        ({"colormap": {"image": 1}}, r"\['image'\].*'colormap'.*cells, sampling"),
        ({"sketch": {"sigma": 2}}, r"'sketch'.*\['colormap', 'edges'\]"),
    ],
)
def test_unknown_options_are_named(options: dict[str, dict[str, object]], message: str) -> None:
    for function in (
        lambda: extract(torch.zeros(1, 3, 8, 8), ["colormap", "edges"], options),
        lambda: check_structures(["colormap", "edges"], options),
    ):
        with pytest.raises(IcmsrError, match=message):
            function()


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(conditions, "_STRUCTURES", dict(conditions._STRUCTURES))
    return iter(())


def test_the_structures_are_registered() -> None:
    channels = {name: structure(name).channels for name in structure_names()}
    channels.pop("image", None)  # training registers it when it is imported
    assert channels == {"colormap": 3, "edges": 1, "sketch": 1, "segmentation": 3}
    assert all(structure(name).description for name in structure_names())


def test_a_further_structure_is_one_function(own_registry: Iterator[None]) -> None:
    @register_structure("brightness", 1, "mean of the channels")
    def brightness(image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=1, keepdim=True)

    image = to_tensor(noise(70, 80), noise(70, 80, 5))
    found = structure("brightness")
    assert isinstance(found, Structure)
    assert found.function is brightness
    assert structure_names()[-1] == "brightness"
    assert found.options() == {}
    result = extract(image, ["edges", "brightness", "colormap"])
    assert result.shape == (2, 5, 70, 80)
    assert torch.equal(result[:, 0:1], canny_edges(image))
    assert torch.equal(result[:, 1:2], brightness(image))
    assert torch.equal(result[:, 2:], colormap(image))


def test_unknown_and_wrong_structures_are_refused(own_registry: Iterator[None]) -> None:
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(IcmsrError, match=r"'depth'.*colormap, edges"):
        structure("depth")
    with pytest.raises(IcmsrError, match=r"'depth'.*colormap, edges"):
        extract(image, ["colormap", "depth"])
    for empty in ([], "edges"):
        with pytest.raises(IcmsrError, match="names"):
            extract(image, empty)
    with pytest.raises(IcmsrError, match="edges"):
        register_structure("edges", 1, "again")
    with pytest.raises(IcmsrError, match="channel"):
        register_structure("nothing", 0, "no channels")

    @register_structure("liar", 2, "says two, gives one")
    def liar(image: torch.Tensor) -> torch.Tensor:
        return image[:, :1]

    with pytest.raises(IcmsrError, match="liar"):
        extract(image, ["liar"])
