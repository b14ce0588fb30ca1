"""The sparse structure F of a picture: an 8x8-like colormap, Canny edges, and a registry for further structures.

In training F looks at the ground truth, and the adapter turns it into features for teacher and auxiliary (ICM-SR,
arXiv 2511.22048, section 3). Pictures are RGB tensors [N, 3, H, W], float in [0, 1], of any size from 1x1 up; so are
the maps that come back, float32 on the input's device. OpenCV on the CPU does the work, one picture at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import IcmsrError

CELL = 64
"""Side of a colormap cell in pixels: 512 px give 8x8 cells, as in the T2I-Adapter's own preprocessing."""

Function = Callable[[Tensor], Tensor]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Tensor])  # may take options with defaults as well


@dataclass(frozen=True)
class Structure:
    """A kind of structural condition."""

    name: str
    """What configurations and commands call it."""
    channels: int
    """Number of channels of its map."""
    function: Function
    """From pictures [N, 3, H, W] to maps [N, channels, H, W], both in [0, 1]."""
    description: str
    """One line for a user."""


_STRUCTURES: dict[str, Structure] = {}


def register_structure(name: str, channels: int, description: str) -> Callable[[AnyFunction], AnyFunction]:
    """Decorator that makes a function known as the structure `name`; the function itself is returned unchanged.

    The function takes pictures [N, 3, H, W] in [0, 1] and returns maps [N, channels, H, W] in [0, 1].
    Raises IcmsrError when the name is taken or empty, or when channels is below 1.
    """
    if not name or name in _STRUCTURES:
        raise IcmsrError(f"structure name must be new and not empty, got {name!r}: known are {_known()}")
    if channels < 1:
        raise IcmsrError(f"structure {name!r} must have at least 1 channel, got {channels}")

    def add(function: AnyFunction) -> AnyFunction:
        _STRUCTURES[name] = Structure(name, channels, function, description)
        return function

    return add


def structure_names() -> tuple[str, ...]:
    """Names of all registered structures, in order of registration."""
    return tuple(_STRUCTURES)


def structure(name: str) -> Structure:
    """The structure of that name. Raises IcmsrError, which lists the known names, when there is none."""
    if name not in _STRUCTURES:
        raise IcmsrError(f"unknown structure {name!r}: choose from {_known()}")
    return _STRUCTURES[name]


def extract(image: Tensor, names: Sequence[str]) -> Tensor:
    """Maps of the named structures side by side: [N, sum of their channels, H, W] in [0, 1], in the given order.

    `image` is [N, 3, H, W] in [0, 1]. Raises IcmsrError for an unknown name, for no name, and for a registered
    function whose map has another shape than it promised.
    """
    if isinstance(names, str) or not names:
        raise IcmsrError(f"names must be a list of one or more structures, got {names!r}: choose from {_known()}")
    maps = []
    for entry in [structure(name) for name in names]:  # every name is looked up before the first picture is worked on
        found = entry.function(image)
        expected = (image.shape[0], entry.channels, *image.shape[2:])
        if found.shape != expected:
            raise IcmsrError(f"structure {entry.name!r} must return {list(expected)}, got {list(found.shape)}")
        maps.append(found)
    return torch.cat(maps, dim=1)


def _known() -> str:
    return ", ".join(_STRUCTURES) or "none"


def _per_picture(image: Tensor, work: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]) -> Tensor:
    """`work` on each picture as uint8 [H, W, 3]; its uint8 [H, W, C] answers as one float32 [N, C, H, W] in [0, 1]."""
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point() or 0 in image.shape:
        raise IcmsrError(
            f"image must be a float tensor [N, 3, H, W] in [0, 1], got {image.dtype} {list(image.shape)}: convert it"
        )
    # Half precision cannot tell all 256 levels apart after the multiplication, hence float32 first.
    levels = image.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    pictures = levels.permute(0, 2, 3, 1).contiguous().numpy()
    maps = torch.from_numpy(np.stack([work(picture) for picture in pictures]))
    return maps.permute(0, 3, 1, 2).contiguous().to(image.device).to(torch.float32).div_(255)


@register_structure("colormap", 3, "mean colours on a coarse grid, one cell for every 64 pixels")
def colormap(image: Tensor, cells: tuple[int, int] | None = None) -> Tensor:
    """Colours of a coarse grid, enlarged to the picture's size in hard-edged cells: [N, 3, H, W] in [0, 1].

    The picture as uint8 is shrunk to the grid with INTER_CUBIC and enlarged with INTER_NEAREST, as the T2I-Adapter's
    preprocessing does. The grid has `cells` = (rows, columns), at most one to a pixel; without it one cell covers
    64 pixels: (H // 64, W // 64), at least (1, 1), so that 512 px have 8x8. Training passes (8, 8) for a crop of any
    size (ours). `image` is [N, 3, H, W], float in [0, 1].
    Raises IcmsrError for another shape, an integer tensor, or cells outside 1..H, 1..W.
    """
    height, width = image.shape[-2:]
    rows, columns = cells if cells is not None else (max(1, height // CELL), max(1, width // CELL))
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise IcmsrError(f"cells must be (rows, columns) within 1..{height} and 1..{width}, got {cells}: try (8, 8)")

    def work(picture: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        grid = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_CUBIC)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_NEAREST)

    return _per_picture(image, work)


@register_structure("edges", 1, "Canny edges, 1 on an edge and 0 elsewhere")
def canny_edges(image: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Canny edges: [N, 1, H, W], 1 on an edge and 0 elsewhere.

    cv2.Canny runs on the RGB uint8 picture, not on its grey version, and so takes at each pixel the channel with the
    strongest gradient, as in the T2I-Adapter's preprocessing. `low` and `high` are its two thresholds on the L1
    gradient (3x3 Sobel, grey levels): edges start above `high` and go on above `low`.
    `image` is [N, 3, H, W], float in [0, 1]. Raises IcmsrError for another shape, an integer tensor, or thresholds
    that are not 0 <= low <= high <= 2040, the largest gradient there is.
    """
    if not 0 <= low <= high <= 2040:
        raise IcmsrError(f"Canny thresholds must be 0 <= low <= high <= 2040, got low {low}, high {high}: try 100, 200")
    return _per_picture(image, lambda picture: cv2.Canny(picture, low, high)[..., None])


def hint(image: Tensor, cells: tuple[int, int] | None = None, low: float = 100, high: float = 200) -> Tensor:
    """The adapter's 4-channel condition: RGB `colormap` first, `canny_edges` fourth. [N, 4, H, W] in [0, 1].

    Arguments and errors are those of the two functions; `extract(image, ["colormap", "edges"])` is the same with
    their defaults.
    """
    return torch.cat([colormap(image, cells), canny_edges(image, low, high)], dim=1)
