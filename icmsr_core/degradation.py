"""Synthetic camera: a sharp picture in, the low-resolution picture a poor camera and the web would have made of it out.

The second-order model of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, section 3): blur, resize, noise and JPEG,
twice, with ringing from a sinc filter. Numbers are Real-ESRGAN's where a field's text does not say otherwise.
The same steps at scale 1, with motion blur and masked regions beside them, make the inputs of other restoration tasks
(`PRESETS`). Pictures here are numpy float32 arrays [H, W, 3], RGB in [0, 1].
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from .errors import IcmsrError

Picture = npt.NDArray[np.float32]
Kernel = npt.NDArray[np.float64]
Range = tuple[float, float]

KERNEL_KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")
_FILTERS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


def _check_prob(where: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise IcmsrError(f"{where} is a probability, got {value}: choose a number from 0 to 1")


def _check_range(where: str, value: Range, low: float, high: float) -> None:
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise IcmsrError(f"{where} must be two ordered numbers within [{low:g}, {high:g}], got {value}")


def _check_probs(where: str, value: tuple[float, ...], names: tuple[str, ...]) -> None:
    if len(value) != len(names) or min(value) < 0 or abs(sum(value) - 1) > 1e-6:
        raise IcmsrError(f"{where} must be {len(names)} probabilities ({', '.join(names)}) that sum to 1, got {value}")


def _check_sizes(where: str, value: tuple[int, int]) -> None:
    if len(value) != 2 or not 3 <= value[0] <= value[1] or value[0] % 2 == 0 or value[1] % 2 == 0:
        raise IcmsrError(f"{where} must be two ordered odd kernel sizes from 3 up, got {value}: try (7, 21)")


@dataclass(frozen=True)
class StageConfig:
    """One round of blur, resize, noise and JPEG. The defaults are the first round of Real-ESRGAN."""

    blur_prob: float = 1.0
    """Probability of a blur."""
    kernel_size: tuple[int, int] = (7, 21)
    """Smallest and largest side of the blur kernel in pixels, both odd."""
    kernel_probs: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Probabilities of the kernel's shapes: iso, aniso, generalised iso / aniso, plateau iso / aniso."""
    sinc_prob: float = 0.1
    """Probability that the blur is a sinc low-pass (which rings) in place of one of the six shapes."""
    motion_prob: float = 0.0
    """Probability that a blur that is no sinc is the trace of a moving camera (`motion_kernel`) in place of one of the
    six shapes (ours; Real-ESRGAN has none)."""
    sigma: Range = (0.2, 3.0)
    """Standard deviation of the blur in pixels."""
    beta_generalised: Range = (0.5, 4.0)
    """Exponent of the generalised Gaussian: below 1 peaked, 1 Gaussian, above 1 flat. Half of the draws lie below 1."""
    beta_plateau: Range = (1.0, 2.0)
    """Exponent of the plateau kernel 1 / (1 + q^beta). Half of the draws lie at or below 1."""
    resize_probs: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """Probabilities of enlarging, shrinking, keeping the size."""
    resize_range: Range = (0.15, 1.5)
    """Smallest and largest resize factor; encloses 1."""
    resize_of: Literal["picture", "output"] = "picture"
    """What the factor multiplies: the size of the picture at hand, or the size of the output (H/scale, W/scale)."""
    noise_prob: float = 1.0
    """Probability of any noise."""
    gaussian_prob: float = 0.5
    """Probability that the noise is Gaussian; otherwise it is Poisson (shot) noise."""
    gaussian_sigma: Range = (1.0, 30.0)
    """Standard deviation of Gaussian noise in 1/255."""
    poisson_scale: Range = (0.05, 3.0)
    """Strength of Poisson noise: 1 is that of a sensor counting one photon per grey level."""
    gray_prob: float = 0.4
    """Probability that the noise is equal in the three channels."""
    jpeg_prob: float = 1.0
    """Probability of JPEG compression."""
    jpeg_quality: tuple[int, int] = (30, 95)
    """Lowest and highest JPEG quality."""

    def __post_init__(self) -> None:
        for name in (
            "blur_prob", "sinc_prob", "motion_prob", "noise_prob", "gaussian_prob", "gray_prob", "jpeg_prob",
        ):
            _check_prob(name, getattr(self, name))
        _check_sizes("kernel_size", self.kernel_size)
        _check_probs("kernel_probs", self.kernel_probs, KERNEL_KINDS)
        _check_range("sigma", self.sigma, 0.05, 100.0)
        _check_range("beta_generalised", self.beta_generalised, 0.05, 20.0)
        _check_range("beta_plateau", self.beta_plateau, 0.05, 20.0)
        _check_probs("resize_probs", self.resize_probs, ("enlarge", "shrink", "keep"))
        _check_range("resize_range", self.resize_range, 0.01, 16.0)
        if not self.resize_range[0] <= 1.0 <= self.resize_range[1]:
            raise IcmsrError(f"resize_range must enclose 1, got {self.resize_range}: try (0.5, 1.5)")
        if self.resize_of not in ("picture", "output"):
            raise IcmsrError(f"resize_of must be 'picture' or 'output', got {self.resize_of!r}")
        _check_range("gaussian_sigma", self.gaussian_sigma, 0.0, 255.0)
        _check_range("poisson_scale", self.poisson_scale, 0.0, 100.0)
        _check_range("jpeg_quality", self.jpeg_quality, 1, 100)


SECOND_STAGE = StageConfig(
    blur_prob=0.8,
    sigma=(0.2, 1.5),
    resize_probs=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    resize_of="output",
    gaussian_sigma=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)
"""The second round of Real-ESRGAN."""


@dataclass(frozen=True)
class DegradationConfig:
    """The whole degradation. The defaults are Real-ESRGAN's for x4."""

    scale: int = 4
    """The output is 1/scale of the input in height and width."""
    first: StageConfig = StageConfig()
    """The round every picture goes through."""
    second: StageConfig = SECOND_STAGE
    """The second round. The JPEG of the last round that runs changes places, at random, with the final resize."""
    second_stage_prob: float = 1.0
    """Probability that the second round runs (ours; 1 is Real-ESRGAN, 0 the classical single round)."""
    final_sinc_prob: float = 0.8
    """Probability of a sinc filter after the final resize."""
    final_sinc_size: tuple[int, int] = (7, 21)
    """Smallest and largest side of the final sinc kernel in pixels, both odd."""
    mask_share: Range = (0.0, 0.0)
    """Smallest and largest share of the output's area that is covered, last of all, by mid-grey rectangles and thick
    strokes (ours). 0.9 is the most: random shapes take too long to cover the rest."""

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 64:
            raise IcmsrError(f"scale must be a whole number from 1 to 64, got {self.scale}: try 4")
        _check_prob("second_stage_prob", self.second_stage_prob)
        _check_prob("final_sinc_prob", self.final_sinc_prob)
        _check_sizes("final_sinc_size", self.final_sinc_size)
        _check_range("mask_share", self.mask_share, 0.0, 0.9)

_UNTOUCHED = StageConfig(
    blur_prob=0.0, resize_probs=(0.0, 0.0, 1.0), resize_of="output", noise_prob=0.0, gray_prob=0.0, jpeg_prob=0.0
)


def _one_round(**stage: Any) -> DegradationConfig:
    """Scale 1 and one round, of which only what `stage` sets is done."""
    return DegradationConfig(1, replace(_UNTOUCHED, **stage), second_stage_prob=0.0, final_sinc_prob=0.0)


PRESETS: dict[str, DegradationConfig] = {
    "realesrgan": DegradationConfig(),
    "light": DegradationConfig(
        first=StageConfig(
            kernel_size=(21, 21),
            kernel_probs=(0.8, 0.2, 0.0, 0.0, 0.0, 0.0),
            sinc_prob=0.0,
            resize_probs=(0.0, 0.0, 1.0),
            resize_of="output",
            noise_prob=2 / 3,
            gaussian_prob=1.0,
            gaussian_sigma=(0.0, 12.0),
            jpeg_prob=0.75,
            jpeg_quality=(40, 95),
        ),
        second_stage_prob=0.0,
        final_sinc_prob=0.0,
    ),
    "camera": DegradationConfig(
        first=StageConfig(
            kernel_size=(21, 21),
            kernel_probs=(0.7, 0.3, 0.0, 0.0, 0.0, 0.0),
            sinc_prob=0.0,
            resize_probs=(0.0, 0.0, 1.0),
            resize_of="output",
            noise_prob=0.7,
            gaussian_prob=0.5,
            gaussian_sigma=(0.0, 3.0),
            poisson_scale=(0.0, 0.1),
            jpeg_prob=0.3,
            jpeg_quality=(85, 100),
        ),
        second_stage_prob=0.0,
        final_sinc_prob=0.0,
    ),
    "jpeg": _one_round(jpeg_prob=1.0, jpeg_quality=(5, 40)),
    "denoise": _one_round(noise_prob=1.0, gaussian_sigma=(10.0, 50.0), poisson_scale=(0.9, 3.1)),
    "deblur": _one_round(
        blur_prob=1.0,
        kernel_size=(11, 31),
        kernel_probs=(0.4, 0.6, 0.0, 0.0, 0.0, 0.0),
        sinc_prob=0.0,
        motion_prob=0.4,
        sigma=(0.8, 4.0),
        noise_prob=1.0,
        gaussian_prob=1.0,
        gaussian_sigma=(0.0, 4.0),
    ),
    "inpaint": replace(_one_round(), mask_share=(0.05, 0.4)),
}
"""Super-resolution at x4: `realesrgan` is the published degradation; `light` (ours) is one mild round for pictures from
real cameras: blur, x1/scale with a random filter, a little noise on two thirds, JPEG on three quarters. `camera` (ours)
is milder still, so that a network learns to keep the faint texture of a clean picture: Gaussian noise of at most 3 in
1/255 or Poisson noise of at most 1.2 at mid-grey, and JPEG at quality 85 to 100 on a third.

Other tasks at the same size (ours): `jpeg` compresses at quality 5 to 40. `denoise` adds Gaussian noise of 10 to 50 in
1/255, or Poisson noise of 10 to 35 at mid-grey (up to twice that in a picture of few grey levels). `deblur` blurs with
a Gaussian (round or not) or a motion kernel, and adds noise of at most 4 in 1/255. `inpaint` covers 5 to 40% of the
area with mid-grey and leaves the rest as it is."""


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, angle: float, beta: float = 1.0) -> Kernel:
    """Generalised Gaussian exp(-q^beta / 2), q the squared Mahalanobis distance. [size, size], sums to 1, >= 0.

    Sigmas in pixels along the two axes of the ellipse, angle in radians; beta 1 is the ordinary Gaussian.
    Source: Real-ESRGAN section 3.1, after Liu et al. 2020.
    """
    kernel = np.exp(-0.5 * _mahalanobis(size, sigma_x, sigma_y, angle) ** beta)
    return np.asarray(kernel / kernel.sum())


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, angle: float, beta: float) -> Kernel:
    """Plateau-shaped kernel 1 / (1 + q^beta), see `gaussian_kernel`. [size, size], sums to 1, > 0."""
    kernel = 1.0 / (1.0 + _mahalanobis(size, sigma_x, sigma_y, angle) ** beta)
    return np.asarray(kernel / kernel.sum())


def sinc_kernel(size: int, cutoff: float) -> Kernel:
    """Circular ideal low-pass, cut to [size, size]; cutoff in radians per pixel, (0, pi]. Sums to 1, rings.

    Its closed form is cutoff * J1(cutoff r) / (2 pi r): the inverse Fourier transform of a disc of that radius.
    """
    axis = np.arange(size, dtype=np.float64) - size // 2
    radius = np.hypot(axis[:, None], axis[None, :])
    radius[size // 2, size // 2] = 1.0  # the limit at r = 0 is set below
    kernel = torch.special.bessel_j1(torch.from_numpy(cutoff * radius)).numpy() * cutoff / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return np.asarray(kernel / kernel.sum())


def motion_kernel(size: int, length: float, angle: float, bend: float) -> Kernel:
    """Trace of a point under a moving camera: an arc of a circle about the kernel's middle. [size, size], sums to 1.

    `length` in pixels, above 0 and at most size - 1; `angle` is the direction at half way, `bend` the turn from end to
    end, both in radians (bend 0 is a straight line). The centre of mass lies in the middle, no value is below 0.
    Raises IcmsrError for another length. Ours.
    """
    if not 0 < length <= size - 1:
        raise IcmsrError(f"length must be above 0 and at most {size - 1} for a kernel of {size} pixels, got {length:g}")
    count = 8 * size
    heading = angle + bend * ((np.arange(count) + 0.5) / count - 0.5)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)]), axis=1) * (length / count)
    path += size // 2 - path.mean(axis=1, keepdims=True)
    y, x = path.astype(np.int64)
    down, right = path - (y, x)
    kernel = np.zeros((size + 1, size + 1))  # the extra row and column get nothing but rounding
    for corner_y, weight_y in ((y, 1 - down), (y + 1, down)):
        np.add.at(kernel, (corner_y, x), weight_y * (1 - right))
        np.add.at(kernel, (corner_y, x + 1), weight_y * right)
    kernel = np.maximum(kernel[:size, :size], 0.0)
    return np.asarray(kernel / kernel.sum())


def _mahalanobis(size: int, sigma_x: float, sigma_y: float, angle: float) -> Kernel:
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = axis[None, :], axis[:, None]
    along = (math.cos(angle) * x + math.sin(angle) * y) / sigma_x
    across = (math.cos(angle) * y - math.sin(angle) * x) / sigma_y
    return np.asarray(along**2 + across**2)


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


def _blur(image: Picture, kernel: Kernel) -> Picture:
    middle = len(kernel) // 2
    # Outer rows and columns below a millionth of the peak cost time and change nothing.
    mass = np.abs(kernel).max(axis=0) + np.abs(kernel).max(axis=1)
    mass = np.maximum(mass, mass[::-1])  # a motion kernel is not symmetric
    margin = int(np.argmax(mass > 1e-6 * mass[middle]))
    kernel = kernel[margin : len(kernel) - margin, margin : len(kernel) - margin].astype(np.float32)
    row = kernel.sum(axis=0)
    if np.abs(np.outer(row, row) - kernel).max() < 1e-6 * kernel.max():  # an isotropic Gaussian: two cheap passes
        return cv2.sepFilter2D(image, -1, row, row)  # type: ignore[return-value]
    return cv2.filter2D(image, -1, kernel)  # type: ignore[return-value]


def _resize(image: Picture, size: tuple[int, int], rng: np.random.Generator) -> Picture:
    how = _FILTERS[int(rng.integers(len(_FILTERS)))]
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=how)  # type: ignore[return-value]


def _random_resize(image: Picture, output: tuple[int, int], stage: StageConfig, rng: np.random.Generator) -> Picture:
    low, high = stage.resize_range
    factor = _uniform(((1.0, high), (low, 1.0), (1.0, 1.0))[_pick(stage.resize_probs, rng)], rng)
    height, width = image.shape[:2] if stage.resize_of == "picture" else output
    return _resize(image, (max(1, round(height * factor)), max(1, round(width * factor))), rng)


def _noise(image: Picture, stage: StageConfig, rng: np.random.Generator) -> Picture:
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


def _to_bytes(image: Picture) -> npt.NDArray[np.uint8]:
    return (np.clip(image, 0.0, 1.0) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _to_floats(image: npt.NDArray[Any]) -> Picture:
    return image.astype(np.float32) / np.float32(255)


def _jpeg(image: Picture, stage: StageConfig, rng: np.random.Generator) -> Picture:
    if rng.random() >= stage.jpeg_prob:
        return image
    quality = int(rng.integers(stage.jpeg_quality[0], stage.jpeg_quality[1] + 1))
    # The codec's first channel is blue.
    _, stream = cv2.imencode(".jpg", _to_bytes(image)[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))
    return _to_floats(np.asarray(cv2.imdecode(stream, cv2.IMREAD_COLOR))[..., ::-1])


def _round(image: Picture, output: tuple[int, int], stage: StageConfig, rng: np.random.Generator) -> Picture:
    if rng.random() < stage.blur_prob:
        image = _blur(image, draw_blur_kernel(stage, rng))
    image = _random_resize(image, output, stage, rng)
    return _noise(image, stage, rng) if rng.random() < stage.noise_prob else image


def _covered(image: Picture, bounds: Range, rng: np.random.Generator) -> Picture:
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


def degrade(image: Picture, config: DegradationConfig, rng: np.random.Generator) -> Picture:
    """The low-resolution picture [H/scale, W/scale, 3] of `image`; float32, every value k/255 with k whole.

    `image` is float32 [H, W, 3], RGB in [0, 1], H and W multiples of `config.scale`; it is not changed. The result
    depends on the picture, the configuration and the state of `rng` alone.
    Raises IcmsrError for another shape or type. Source: Real-ESRGAN section 3; presets and options as named in the
    configuration.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
        raise IcmsrError(f"image must be float32 [H, W, 3], got {image.dtype} {list(image.shape)}: convert it first")
    height, width = image.shape[:2]
    if height % config.scale or width % config.scale or not height or not width:
        raise IcmsrError(
            f"image sides must be multiples of the scale {config.scale}, got {height}x{width} (height x width): crop it"
        )
    output = (height // config.scale, width // config.scale)
    last = config.first
    low = _round(image, output, config.first, rng)
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
    return _to_floats(_to_bytes(low))


def restore_size(low: Picture, size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """`low` [h, w, 3] brought back to `size` = (H, W) with a random filter, clamped and rounded to 8 bits.

    Float32 RGB in [0, 1], values k/255. The generator's input has the size of its output (as in OSEDiff).
    Raises IcmsrError when a side of `size` is below 1.
    """
    if min(size) < 1:
        raise IcmsrError(f"size must be (height, width) of at least 1, got {size}")
    return _to_floats(_to_bytes(_resize(low, (size[0], size[1]), rng)))
