"""Faults that training leaves and that scores against a truth hardly notice: jagged edges and repeated patterns.

Pictures are arrays [height, width] of Y or of one channel, floating point in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import IcmsrError
from .metrics import DoubleArray

_NEAR, _AROUND = 1, 8  # frequency bins: what counts as the peak itself, and how far its surroundings reach


@dataclass(frozen=True)
class EdgeShape:
    """How a straight edge came out."""

    jitter: float
    """Pixels, RMS: how far the edge leaves the straight line, row by row. A staircase of steps s has s / sqrt(12)."""
    width: float
    """Pixels, along the normal: the distance in which the edge rises from 10% to 90%. Ideal is under 1."""
    overshoot: float
    """The largest excess over the two sides, as a part of the edge's height: a halo."""


def edge_shape(picture: npt.NDArray[np.floating]) -> EdgeShape:
    """The shape of the one edge in `picture`, which crosses every row, dark on the left and bright on the right.

    Raises IcmsrError if a row does not cross the middle between the picture's darkest and brightest side.
    """
    values = np.asarray(picture, np.float64)
    if values.ndim != 2 or min(values.shape) < 8:
        raise IcmsrError(f"an edge needs a picture [height, width] of at least 8 x 8, got {values.shape}")
    dark, bright = np.median(values[:, :2]), np.median(values[:, -2:])
    if bright - dark < 0.05:
        raise IcmsrError(f"no edge: the left side is {dark:.2f}, the right side {bright:.2f}; it must be brighter")
    unit = (values - dark) / (bright - dark)
    rows = np.arange(values.shape[0])
    crossings = np.array([_crossing(row) for row in unit])
    slope, start = np.polyfit(rows, crossings, 1)
    distance = (np.arange(values.shape[1])[None, :] - (start + slope * rows)[:, None]) / math.hypot(1, slope)
    return EdgeShape(
        jitter=float(np.sqrt(np.mean((crossings - start - slope * rows) ** 2)) / math.hypot(1, slope)),
        width=_rise(distance, unit),
        overshoot=float(max(unit.max() - 1, -unit.min(), 0)),
    )


def _crossing(row: DoubleArray) -> float:
    """Where a row of the unit edge crosses .5, in pixels, by linear interpolation: the mean of all its crossings."""
    below = row < 0.5
    places = np.flatnonzero(below[:-1] & ~below[1:])
    if places.size == 0:
        raise IcmsrError("the edge does not cross every row: give a part of the picture where it does")
    return float(np.mean(places + (0.5 - row[places]) / (row[places + 1] - row[places])))


def _rise(distance: DoubleArray, unit: DoubleArray) -> float:
    """The 10% to 90% distance of the mean profile along the normal, sampled four times a pixel."""
    bins = np.rint(distance * 4).astype(int)
    lowest = bins.min()
    counts = np.bincount((bins - lowest).ravel())
    sums = np.bincount((bins - lowest).ravel(), weights=unit.ravel())
    known = counts > 0
    places, profile = (np.flatnonzero(known) + lowest) / 4, sums[known] / counts[known]
    middle = int(np.argmin(np.abs(places)))
    low = places[: middle + 1][profile[: middle + 1] <= 0.1]
    high = places[middle:][profile[middle:] >= 0.9]
    if low.size == 0 or high.size == 0:
        return math.inf
    return float(high[0] - low[-1])


def lattice_peak(picture: npt.NDArray[np.floating], period: int) -> float:
    """The strongest spectral line of a pattern that repeats every `period` pixels, in dB over its surroundings.

    The spectrum of the picture under a Hann window, at all whole multiples of 1 / `period` along both axes: the power
    at such a frequency over the median of its neighbours. Noise without a pattern gives 8 to 13 dB (a maximum of many
    random numbers), so compare with the truth or with a picture without the fault. The picture is cut to whole periods.
    Raises IcmsrError for fewer than 16 periods a side.
    """
    values = np.asarray(picture, np.float64)
    if period < 2:
        raise IcmsrError(f"period: expected at least 2 pixels, got {period}")
    height, width = (length // period * period for length in values.shape)
    if min(height, width) < 16 * period:
        raise IcmsrError(f"a pattern of {period} pixels needs sides of {16 * period}, got {width} x {height}")
    part = values[:height, :width] - values[:height, :width].mean()
    spectrum = np.abs(np.fft.fft2(part * np.outer(np.hanning(height), np.hanning(width)))) ** 2
    found = 0.0
    for down in range(period):
        for across in range(period):
            if (down, across) != (0, 0):
                found = max(found, _over_surroundings(spectrum, down * height // period, across * width // period))
    return 10 * math.log10(found) if found > 0 else 0.0


def _over_surroundings(spectrum: DoubleArray, row: int, column: int) -> float:
    """The power at a frequency over the median of those around it; 0 where nothing is around."""
    offsets = np.arange(-_AROUND, _AROUND + 1)
    block = spectrum[np.ix_((row + offsets) % spectrum.shape[0], (column + offsets) % spectrum.shape[1])]
    near = np.abs(offsets) <= _NEAR
    inside = np.outer(near, near)
    around = float(np.median(block[~inside]))
    return float(block[inside].max() / around) if around > 1e-20 else 0.0
