"""What the synthetic camera (`degradation.py`) does: the settings of a round, of the whole, and the named ones.

Numbers are Real-ESRGAN's (Wang et al. 2021, arXiv 2107.10833) where a field's text does not say otherwise.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from ...errors import IcmsrError

Range = tuple[float, float]

KERNEL_KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")


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
    """Probability that a blur other than a sinc is the trace of a moving camera (`motion_kernel`) in place of one of
    the six shapes (ours; Real-ESRGAN has none)."""
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
    sharpen_prob: float = 0.0
    """Probability of the sharpening that cameras apply (ours; Real-ESRGAN has none), an unsharp mask after noise."""
    sharpen_amount: Range = (0.0, 1.0)
    """How much of what its Gaussian removes the mask adds."""
    sharpen_sigma: Range = (0.6, 1.5)
    """Standard deviation of the mask's Gaussian in pixels of the resized picture."""
    jpeg_prob: float = 1.0
    """Probability of JPEG compression."""
    jpeg_quality: tuple[int, int] = (30, 95)
    """Lowest and highest JPEG quality."""

    def __post_init__(self) -> None:
        for name in (
            "blur_prob",
            "sinc_prob",
            "motion_prob",
            "noise_prob",
            "gaussian_prob",
            "gray_prob",
            "sharpen_prob",
            "jpeg_prob",
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
        _check_range("sharpen_amount", self.sharpen_amount, 0.0, 10.0)
        _check_range("sharpen_sigma", self.sharpen_sigma, 0.05, 20.0)
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


def _one_shrinking_round(**stage: Any) -> DegradationConfig:
    """One round without sinc filters that resizes once, to the size of the output; `stage` sets the rest of it."""
    first = StageConfig(kernel_size=(21, 21), sinc_prob=0.0, resize_probs=(0.0, 0.0, 1.0), resize_of="output", **stage)
    return DegradationConfig(first=first, second_stage_prob=0.0, final_sinc_prob=0.0)


_CAMERA: dict[str, Any] = {
    "kernel_probs": (0.7, 0.3, 0.0, 0.0, 0.0, 0.0),
    "noise_prob": 0.7,
    "gaussian_prob": 0.5,
    "jpeg_prob": 0.3,
    "jpeg_quality": (85, 100),
}
"""What `camera` and `lens` have in common."""
PRESETS: dict[str, DegradationConfig] = {
    "realesrgan": DegradationConfig(),
    "light": _one_shrinking_round(
        kernel_probs=(0.8, 0.2, 0.0, 0.0, 0.0, 0.0),
        noise_prob=2 / 3,
        gaussian_prob=1.0,
        gaussian_sigma=(0.0, 12.0),
        jpeg_prob=0.75,
        jpeg_quality=(40, 95),
    ),
    "camera": _one_shrinking_round(gaussian_sigma=(0.0, 3.0), poisson_scale=(0.0, 0.1), **_CAMERA),
    "lens": _one_shrinking_round(
        sigma=(2.0, 4.0),
        gaussian_sigma=(0.0, 2.0),
        poisson_scale=(0.0, 0.05),
        sharpen_prob=0.9,
        sharpen_amount=(0.3, 1.9),
        sharpen_sigma=(0.8, 1.5),
        **_CAMERA,
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
1/255 or Poisson noise of at most 1.2 at mid-grey, and JPEG at quality 85 to 100 on a third. `lens` (ours) is the same
with less noise, always a visible blur, and mostly the sharpening that cameras apply: of originals that are enlarged
(`DataConfig.enlarge`), its inputs keep as much as RealSR's do of each frequency up to .2 cycles a pixel
(`benchmarks/pair_spectra.py`).

Other tasks at the same size (ours): `jpeg` compresses at quality 5 to 40. `denoise` adds Gaussian noise of 10 to 50 in
1/255, or Poisson noise of 10 to 35 at mid-grey (up to twice that in a picture of few grey levels). `deblur` blurs with
a Gaussian (round or not) or a motion kernel, and adds noise of at most 4 in 1/255. `inpaint` covers 5 to 40% of the
area with mid-grey and leaves the rest as it is."""
