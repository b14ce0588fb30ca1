"""Training pairs: a sharp crop and the poor picture that a degradation has made of it.

Sample number i of a run depends on the seed and on i alone: not on the number of workers or processes, not on what is
in memory, and not on where a run was stopped and taken up again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ...errors import IcmsrError
from .data_config import DataConfig, find_photographs
from .degradation import degrade
from .presets import PRESETS, DegradationConfig
from .samples import Samples
from .sources import Photographs, PictureCache, Pixels, read_photograph
from .synthetic import synthetic_picture

_ATTEMPTS = 20  # photographs drawn for one sample before giving up
_NAMED = 4  # unreadable photographs that one sample can name
_SOFTENING = 0.4  # standard deviation of the blur after enlarging, in pixels of the smaller picture


@dataclass
class _Met:
    """What drawing one sample came across."""

    unreadable: list[int] = field(default_factory=list)
    small: int = 0


class TrainingPairs(Samples):
    """Samples by number. Each is a dict of tensors:

    - ``sharp`` uint8 [3, crop, crop] RGB, and, with `degraded`, ``low`` uint8 [3, crop / scale, crop / scale];
    - ``index`` int64 [], the sample's number;
    - ``caption`` int64 [], its place in `captions`; 0, the empty string, for made-up and uncaptioned pictures;
    - ``events`` int64 [2], how often an unreadable and a small photograph were met while it was drawn;
    - ``unreadable`` int64 [4], the numbers of the first unreadable ones, then -1 (`Tally` makes names of them).

    With `held_out`, photographs of the held-out share alone, and no made-up pictures; otherwise all others.
    Raises IcmsrError for sources that are missing or malformed, and where nothing is in the wanted half. Taking a
    sample raises it when 20 photographs in a row cannot be used.
    """

    def __init__(self, config: DataConfig, seed: int, degraded: bool = True, held_out: bool = False) -> None:
        if held_out and not config.hold_out > 0:
            raise IcmsrError("data.hold_out is 0, so no photograph is held out: set a share such as 0.02")
        if held_out and config.synthetic >= 1:
            raise IcmsrError("data.synthetic is 1, so there are no photographs to hold out: lower it")
        self.config, self.seed, self.degraded = config, seed, degraded
        self._synthetic = 0.0 if held_out else config.synthetic
        self._sources = find_photographs(config, held_out) if config.synthetic < 1 else None
        self.photographs = self._sources.paths if self._sources else []
        self.captions: tuple[str, ...] = self._sources.captions if self._sources else ("",)
        weights = np.asarray(config.degradation_weights, dtype=np.float64)
        self._weights = weights / weights.sum()
        self._presets: list[DegradationConfig] = [PRESETS[name] for name in config.degradations]
        self._cache = PictureCache(config.cache_mb << 20)
        self._unreadable: set[int] = set()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        met, caption = _Met(), 0
        if rng.random() < self._synthetic or self._sources is None:
            sharp = synthetic_picture(self.config.crop, rng)
        else:
            number, sharp = self._photograph_crop(self._sources, rng, met)
            caption = self._sources.caption(number)
        sharp = np.rot90(sharp, int(rng.integers(4)))
        if rng.random() < 0.5:
            sharp = sharp[:, ::-1]
        sharp = np.ascontiguousarray(sharp)
        sample = {
            "sharp": _tensor(sharp),
            "index": torch.tensor(index),
            "caption": torch.tensor(caption),
            "events": torch.tensor([len(met.unreadable), met.small]),
            "unreadable": torch.tensor([*met.unreadable, *[-1] * _NAMED][:_NAMED]),
        }
        if self.degraded:
            preset = self._presets[int(rng.choice(len(self._presets), p=self._weights))]
            sample["low"] = _tensor(degrade(sharp, preset, rng))
        return sample

    def blank(self) -> dict[str, Tensor]:
        """See `Samples`."""
        crop, scale = self.config.crop, self.config.scale
        return {
            "sharp": torch.full((3, crop, crop), 127, dtype=torch.uint8),
            "low": torch.full((3, crop // scale, crop // scale), 127, dtype=torch.uint8),
            "index": torch.tensor(0),
            "caption": torch.tensor(0),
        }

    def _photograph_crop(self, sources: Photographs, rng: np.random.Generator, met: _Met) -> tuple[int, Pixels]:
        """The number of a random photograph and a random crop of it."""
        crop = self.config.crop
        for _ in range(_ATTEMPTS):
            number = sources.draw(rng)
            picture = self._read(number)
            if picture is None:
                met.unreadable.append(number)
                continue
            size = picture.shape[:2]
            room = min(size) / crop
            if room < 1:
                met.small += 1
                if self.config.small == "skip":
                    continue
                # The square is cut out first: a long strip, enlarged whole, could fill the memory.
                side = min(size)
                top, left = (int(rng.integers(length - side + 1)) for length in size)
                square = picture[top : top + side, left : left + side]
                return number, _enlarged(square, crop)
            factor = self._factor(room, rng)
            height, width = (max(crop, round(length / factor)) for length in size)
            # Crop before resizing: the same pixels at a fraction of the work.
            top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
            y0, y1 = (int(edge * size[0] / height) for edge in (top, top + crop))
            x0, x1 = (int(edge * size[1] / width) for edge in (left, left + crop))
            resized = _reduced if factor >= 1 else _enlarged
            return number, resized(picture[y0:y1, x0:x1], crop)
        raise IcmsrError(
            f"{_ATTEMPTS} photographs in a row cannot be used: {met.small} are smaller than {crop} px and "
            f"{len(met.unreadable)} unreadable, the last one {self.photographs[number]}: set a smaller data.crop, "
            "set data.small to upscale, or sort them out"
        )

    def _factor(self, room: float, rng: np.random.Generator) -> float:
        """A random factor by which a photograph of `room` crops is shrunk; below 1 it is enlarged."""
        enlarge, shrink = self.config.enlarge, min(self.config.shrink, room)
        if enlarge == 1:
            return float(rng.uniform(1.0, shrink))
        return math.exp(rng.uniform(-math.log(enlarge), math.log(shrink)))

    def _read(self, number: int) -> Pixels | None:
        """Photograph `number` as uint8 [H, W, 3], or None if it cannot be read; each such file is tried once."""
        if number not in self._unreadable:
            try:
                return self._cache.get(number, lambda: read_photograph(self.photographs[number]))
            except IcmsrError:
                self._unreadable.add(number)  # `Tally` says so, once, in the main process
        return None


def _reduced(picture: Pixels, side: int) -> Pixels:
    return np.asarray(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _enlarged(picture: Pixels, side: int) -> Pixels:
    """The picture, larger, without halos: cubic and Lanczos kernels overshoot at edges, and a generator learns it.

    A triangle and a narrow Gaussian, nearly a cubic B-spline: nowhere negative, so no value leaves its neighbours'
    range.
    """
    wide = cv2.resize(picture.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    sigma = _SOFTENING * side / min(picture.shape[:2])
    return np.asarray(np.rint(cv2.GaussianBlur(wide, (0, 0), sigma)), dtype=np.uint8)


def _tensor(picture: Pixels) -> Tensor:
    return rearrange(torch.from_numpy(picture), "h w c -> c h w").contiguous()
