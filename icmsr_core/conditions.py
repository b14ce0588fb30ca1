"""Structures of a picture that condition the regulariser: a coarse colormap and Canny edges; a registry for more.

In training they are taken from the ground truth, and the adapter turns them into features for teacher and auxiliary
(ICM-SR, arXiv 2511.22048, section 3, function F). The paper names segmentation, depth and sketch as future work;
`sketch` and `segmentation` here are ours and show how to add one.

Pictures are RGB tensors [N, 3, H, W], float in [0, 1], of any size from 1x1 up. Maps are float32 in [0, 1], of the same
size, on the input's device. OpenCV computes them on the CPU, one picture at a time; all structures are deterministic.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from .errors import IcmsrError

CELL = 64
"""Side of a colormap cell in pixels: 512 px give 8x8 cells, as in the T2I-Adapter's own preprocessing."""

MOST_SEGMENTS = 64
"""Largest number of colours of a segmentation: with more, the condition would no longer be sparse."""

Function = Callable[..., Tensor]  # pictures first, then options with defaults
AnyFunction = TypeVar("AnyFunction", bound=Function)


@dataclass(frozen=True)
class Structure:
    """A kind of structural condition."""

    name: str
    """Its name in configurations and commands."""
    channels: int
    """Number of channels of its map."""
    function: Function
    """From pictures [N, 3, H, W] to maps [N, channels, H, W], both in [0, 1]; its other arguments are the options."""
    description: str
    """One line for users."""

    def options(self) -> dict[str, Any]:
        """The function's options, which are its arguments after the pictures, with their defaults."""
        arguments = list(inspect.signature(self.function).parameters.values())[1:]
        return {argument.name: argument.default for argument in arguments}


_STRUCTURES: dict[str, Structure] = {}


def register_structure(name: str, channels: int, description: str) -> Callable[[AnyFunction], AnyFunction]:
    """Decorator that registers a function as the structure `name` and returns it unchanged.

    The function takes pictures [N, 3, H, W] in [0, 1] and returns maps [N, channels, H, W] in [0, 1]. Its other
    arguments need defaults; they are the options that `extract` passes on.
    Raises IcmsrError if the name is taken or empty, or if `channels` is below 1.
    """
    if not name or name in _STRUCTURES:
        raise IcmsrError(f"a structure needs a name that is not taken yet, got {name!r}: taken are {_known()}")
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
    """The structure of that name. Raises IcmsrError, which lists the known names, if there is none."""
    if name not in _STRUCTURES:
        raise IcmsrError(f"unknown structure {name!r}: choose from {_known()}")
    return _STRUCTURES[name]


def extract(image: Tensor, names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> Tensor:
    """Maps of the named structures side by side: [N, sum of their channels, H, W] in [0, 1], in the given order.

    `image` is [N, 3, H, W] in [0, 1]. `options` holds options by structure, such as ``{"colormap": {"cells": (8, 8)},
    "edges": {"low": 100, "high": 200}}``. Raises IcmsrError for an unknown name, for no name, for options of a
    structure that is not in `names`, for unknown options, and for a function whose map has another shape than it is
    registered with.
    """
    entries, given = check_structures(names, options), options or {}  # all names, before the first picture is processed
    maps = []
    for entry in entries:
        found = entry.function(image, **given.get(entry.name, {}))
        expected = (image.shape[0], entry.channels, *image.shape[2:])
        if found.shape != expected:
            raise IcmsrError(f"structure {entry.name!r} must return {list(expected)}, got {list(found.shape)}")
        maps.append(found)
    return torch.cat(maps, dim=1)


def check_structures(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> list[Structure]:
    """The structures of these names, in their order. Raises IcmsrError as `extract` does for names and options.

    Needs no picture: names of structures and options are checked, values are checked later by the function itself.
    """
    if isinstance(names, str) or not names:
        raise IcmsrError(f"names must be a list of one or more structures, got {names!r}: choose from {_known()}")
    entries = [structure(name) for name in names]
    for name, chosen in (options or {}).items():
        known = structure(name).options()
        if name not in names:
            raise IcmsrError(
                f"options were given for {name!r}, but the structures are {list(names)}: add it to them, or drop its "
                "options"
            )
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise IcmsrError(f"unknown options {unknown} of structure {name!r}: it takes {', '.join(known) or 'none'}")
    return entries


def _known() -> str:
    return ", ".join(_STRUCTURES) or "none"


def _per_picture(image: Tensor, work: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]) -> Tensor:
    """The uint8 maps [H, W, C] that `work` makes of each uint8 picture [H, W, 3]: float32 [N, C, H, W] in [0, 1]."""
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point() or 0 in image.shape:
        raise IcmsrError(
            f"image must be a float tensor [N, 3, H, W] in [0, 1], got {image.dtype} {list(image.shape)}: convert it"
        )
    # float32 first: half precision cannot distinguish all 256 levels after the multiplication.
    levels = image.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    pictures = rearrange(levels, "n c h w -> n h w c").contiguous().numpy()
    maps = torch.from_numpy(np.stack([work(picture) for picture in pictures]))
    return rearrange(maps, "n h w c -> n c h w").contiguous().to(image.device).to(torch.float32).div_(255)


@register_structure("colormap", 3, "colours on a coarse grid, one cell for every 64 pixels")
def colormap(image: Tensor, cells: tuple[int, int] | None = None, sampling: str = "cubic") -> Tensor:
    """Colours of a coarse grid, enlarged to the picture's size in hard-edged cells: [N, 3, H, W] in [0, 1].

    The uint8 picture is shrunk to the grid and enlarged with INTER_NEAREST. The grid has `cells` = (rows, columns), at
    most one per pixel. Without `cells` a cell covers 64 pixels: (H // 64, W // 64), at least (1, 1), so that 512 px
    have 8x8. Training passes (8, 8) for crops of any size (ours).

    `sampling` is how the picture is shrunk. "cubic" is INTER_CUBIC, the T2I-Adapter's published preprocessing. It does
    not average: a cell has the colour of the 4x4 pixels at its centre (weights [-3, 19, 19, -3] / 32 along each axis if
    they are evenly placed), whatever else is in the cell. "area" is INTER_AREA, the cell's mean (ours).

    `image` is [N, 3, H, W], float in [0, 1]. Raises IcmsrError for another shape, an integer tensor, another sampling,
    or cells outside 1..H, 1..W.
    """
    height, width = image.shape[-2:]
    rows, columns = cells if cells is not None else (max(1, height // CELL), max(1, width // CELL))
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise IcmsrError(f"cells must be (rows, columns) within 1..{height} and 1..{width}, got {cells}: try (8, 8)")
    if sampling not in ("cubic", "area"):
        raise IcmsrError(f"sampling must be cubic or area, got {sampling!r}")
    interpolation = cv2.INTER_CUBIC if sampling == "cubic" else cv2.INTER_AREA

    def work(picture: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        grid = cv2.resize(picture, (columns, rows), interpolation=interpolation)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_NEAREST)

    return _per_picture(image, work)


@register_structure("edges", 1, "Canny edges, 1 on an edge and 0 elsewhere")
def canny_edges(image: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Canny edges: [N, 1, H, W], 1 on an edge and 0 elsewhere.

    cv2.Canny runs on the RGB uint8 picture, not on a grey version, as in the T2I-Adapter's preprocessing: at each pixel
    the channel with the strongest gradient counts. `low` and `high` are its thresholds on the L1 gradient (3x3 Sobel,
    in grey levels): edges start above `high` and continue above `low`. `image` is [N, 3, H, W], float in [0, 1]. Raises
    IcmsrError for another shape, an integer tensor, or thresholds that are not 0 <= low <= high <= 2040, the largest
    possible gradient.
    """
    if not 0 <= low <= high <= 2040:
        raise IcmsrError(f"Canny thresholds must be 0 <= low <= high <= 2040, got low {low}, high {high}: try 100, 200")
    return _per_picture(image, lambda picture: cv2.Canny(picture, low, high)[..., None])


@register_structure("sketch", 1, "soft pencil lines, brighter where they are stronger")
def sketch(image: Tensor, sigma: float = 1.0, strength: float = 8.0) -> Tensor:
    """Pencil lines on the dark side of edges and on dark strokes: [N, 1, H, W], 0 on blank paper, up to 1 on a line.

    Lines are soft (256 levels), unlike those of `canny_edges`. They are the difference of two Gaussians of the grey
    picture, with sigmas `sigma` and 1.6 `sigma` in pixels, divided by the wider one, so that lines in shade and in
    light count alike. Its positive part, minus a threshold for noise, goes through tanh with the slope `strength`.
    After XDoG (Winnemöller, Kyprianidis, Olsen 2012), without its tones; the numbers are ours. `image` is [N, 3, H, W],
    float in [0, 1]. Raises IcmsrError for another shape, an integer tensor, sigma outside 0.3..20, or strength not
    above 0.
    """
    if not 0.3 <= sigma <= 20:
        raise IcmsrError(f"sigma must be within 0.3..20 pixels, got {sigma}: try 1")
    if not 0 < strength < float("inf"):
        raise IcmsrError(f"strength must be above 0 and finite, got {strength}: try 8")

    def work(picture: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
        fine, wide = (
            cv2.GaussianBlur(grey, (0, 0), width, borderType=cv2.BORDER_REPLICATE) for width in (sigma, 1.6 * sigma)
        )
        # 32 grey levels keep noise in dark skies from becoming lines; 0.01 is about a photograph's grain.
        darker = (wide - fine) / (wide + 32) - 0.01
        return np.rint(255 * np.tanh(strength * np.maximum(darker, 0))).astype(np.uint8)[..., None]

    return _per_picture(image, work)


@register_structure("segmentation", 3, "a few flat regions in their mean colours")
def segmentation(image: Tensor, segments: int = 8) -> Tensor:
    """A few flat regions with smooth edges, each painted with its mean colour: [N, 3, H, W] in [0, 1].

    At most `segments` colours per picture. Regions are found by colour, not by meaning (there is no network): mean
    shift and k-means in CIELAB on a copy of at most 128 pixels a side. Each label's share of the neighbourhood is
    enlarged, and the largest share wins. The numbers are ours. `image` is [N, 3, H, W], float in [0, 1]. Raises
    IcmsrError for another shape, an integer tensor, or segments outside 1..64.
    """
    if not 1 <= segments <= MOST_SEGMENTS:
        raise IcmsrError(f"segments must be within 1..{MOST_SEGMENTS}, got {segments}: try 8")

    def work(picture: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        height, width = picture.shape[:2]
        shrink = max(1.0, max(height, width) / 128)
        size = max(1, round(width / shrink)), max(1, round(height / shrink))
        labels = _colour_clusters(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), segments)
        largest, region = np.full((height, width), -1, np.float32), np.zeros((height, width), np.uint8)
        for label in range(int(labels.max()) + 1):
            share = cv2.GaussianBlur((labels == label).astype(np.float32), (0, 0), 2, borderType=cv2.BORDER_REPLICATE)
            share = cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR)
            region[share > largest] = label
            largest = np.maximum(largest, share)
        flat = region.reshape(-1)
        counts = np.maximum(np.bincount(flat), 1)  # a label may have lost all its pixels to its neighbours
        means = [np.bincount(flat, picture[..., channel].reshape(-1)) / counts for channel in range(3)]
        return np.rint(np.stack(means, axis=1)).astype(np.uint8)[region]

    return _per_picture(image, work)


def _colour_clusters(small: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """Labels [H, W], from 0, of at most `most` clusters of similar colours in a uint8 picture [H, W, 3]."""
    calm = cv2.pyrMeanShiftFiltering(small, sp=8, sr=20, maxLevel=0)
    colours = cv2.cvtColor(calm.astype(np.float32) / 255, cv2.COLOR_RGB2Lab).reshape(-1, 3)
    # The first cluster starts at the colour closest to the mean, each further one at the colour farthest from all
    # clusters so far, while that is over 10 Lab units away. So k-means needs no random numbers, and a plain picture
    # gets few clusters.
    labels: npt.NDArray[Any] = np.zeros((len(colours), 1), np.int32)
    middle = colours[np.argmin(np.square(colours - colours.mean(axis=0)).sum(axis=1))]
    distance = np.square(colours - middle).sum(axis=1)
    count = 1
    while count < most and distance.max() > 10**2:
        to_new = np.square(colours - colours[np.argmax(distance)]).sum(axis=1)
        labels[to_new < distance] = count
        distance, count = np.minimum(distance, to_new), count + 1
    if count > 1:
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.1)
        labels = cv2.kmeans(colours, count, labels, stop, 1, cv2.KMEANS_USE_INITIAL_LABELS)[1]
    return labels.reshape(small.shape[:2])
