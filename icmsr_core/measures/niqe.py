"""NIQE: how far a picture's local statistics are from those of natural, undistorted photographs. It needs no truth.

Mittal et al. 2013, "Making a 'Completely Blind' Image Quality Analyzer", in pyiqa's form, which published tables use:
Y of YIQ (full range), rounded; blocks of 96 x 96 pixels without overlap. (basicsr takes Y of 16 to 235, which gives
about .04 more.) A file has ``mean`` [36] and ``covariance`` [36, 36] of the natural photographs' features, in float64:
the official parameters, as basicsr ships them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import IcmsrError
from ..pictures.files import FloatArray
from .weight_files import NIQE, check_weights, read_weight_file

_DoubleArray = npt.NDArray[np.float64]

BLOCK = 96
"""Side of a block in pixels; half of it at the second scale."""
FEATURES = 36
"""Of a block: 18 at each of two scales."""
NIQE_SHAPES: Mapping[str, tuple[int, ...]] = {"mean": (FEATURES,), "covariance": (FEATURES, FEATURES)}
"""Shape of each tensor of a NIQE file."""
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class NaturalStatistics:
    """The multivariate Gaussian that was fitted to the features of undistorted photographs."""

    mean: _DoubleArray
    """[36]"""
    covariance: _DoubleArray
    """[36, 36]"""


def load_niqe(path: Path) -> NaturalStatistics:
    """The statistics in a converted file. Raises `IcmsrError` for a file that is missing, damaged or another."""
    tensors, _ = read_weight_file(path, NIQE)
    return natural_statistics(str(path), tensors)


def natural_statistics(name: str, tensors: Mapping[str, Tensor]) -> NaturalStatistics:
    """The statistics in `tensors`. Raises `IcmsrError`, which says `name`, if they do not fit."""
    check_weights(name, tensors, NIQE_SHAPES)
    return NaturalStatistics(**{key: tensors[key].double().numpy() for key in NIQE_SHAPES})


def niqe(picture: FloatArray, natural: NaturalStatistics) -> float:
    """NIQE of `picture` [height, width, 3] in [0, 1]; lower is better. NaN where fewer than two blocks have texture.

    Pixels right of and below the last whole block do not count. Raises IcmsrError for pictures of fewer than two
    blocks: their features have no covariance.
    """
    rows, columns = picture.shape[0] // BLOCK, picture.shape[1] // BLOCK
    if rows * columns < 2:
        raise IcmsrError(
            f"NIQE needs at least two blocks of {BLOCK} x {BLOCK} pixels, got {picture.shape[1]} x {picture.shape[0]}"
        )
    luma = _luma_of_yiq(picture[: rows * BLOCK, : columns * BLOCK])
    features = np.concatenate([_block_features(luma, BLOCK), _block_features(_halved(luma), BLOCK // 2)], axis=1)
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return math.nan
    # As published: a feature that one block lacks is still in the mean of the others, but not in the covariance.
    difference = natural.mean - np.nanmean(features, axis=0)
    inverse = np.linalg.pinv((natural.covariance + np.cov(whole, rowvar=False)) / 2)
    return math.sqrt(difference @ inverse @ difference)  # equation 10


def _luma_of_yiq(picture: FloatArray) -> _DoubleArray:
    """Y in 0..255, rounded.

    In float32 and in this order, as pyiqa does on a CPU: one pixel in a thousand is a tie, and how ties are rounded
    moves OSEDiff's 5.6476 on RealSR to anything from 5.6474 to 5.6480.
    """
    red, green, blue = (picture[..., channel].astype(np.float32) for channel in range(3))
    luma = (red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114)) * np.float32(255)
    return luma.round().astype(np.float64)


def _block_features(luma: _DoubleArray, side: int) -> _DoubleArray:
    """[blocks, 18]."""
    window = _window()
    mean = cv2.filter2D(luma, cv2.CV_64F, window, borderType=cv2.BORDER_REPLICATE)
    square = cv2.filter2D(luma * luma, cv2.CV_64F, window, borderType=cv2.BORDER_REPLICATE)
    normal = (luma - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1)  # equation 1
    rows, columns = luma.shape[0] // side, luma.shape[1] // side
    blocks = normal.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    return np.array([_features(block) for block in blocks])


def _features(block: _DoubleArray) -> list[float]:
    """The 18 features of a block of normalised values."""
    alpha, left, right = _fit(block)
    found = [alpha, (left + right) / 2]
    for shift in _NEIGHBOURS:
        alpha, left, right = _fit(block * np.roll(block, shift, axis=(0, 1)))
        mean = (right - left) * math.gamma(2 / alpha) / math.gamma(1 / alpha)  # equation 8
        found += [alpha, mean, left, right]
    return found


def _fit(values: _DoubleArray) -> tuple[float, float, float]:
    """Shape, left and right scale of an asymmetric generalised Gaussian (equation 7), by its moments.

    The scales are NaN without a negative or a positive value.
    """
    shapes, ratios = _shape_table()
    left, right = (_root_mean_square(side) for side in (values[values < 0], values[values > 0]))
    if math.isnan(left) or math.isnan(right):
        return float(shapes[0]), math.nan, math.nan
    skew = left / right
    ratio = float(np.abs(values).mean() ** 2 / np.square(values).mean())
    wanted = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    alpha = float(shapes[np.argmin(np.square(ratios - wanted))])
    scale = math.sqrt(math.gamma(1 / alpha) / math.gamma(3 / alpha))
    return alpha, left * scale, right * scale


@functools.cache
def _shape_table() -> tuple[_DoubleArray, _DoubleArray]:
    """Shapes .2 to 10 and, for each, the squared mean of absolute values over the mean of squares."""
    shapes = np.arange(0.2, 10.001, 0.001)
    ratios = [math.gamma(2 / s) ** 2 / (math.gamma(1 / s) * math.gamma(3 / s)) for s in shapes]
    return shapes, np.array(ratios)


@functools.cache
def _window() -> _DoubleArray:
    """Weights [7, 7] of the local mean: a Gaussian of sigma 7/6, in float32 as in pyiqa.

    So rounded they add up to 1.00000001, which shows in flat, bright blocks: .001 of OSEDiff's 5.6476 on RealSR.
    """
    line = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
    window = np.outer(line, line)
    return (window / window.sum()).astype(np.float32).astype(np.float64)


def _root_mean_square(values: _DoubleArray) -> float:
    return math.sqrt(np.square(values).mean()) if values.size else math.nan


def _halved(luma: _DoubleArray) -> _DoubleArray:
    """Half the size, as MATLAB's imresize: bicubic (a = -.5) with antialiasing, the borders mirrored."""
    distance = np.abs(np.arange(8) - 3.5) / 2
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, far) / 2
    for _ in range(2):
        lines = np.pad(luma, ((3, 3), (0, 0)), mode="symmetric")
        luma = sum(weight * lines[tap : tap + len(luma) : 2] for tap, weight in enumerate(weights)).T
    return luma
