"""Synthetic camera: a sharp picture in, the low-resolution picture a poor camera and the web would have made of it out.

The second-order model of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, section 3): blur, resize, noise and JPEG,
twice, with ringing from a sinc filter. The same steps at scale 1, with motion blur and masked regions added, make the
inputs of other restoration tasks (`presets.PRESETS`). `degrade` takes and gives uint8; between its steps pictures are
float32 [H, W, 3], RGB in [0, 1].
"""

import math

import cv2
import numpy as np

from ...errors import IcmsrError
from ...pictures.files import FloatArray
from .blur_kernels import Kernel, gaussian_kernel, motion_kernel, plateau_kernel, sinc_kernel
from .presets import KERNEL_KINDS, DegradationConfig, Range, StageConfig
from .sources import Pixels

_FILTERS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


def _uniform(bounds: Range, rng: np.random.Generator) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(rng.random())


def _pick(probs: tuple[float, ...], rng: np.random.Generator) -> int:
    point, total = float(rng.random()), 0.0
    for index, prob in enumerate(probs):
        total += prob
        if point < total:
            return index
    return max(index for index, prob in enumerate(probs) if prob > 0)  # the sum is 1 only up to rounding


def _draw_size(bounds: tuple[int, int], rng: np.random.Generator) -> int:
    return bounds[0] + 2 * int(rng.integers((bounds[1] - bounds[0]) // 2 + 1))


def _draw_beta(bounds: Range, rng: np.random.Generator) -> float:
    """Half of the draws below 1 and half above: uniform draws from (0.5, 4) would hardly ever be peaked."""
    low, high = bounds
    if low <= 1.0 <= high:
        bounds = (low, 1.0) if rng.random() < 0.5 else (1.0, high)
    return _uniform(bounds, rng)


def _draw_sinc(size: int, rng: np.random.Generator) -> Kernel:
    # Below pi/5 a small kernel cannot hold the main lobe and would be a box blur.
    return sinc_kernel(size, _uniform((math.pi / 3 if size < 13 else math.pi / 5, math.pi), rng))


def draw_blur_kernel(stage: StageConfig, rng: np.random.Generator) -> Kernel:
    """A random blur kernel of the stage: one of `KERNEL_KINDS`, a sinc or a motion. [size, size], sums to 1."""
    size = _draw_size(stage.kernel_size, rng)
    if rng.random() < stage.sinc_prob:
        return _draw_sinc(size, rng)
    # Where it is 0, nothing is drawn: the published presets keep their sequence of random numbers.
    if stage.motion_prob and rng.random() < stage.motion_prob:
        length, bend = _uniform((size / 3, size - 1.0), rng), _uniform((-math.pi / 2, math.pi / 2), rng)
        return motion_kernel(size, length, _uniform((-math.pi, math.pi), rng), bend)
    kind = KERNEL_KINDS[_pick(stage.kernel_probs, rng)]
    sigma_x = sigma_y = _uniform(stage.sigma, rng)
    angle = 0.0
    if kind.endswith("aniso"):
        sigma_y, angle = _uniform(stage.sigma, rng), _uniform((-math.pi, math.pi), rng)
    if kind.startswith("plateau"):
        return plateau_kernel(size, sigma_x, sigma_y, angle, _draw_beta(stage.beta_plateau, rng))
    beta = _draw_beta(stage.beta_generalised, rng) if kind.startswith("generalised") else 1.0
    return gaussian_kernel(size, sigma_x, sigma_y, angle, beta)


def _blur(image: FloatArray, kernel: Kernel) -> FloatArray:
    middle = len(kernel) // 2
    # Outer rows and columns below a millionth of the peak cost time and change nothing.
    mass = np.abs(kernel).max(axis=0) + np.abs(kernel).max(axis=1)
    mass = np.maximum(mass, mass[::-1])  # a motion kernel is not symmetric
    margin = int(np.argmax(mass > 1e-6 * mass[middle]))
    kernel = kernel[margin : len(kernel) - margin, margin : len(kernel) - margin].astype(np.float32)
    row = kernel.sum(axis=0)
    if np.max(np.abs(np.outer(row, row) - kernel)) < 1e-6 * np.max(kernel):  # an isotropic Gaussian: two cheap passes
        return cv2.sepFilter2D(image, -1, row, row)  # type: ignore[return-value]
    return cv2.filter2D(image, -1, kernel)  # type: ignore[return-value]


def _resize(image: FloatArray, size: tuple[int, int], rng: np.random.Generator) -> FloatArray:
    how = _FILTERS[int(rng.integers(len(_FILTERS)))]
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=how)  # type: ignore[return-value]


def _random_resize(
    image: FloatArray, output: tuple[int, int], stage: StageConfig, rng: np.random.Generator
) -> FloatArray:
    low, high = stage.resize_range
    factor = _uniform(((1.0, high), (low, 1.0), (1.0, 1.0))[_pick(stage.resize_probs, rng)], rng)
    height, width = image.shape[:2] if stage.resize_of == "picture" else output
    return _resize(image, (max(1, round(height * factor)), max(1, round(width * factor))), rng)


def _noise(image: FloatArray, stage: StageConfig, rng: np.random.Generator) -> FloatArray:
    image = np.clip(image, 0.0, 1.0)
    height, width = image.shape[:2]
    gray = rng.random() < stage.gray_prob
    if rng.random() < stage.gaussian_prob:
        sigma = _uniform(stage.gaussian_sigma, rng) / 255
        noise = sigma * rng.standard_normal((height, width, 1 if gray else 3), dtype=np.float32)
    else:
        strength = _uniform(stage.poisson_scale, rng)
        clean = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if gray else image
        # Photons at full brightness: the next power of two above the number of grey levels in use. Real-ESRGAN has no
        # floor of 64, so there a flat picture counts a single photon and drowns.
        used = np.count_nonzero(np.bincount((clean * 255 + 0.5).astype(np.uint8).ravel(), minlength=256))
        photons = np.float32(max(64, 2 ** math.ceil(math.log2(used))))
        noise = strength * (rng.poisson(clean * photons).astype(np.float32) / photons - clean)
    return np.asarray(np.clip(image + noise, 0.0, 1.0), dtype=np.float32)


def _to_bytes(image: FloatArray) -> Pixels:
    return (np.clip(image, 0.0, 1.0) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _to_floats(image: Pixels) -> FloatArray:
    return image.astype(np.float32) / np.float32(255)


def _jpeg(image: FloatArray, stage: StageConfig, rng: np.random.Generator) -> FloatArray:
    if rng.random() >= stage.jpeg_prob:
        return image
    quality = int(rng.integers(stage.jpeg_quality[0], stage.jpeg_quality[1] + 1))
    # The codec's first channel is blue.
    _, stream = cv2.imencode(".jpg", _to_bytes(image)[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))
    return _to_floats(np.asarray(cv2.imdecode(stream, cv2.IMREAD_COLOR))[..., ::-1])


def _round(image: FloatArray, output: tuple[int, int], stage: StageConfig, rng: np.random.Generator) -> FloatArray:
    if rng.random() < stage.blur_prob:
        image = _blur(image, draw_blur_kernel(stage, rng))
    image = _random_resize(image, output, stage, rng)
    if rng.random() < stage.noise_prob:
        image = _noise(image, stage, rng)
    # Where it is 0, nothing is drawn (see `draw_blur_kernel`).
    return _sharpen(image, stage, rng) if stage.sharpen_prob and rng.random() < stage.sharpen_prob else image


def _sharpen(image: FloatArray, stage: StageConfig, rng: np.random.Generator) -> FloatArray:
    amount = np.float32(_uniform(stage.sharpen_amount, rng))
    removed = image - cv2.GaussianBlur(image, (0, 0), _uniform(stage.sharpen_sigma, rng))
    return np.asarray(np.clip(image + amount * removed, 0.0, 1.0), dtype=np.float32)


def _covered(image: FloatArray, bounds: Range, rng: np.random.Generator) -> FloatArray:
    """`image` with a share of its area, drawn from `bounds`, in mid-grey; the rest is the same to the bit."""
    height, width = image.shape[:2]
    wanted = round(_uniform(bounds, rng) * height * width)
    mask = np.zeros((height, width), dtype=np.uint8)
    while (missing := wanted - np.count_nonzero(mask)) > 0:
        before = mask.copy()
        if rng.random() < 0.5:
            middle, half = rng.random(2) * (width, height), rng.uniform(0.03, 0.25, 2) * (width, height)
            corners = np.rint([middle - half, middle + half]).astype(int).tolist()
            cv2.rectangle(mask, corners[0], corners[1], 1, thickness=-1)
        else:
            turns = rng.normal(0, 0.25, (int(rng.integers(2, 6)), 2))
            points = np.rint((rng.random(2) + np.cumsum(turns, axis=0)) * (width, height)).astype(np.int32)
            thickness = max(1, round(rng.uniform(0.03, 0.12) * min(height, width)))
            cv2.polylines(mask, [points], isClosed=False, color=1, thickness=thickness)
        added = np.flatnonzero(mask > before)
        mask.ravel()[added[missing:]] = 0  # the last shape is cut to what was wanted
    return np.where(mask[..., None] > 0, np.float32(0.5), image)


def degrade(image: Pixels, config: DegradationConfig, rng: np.random.Generator) -> Pixels:
    """The low-resolution picture uint8 [H/scale, W/scale, 3] of `image` uint8 [H, W, 3], both RGB.

    H and W are multiples of `config.scale`; `image` is not changed. The result depends on the picture, the
    configuration and the state of `rng` alone. Raises IcmsrError for another shape or type. Source: Real-ESRGAN section
    3; presets and options as named in the configuration.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise IcmsrError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}: convert it first")
    height, width = image.shape[:2]
    if height % config.scale or width % config.scale or not height or not width:
        raise IcmsrError(
            f"image sides must be multiples of the scale {config.scale}, got {height}x{width} (height x width): crop it"
        )
    output = (height // config.scale, width // config.scale)
    last = config.first
    low = _round(_to_floats(image), output, config.first, rng)
    if rng.random() < config.second_stage_prob:
        low = _jpeg(low, config.first, rng)
        last = config.second
        low = _round(low, output, config.second, rng)
    jpeg_first = rng.random() < 0.5
    if jpeg_first:
        low = _jpeg(low, last, rng)
    low = _resize(low, output, rng)
    if rng.random() < config.final_sinc_prob:
        low = _blur(low, _draw_sinc(_draw_size(config.final_sinc_size, rng), rng))
    if not jpeg_first:
        low = _jpeg(low, last, rng)
    if config.mask_share[1] > 0:
        low = _covered(low, config.mask_share, rng)
    return _to_bytes(low)
