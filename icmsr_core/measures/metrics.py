"""How good a restored picture is, compared with the truth or judged alone.

Pictures are arrays [height, width, 3], R, G, B: uint8, or floating point in [0, 1]. PSNR and SSIM follow pyiqa with
test_y_channel=True and color_space="ycbcr", in float64 and without cropping a border, as the published tables of this
field do. FSIM, DSS and SR-SIM come from piq, the measures after them from pyiqa; both packages are optional. LPIPS,
DISTS and NIQE need no pyiqa where the user has converted their published weights (`weight_files`).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from ..errors import IcmsrError
from ..pictures.files import to_tensor
from ..pictures.ranges import unit_to_signed
from .dists import Dists, load_dists
from .feature_networks import ALEXNET, VGG16
from .lpips import Lpips, load_lpips
from .niqe import NaturalStatistics, load_niqe, niqe
from .weight_files import DISTS, LPIPS_ALEX, LPIPS_VGG, NIQE, WeightFile

PictureArray = npt.NDArray[Any]
DoubleArray = npt.NDArray[np.float64]

_LUMA = np.array([65.481, 128.553, 24.966])  # BT.601, limited range: Y in 16..235


def psnr_y(result: PictureArray, truth: PictureArray) -> float:
    """Peak signal-to-noise ratio of Y in dB, peak 255; Y is not rounded. Equal pictures give 80 dB, as in pyiqa.

    Raises IcmsrError if the pictures differ in size or are not the arrays that this module takes.
    """
    difference = (_luma(result) - _luma(_alike(result, truth))) / 255
    return 10 * math.log10(1 / (float(np.square(difference).mean()) + 1e-8))


def ssim_y(result: PictureArray, truth: PictureArray) -> float:
    """Structural similarity of Y, at most 1 (Wang et al. 2004), in pyiqa's form.

    That is: Y rounded to integers, 11 x 11 Gaussian of sigma 1.5 without padding, C1 = (.01 * 255)^2,
    C2 = (.03 * 255)^2, and a negative contrast-structure term counted as 0. Raises IcmsrError as `psnr_y`, and for
    sides under 11 pixels.
    """
    x, y = _luma(result).round(), _luma(_alike(result, truth)).round()
    if min(x.shape) < 11:
        raise IcmsrError(f"SSIM needs sides of at least 11 pixels, got {x.shape[1]} x {x.shape[0]}")
    kernel = cv2.getGaussianKernel(11, 1.5)

    def smooth(values: DoubleArray) -> DoubleArray:
        return np.asarray(cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel)[5:-5, 5:-5], np.float64)

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast_structure = np.maximum((2 * covariance + c2) / (variance_x + variance_y + c2), 0)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * contrast_structure).mean())


def high_frequency_ratio(result: PictureArray, truth: PictureArray) -> float:
    """Fine detail of the result over that of the truth (ours): 1 is ideal, less is blur, more is invention or noise.

    The power of the mean-free Y's 2-D spectrum at radius .25 < r <= 1, where r = 1 is half the sampling rate along an
    axis, of the result, divided by that of the truth. NaN where the truth is flat. For several pictures use the mean
    of the ratios: a few busy pictures would dominate the ratio of the sums. Raises IcmsrError as `psnr_y`.
    """
    power, reference = (_high_frequency_power(_luma(picture)) for picture in (result, _alike(result, truth)))
    # The power of a flat picture is rounding error; one grey level in one pixel gives about the number of pixels.
    return power / reference if reference > 1e-9 * result[..., 0].size else math.nan


def mean_color_difference(a: PictureArray, b: PictureArray) -> float:
    """The largest difference between the two pictures' means, over R, G and B, in 1/255 (ours). Sizes may differ.

    Raises IcmsrError if the pictures are not the arrays that this module takes.
    """
    return float(np.abs(_unit(a).mean(axis=(0, 1)) - _unit(b).mean(axis=(0, 1))).max()) * 255


def fsim(result: PictureArray, truth: PictureArray) -> float:
    """Feature similarity with colour, at most 1 (Zhang et al. 2011), with piq's defaults.

    Raises IcmsrError as `psnr_y`, if piq is not installed, and for pictures that are too small; some of these give NaN
    instead.
    """
    return _piq_value("fsim", result, truth)


def dss(result: PictureArray, truth: PictureArray) -> float:
    """DCT subband similarity, at most 1 (Balanov et al. 2015), with piq's defaults. Raises IcmsrError as `fsim`."""
    return _piq_value("dss", result, truth)


def srsim(result: PictureArray, truth: PictureArray) -> float:
    """Spectral residual similarity, at most 1 (Zhang and Li 2012), with piq's defaults. Raises IcmsrError as `fsim`."""
    return _piq_value("srsim", result, truth)


@dataclass(frozen=True)
class Metric:
    """A named measure. Call it with a result and, if `needs_truth`, the truth."""

    name: str
    """Its name in `METRICS`, on the command line and in tables."""
    compute: Callable[[PictureArray, PictureArray], float]
    """The function; a measure without truth ignores its second argument."""
    needs_truth: bool = True
    """False: it judges the result on its own."""
    lower_better: bool | None = False
    """Whether a lower value is better; None: 1 is ideal."""
    prepare: Callable[[], object] = lambda: None
    """Loads the library and the weights it needs; raises IcmsrError, which says how to get them."""

    def __call__(self, result: PictureArray, truth: PictureArray | None = None) -> float:
        """The value for `result` [height, width, 3].

        Raises IcmsrError when the truth is needed and missing, when a library or its weights are missing, and when the
        pictures do not fit each other.
        """
        if truth is None and self.needs_truth:
            raise IcmsrError(f"the metric {self.name} compares the result with a truth, got none: pass truth")
        return self.compute(result, result if truth is None else truth)


def metric(name: str, weights: Path | None = None) -> Metric:
    """The measure called `name`.

    With `weights`, a folder of files made by train/metric_weights.py, LPIPS, DISTS and NIQE are computed with those and
    all others as without. Raises IcmsrError, with a list of all names, for any other name.
    """
    if name not in METRICS:
        raise IcmsrError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    if weights is None or name not in _CONVERTED:
        return METRICS[name]
    converted = _CONVERTED[name]
    prepare = functools.partial(_loaded, converted.load, weights / converted.file.name)

    def compute(result: PictureArray, truth: PictureArray) -> float:
        return converted.compute(prepare(), result, truth)

    return replace(METRICS[name], compute=compute, prepare=prepare)


def _unit(picture: PictureArray) -> DoubleArray:
    if picture.ndim != 3 or picture.shape[2] != 3 or not (picture.dtype == np.uint8 or picture.dtype.kind == "f"):
        raise IcmsrError(
            f"a picture must be [height, width, 3], uint8 or floating point, got {picture.dtype} {list(picture.shape)}"
        )
    return picture.astype(np.float64) / (255 if picture.dtype == np.uint8 else 1)


def _luma(picture: PictureArray) -> DoubleArray:
    return np.asarray(_unit(picture) @ _LUMA + 16, np.float64)


def _alike(result: PictureArray, truth: PictureArray) -> PictureArray:
    if result.shape != truth.shape:
        raise IcmsrError(f"result and truth must have the same size, got {list(result.shape)} and {list(truth.shape)}")
    return truth


def _high_frequency_power(luma: DoubleArray) -> float:
    spectrum = np.abs(np.fft.fft2(luma - luma.mean())) ** 2
    radius = np.hypot(*np.meshgrid(*(2 * np.fft.fftfreq(side) for side in luma.shape), indexing="ij"))
    return float(spectrum[(radius > 0.25) & (radius <= 1)].sum())


def _piq() -> Any:
    try:
        return importlib.import_module("piq")
    except ImportError as error:
        raise IcmsrError('FSIM, DSS and SR-SIM need the package piq: pip install "icm-sr[eval]"') from error


def _piq_value(name: str, result: PictureArray, truth: PictureArray) -> float:
    measure = getattr(_piq(), name)
    x, y = (to_tensor(_unit(picture).astype(np.float32)) for picture in (result, _alike(result, truth)))
    try:
        return float(measure(x, y))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise IcmsrError(f"{name} of {result.shape[1]} x {result.shape[0]} pixels: {reason}") from error


@dataclass(frozen=True)
class _Converted:
    """A measure that works with a file of converted weights."""

    file: WeightFile
    load: Callable[[Path], Any]
    """Reads the file."""
    compute: Callable[[Any, PictureArray, PictureArray], float]
    """Of what `load` returned, the result and the truth."""


@functools.cache
def _loaded(load: Callable[[Path], Any], path: Path) -> Any:
    return load(path)


def _load_distance(load: Callable[[Path], Lpips | Dists], path: Path) -> Lpips | Dists:
    return load(path).to(_device())


def _distance(measure: Lpips | Dists, result: PictureArray, truth: PictureArray) -> float:
    pictures = (to_tensor(_unit(picture).astype(np.float32)) for picture in (result, _alike(result, truth)))
    # TF32, the default of convolutions on graphics cards, has three digits; tables have four.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return float(measure(*(unit_to_signed(picture).to(_device()) for picture in pictures)))


def _niqe_value(natural: NaturalStatistics, result: PictureArray, _truth: PictureArray) -> float:
    return niqe(_unit(result).astype(np.float32), natural)


_CONVERTED: dict[str, _Converted] = {
    "lpips": _Converted(
        LPIPS_ALEX, functools.partial(_load_distance, functools.partial(load_lpips, network=ALEXNET)), _distance
    ),
    "lpips_vgg": _Converted(
        LPIPS_VGG, functools.partial(_load_distance, functools.partial(load_lpips, network=VGG16)), _distance
    ),
    "dists": _Converted(DISTS, functools.partial(_load_distance, load_dists), _distance),
    "niqe": _Converted(NIQE, load_niqe, _niqe_value),
}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _pyiqa_metric(name: str, pyiqa_name: str) -> Any:
    converted = _CONVERTED.get(name)
    without = f"; or convert its weights with {converted.file.command} and pass --weights-dir DIR" if converted else ""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError as error:
        raise IcmsrError(f"the metric {name} needs the package pyiqa: pip install pyiqa ({error}){without}") from error
    try:
        return pyiqa.create_metric(pyiqa_name, device=_device())
    except Exception as error:  # whatever a download, or pyiqa's many packages, can raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise IcmsrError(
            f"pyiqa cannot load the metric {pyiqa_name}, whose weights it downloads at first use: {reason}{without}"
        ) from error


def _pyiqa_value(name: str, pyiqa_name: str, needs_truth: bool, result: PictureArray, truth: PictureArray) -> float:
    pictures = [result, _alike(result, truth)] if needs_truth else [result]
    measure = _pyiqa_metric(name, pyiqa_name)
    with torch.no_grad():
        return float(measure(*(to_tensor(_unit(picture).astype(np.float32)) for picture in pictures)))


def _network(name: str, *, needs_truth: bool, lower_better: bool, pyiqa_name: str | None = None) -> Metric:
    stored = pyiqa_name or name
    return Metric(
        name,
        functools.partial(_pyiqa_value, name, stored, needs_truth),
        needs_truth,
        lower_better,
        functools.partial(_pyiqa_metric, name, stored),
    )


METRICS: dict[str, Metric] = {
    entry.name: entry
    for entry in (
        Metric("psnr", psnr_y),
        Metric("ssim", ssim_y),
        Metric("hf", high_frequency_ratio, lower_better=None),
        Metric("fsim", fsim, prepare=_piq),
        Metric("dss", dss, prepare=_piq),
        Metric("srsim", srsim, prepare=_piq),
        _network("lpips", needs_truth=True, lower_better=True),
        _network("lpips_vgg", needs_truth=True, lower_better=True, pyiqa_name="lpips-vgg"),
        _network("dists", needs_truth=True, lower_better=True),
        _network("niqe", needs_truth=False, lower_better=True),
        _network("musiq", needs_truth=False, lower_better=False),
        _network("maniqa", needs_truth=False, lower_better=False, pyiqa_name="maniqa-pipal"),
        _network("clipiqa", needs_truth=False, lower_better=False),
        _network("topiq_nr", needs_truth=False, lower_better=False),
        _network("liqe", needs_truth=False, lower_better=False),
    )
}
"""The measures by name. "hf" is `high_frequency_ratio`; "lpips" and those after it are pyiqa's, "lpips" on AlexNet."""
