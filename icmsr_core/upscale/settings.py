"""How a picture is upscaled: the settings, their defaults and their limits. For the library, the command and the nodes.

Needs no torch, so that the command line can show its help and refuse a wrong value at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import inf

from ..backbone.recommended import Recommended
from ..errors import IcmsrError
from .framing import (
    FITS,
    MAX_SCALE,
    MIN_SCALE,
    Framing,
    at_least,
    exact_frame,
    megapixel_frame,
    scaled_frame,
    side_frame,
)

TILE_MULTIPLE = 64
"""Tiles are multiples of this many pixels in every family, so that a workflow carries over between them."""
RESIZES = ("antialiased", "bicubic")
"""Kernels that enlarge the input: bicubic as Pillow's (a = -0.5, antialiased, clamped), or as torch's (a = -0.75)."""
COLOR_FIXES = ("wavelet", "adain", "none")
LARGEST_SMALLEST = 1024
"""Most pixels that `UpscaleSettings.smallest` can be."""
TILING = frozenset({"tile", "overlap"})
VAE_MODES = ("auto", "exact", "bounded")


@dataclass(frozen=True)
class UpscaleSettings:
    """How a picture is upscaled. Raises `IcmsrError` for values outside of the limits, when it is made."""

    scale: float = 4.0
    """Size of the result over size of the input, 1 to 8; ignored when `size` or another wish for a size is given."""
    size: tuple[int, int] | None = None
    """Exact (width, height) of the result in pixels; `fit` says what becomes of another aspect."""
    tile: int = 512
    """Largest tile of the UNet in pixels of the result, a multiple of 64, and the area of the VAE's stripes; 0 for the
    whole picture at once."""
    overlap: int = 128
    """Least overlap of neighbouring tiles in pixels of the result, at most half of the tile."""
    batch: int = 1
    """Tiles that run through the UNet together."""
    color_fix: str = "wavelet"
    """Colour correction against the input: wavelet, adain or none."""
    vae: str = "auto"
    """exact (as if the VAE saw the whole picture at once), bounded (its memory is set by the tile), or auto: exact up
    to the area of 2048 x 2048 pixels. Command line and node make auto bounded also where exact does not fit."""
    longest: int | None = None
    """Pixels of the result's longest side. At most one of `size`, `longest`, `shortest` and `megapixels` is given; the
    last three keep the aspect. A factor that the model does not do is reached by resizing (`framing.Framing`)."""
    shortest: int | None = None
    """Pixels of the result's shortest side."""
    megapixels: float | None = None
    """Pixels of the result in units of 1024 x 1024, as ComfyUI counts them."""
    fit: str = "stretch"
    """How a picture of another aspect gets an exact `size`: stretch, crop (around its middle) or pad (black bars)."""
    smallest: int = 0
    """Least shorter side, in pixels, that the networks work in; a smaller result is made at that and resized."""
    resize: str = "antialiased"
    """Kernel that enlarges the input, one of `RESIZES`."""

    def __post_init__(self) -> None:
        self._check_size()
        if not MIN_SCALE <= self.scale <= MAX_SCALE:
            raise IcmsrError(f"scale must be between {MIN_SCALE:g} and {MAX_SCALE:g}, got {self.scale:g}")
        if self.tile % TILE_MULTIPLE or self.tile < 0:
            nearest = max(TILE_MULTIPLE, round(self.tile / TILE_MULTIPLE) * TILE_MULTIPLE)
            raise IcmsrError(f"tile must be a multiple of {TILE_MULTIPLE}, got {self.tile}: try {nearest}")
        if self.overlap < 0 or (self.tile and 2 * self.overlap > self.tile):
            raise IcmsrError(
                f"overlap must be between 0 and half of the tile ({self.tile // 2}), got {self.overlap}: "
                f"try {self.tile // 4}"
            )
        if self.batch < 1:
            raise IcmsrError(f"batch must be at least 1, got {self.batch}")
        if self.color_fix not in COLOR_FIXES:
            raise IcmsrError(f"color_fix must be one of {', '.join(COLOR_FIXES)}, got {self.color_fix!r}")
        if not 0 <= self.smallest <= LARGEST_SMALLEST:
            raise IcmsrError(f"smallest must be between 0 and {LARGEST_SMALLEST} pixels, got {self.smallest}")
        if self.resize not in RESIZES:
            raise IcmsrError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.vae not in VAE_MODES:
            raise IcmsrError(f"vae must be one of {', '.join(VAE_MODES)}, got {self.vae!r}")

    def _check_size(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise IcmsrError(f"size must be width x height of at least 1x1, got {self.size}")
        sides = {"longest": self.longest, "shortest": self.shortest}
        for name, pixels in sides.items():
            if pixels is not None and pixels < 1:
                raise IcmsrError(f"{name} must be at least 1 pixel, got {pixels}")
        if self.megapixels is not None and not 0 < self.megapixels < inf:
            raise IcmsrError(f"megapixels must be above 0, got {self.megapixels:g}")
        wishes = {"size": self.size, **sides, "megapixels": self.megapixels}
        given = [f"{name} {value}" for name, value in wishes.items() if value is not None]
        if len(given) > 1:
            raise IcmsrError(
                f"only one of {', '.join(wishes)} can be given, got {' and '.join(given)}: leave out the rest"
            )
        if self.fit not in FITS:
            raise IcmsrError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")

    def frame(self, height: int, width: int) -> Framing:
        """How an input of `height` x `width` pixels becomes its result, and how large that is."""
        return at_least(self._frame(height, width), self.smallest)

    def following(self, recommended: Recommended, told: Collection[str]) -> UpscaleSettings:
        """These settings with the recommended ones in place of those that a user did not choose (`told` names them).

        Tile and overlap belong together: a choice of one keeps both. Raises `IcmsrError` for a recommendation that is
        beyond the limits.
        """
        chosen = {*told, *(TILING if not TILING.isdisjoint(told) else ())}
        return replace(self, **{name: value for name, value in recommended.values().items() if name not in chosen})

    def _frame(self, height: int, width: int) -> Framing:
        source = height, width
        if self.size is not None:
            return exact_frame(source, (self.size[1], self.size[0]), self.fit)
        if self.longest is not None:
            return side_frame(source, self.longest, True)
        if self.shortest is not None:
            return side_frame(source, self.shortest, False)
        if self.megapixels is not None:
            return megapixel_frame(source, self.megapixels)
        return scaled_frame(source, self.scale)
