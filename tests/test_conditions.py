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
    colormap,
    extract,
    hint,
    register_structure,
    structure,
    structure_names,
)
from icmsr_core.errors import IcmsrError


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
def test_random_pictures_against_cv2(height: int, width: int, grid: tuple[int, int]) -> None:
    picture = noise(height, width)
    image = to_tensor(picture)
    colours, edges = colormap(image), canny_edges(image)
    assert colours.shape == (1, 3, height, width)
    assert edges.shape == (1, 1, height, width)
    assert colours.dtype == edges.dtype == torch.float32
    assert torch.equal(colours, to_tensor(cv2_colormap(picture, *grid)))
    assert np.array_equal(edges[0, 0].numpy() * 255, cv2.Canny(picture, 100, 200))


def test_photograph_against_cv2(photo: np.ndarray) -> None:
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
    whole = hint(image)
    assert whole.shape == (3, 4, 90, 130)
    assert torch.equal(whole, torch.cat([hint(image[i : i + 1]) for i in range(3)]))


def test_grey_pictures_have_grey_colormaps() -> None:
    grey = np.repeat(noise(130, 70)[..., :1], 3, axis=2)
    result = hint(to_tensor(grey))[0]
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])
    assert np.array_equal(result[3].numpy() * 255, cv2.Canny(np.ascontiguousarray(grey[..., 0]), 100, 200))


def test_hint_is_colormap_then_edges(photo: np.ndarray) -> None:
    image = to_tensor(photo)
    result = hint(image, cells=(4, 6), low=50, high=150)
    assert torch.equal(result[:, :3], colormap(image, (4, 6)))
    assert torch.equal(result[:, 3:], canny_edges(image, 50, 150))
    assert torch.equal(hint(image), extract(image, ["colormap", "edges"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_and_values_outside_the_range(dtype: torch.dtype, photo: np.ndarray) -> None:
    image = (to_tensor(photo) * 1.5 - 0.25).to(dtype)
    kept = image.clone()
    result = hint(image)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(image, kept)
    assert torch.equal(result, hint(image.float().clamp(0, 1)))


def test_gradient_needing_input_gives_a_plain_map() -> None:
    assert not hint(torch.rand(1, 3, 64, 64, requires_grad=True)).requires_grad


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
    for function in (colormap, canny_edges, hint):
        with pytest.raises(IcmsrError, match="image must be"):
            function(image)


@pytest.mark.parametrize(("low", "high"), [(200, 100), (-1, 100), (0, 3000), (float("nan"), 100)])
def test_wrong_thresholds_are_named(low: float, high: float) -> None:
    with pytest.raises(IcmsrError, match="low"):
        hint(torch.zeros(1, 3, 8, 8), low=low, high=high)


@pytest.mark.parametrize("cells", [(0, 8), (8, -1), (9, 8)])
def test_wrong_cells_are_named(cells: tuple[int, int]) -> None:
    with pytest.raises(IcmsrError, match="cells"):
        colormap(torch.zeros(1, 3, 8, 8), cells)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(conditions, "_STRUCTURES", dict(conditions._STRUCTURES))
    return iter(())


def test_the_two_structures_are_registered() -> None:
    assert structure_names() == ("colormap", "edges")
    assert structure("colormap").channels == 3
    assert structure("edges").channels == 1
    assert all(structure(name).description for name in structure_names())


def test_a_further_structure_is_one_function(own_registry: Iterator[None]) -> None:
    @register_structure("brightness", 1, "mean of the channels")
    def brightness(image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=1, keepdim=True)

    image = to_tensor(noise(70, 80), noise(70, 80, 5))
    found = structure("brightness")
    assert isinstance(found, Structure)
    assert found.function is brightness
    assert structure_names() == ("colormap", "edges", "brightness")
    result = extract(image, ["edges", "brightness", "colormap"])
    assert result.shape == (2, 5, 70, 80)
    assert torch.equal(result[:, 0:1], canny_edges(image))
    assert torch.equal(result[:, 1:2], brightness(image))
    assert torch.equal(result[:, 2:], colormap(image))


def test_registry_errors(own_registry: Iterator[None]) -> None:
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
