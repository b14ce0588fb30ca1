"""The blurs of the synthetic camera (`degradation.py`) as kernels: Gaussians, plateaus, a sinc, a moving camera."""

import math

import numpy as np
import numpy.typing as npt
import torch

from ...errors import IcmsrError

Kernel = npt.NDArray[np.float64]


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
    kernel: Kernel = np.zeros((size + 1, size + 1))  # the extra row and column get nothing but rounding
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
