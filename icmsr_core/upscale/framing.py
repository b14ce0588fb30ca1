"""Sizes as people think of them: what of a picture is used, the size that the model works in, and the result's size.

Needs no torch. Sizes are (height, width) in pixels. Source: ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

MIN_SCALE, MAX_SCALE = 1.0, 8.0
"""What the model does: a result is at least as large as its input, and at most this many times as wide and high."""
MEGAPIXEL = 1024 * 1024
"""Pixels of a megapixel, as ComfyUI's own nodes count them."""
FITS = ("stretch", "crop", "pad")
"""How a picture of another aspect gets an exact size."""


class Area(NamedTuple):
    """A part of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Remark(NamedTuple):
    """Something special about a size."""

    kind: str
    """What it is, the same for all pictures."""
    detail: str
    """What it means for this one."""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})"


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a result: `crop` is worked at `work`, resized to `scaled`, and put into `target`."""

    source: tuple[int, int]
    """Size of the picture."""
    crop: Area
    """The part of it that is used."""
    work: tuple[int, int]
    """Size that the model makes of that part: at most `MAX_SCALE` times as wide and high, but for `at_least`."""
    scaled: tuple[int, int]
    """Size to which the model's result is resized, mostly `work` itself."""
    target: tuple[int, int]
    """Size of the result: `scaled`, cut off or with black bars on both sides."""

    def crop_in(self, height: int, width: int) -> Area:
        """`crop` in a map of `height` x `width` samples that covers the same picture, such as a mask."""
        rows, columns = height / self.source[0], width / self.source[1]
        top, left = (
            min(int(at), most - 1) for at, most in ((self.crop.top * rows, height), (self.crop.left * columns, width))
        )
        bottom = math.ceil((self.crop.top + self.crop.height) * rows - 1e-6)
        right = math.ceil((self.crop.left + self.crop.width) * columns - 1e-6)
        return Area(top, left, max(1, min(bottom, height) - top), max(1, min(right, width) - left))

    def remarks(self) -> list[Remark]:
        """What a user should know beside the two sizes; most pictures have nothing of that."""
        found = []
        taken = self.crop.height, self.crop.width
        if any(work < own for work, own in zip(self.work, taken)):
            found.append(Remark("smaller than the picture", f"resized to {_words(self.work)} before the model"))
        if self.work > self.scaled:
            found.append(
                Remark("smaller than the model works", f"made at {_words(self.work)}, resized to {_words(self.scaled)}")
            )
        elif self.work != self.scaled:
            found.append(
                Remark(
                    f"more than {MAX_SCALE:g} times as large",
                    f"the model makes {_words(self.work)}, which is resized to {_words(self.scaled)}",
                )
            )
        rows, columns = (scaled / own for scaled, own in zip(self.scaled, taken))
        # What rounding to whole pixels makes of an aspect is not worth a word.
        if abs(self.scaled[1] - rows * taken[1]) > 1 and abs(columns / rows - 1) > 0.01:
            found.append(Remark("stretched", f"{columns / rows:.2f} times as wide for the height as the picture"))
        if self.scaled[0] > self.target[0] or self.scaled[1] > self.target[1] or taken != self.source:
            found.append(Remark("cropped", f"the picture's middle, of its {_words(self.source)}"))
        if self.scaled[0] < self.target[0] or self.scaled[1] < self.target[1]:
            found.append(Remark("padded", f"black bars around {_words(self.scaled)}"))
        return found

    def words(self) -> str:
        """Both sizes as width x height."""
        return f"{_words(self.source)} to {_words(self.target)} pixels"


def scaled_frame(source: tuple[int, int], factor: float) -> Framing:
    """The whole picture, `factor` times as wide and high, rounded to whole pixels."""
    height, width = source
    return _whole(source, (_pixels(height * factor), _pixels(width * factor)))


def side_frame(source: tuple[int, int], pixels: int, longest: bool) -> Framing:
    """The whole picture with its longest side, or else its shortest, `pixels` long; the aspect is kept."""
    side = max(source) if longest else min(source)
    return _whole(source, (_pixels(source[0] * pixels / side), _pixels(source[1] * pixels / side)))


def megapixel_frame(source: tuple[int, int], megapixels: float) -> Framing:
    """The whole picture at about `megapixels` times `MEGAPIXEL` pixels; the aspect is kept."""
    return scaled_frame(source, math.sqrt(megapixels * MEGAPIXEL / (source[0] * source[1])))


def exact_frame(source: tuple[int, int], target: tuple[int, int], fit: str) -> Framing:
    """A result of exactly `target`. `fit`: stretch the picture, crop it around its middle, or pad it with black."""
    factors = [goal / own for goal, own in zip(target, source)]
    if fit == "pad":
        factor = min(factors)
        scaled = tuple(min(_pixels(own * factor), goal) for own, goal in zip(source, target))
        return _framed(source, Area(0, 0, *source), (scaled[0], scaled[1]), target)
    if fit == "crop":
        factor = max(factors)
        # Whole pixels of the picture that cover the part, and then, of what becomes of them, the middle.
        starts = [max(0, math.floor((own - goal / factor) / 2 + 1e-6)) for own, goal in zip(source, target)]
        taken = [own - 2 * start for own, start in zip(source, starts)]
        scaled = tuple(max(_pixels(own * factor), goal) for own, goal in zip(taken, target))
        return _framed(source, Area(*starts, *taken), (scaled[0], scaled[1]), target)
    return _whole(source, target)


def at_least(frame: Framing, smallest: int) -> Framing:
    """`frame` with a `work` whose shorter side is not below `smallest`; the aspect is kept."""
    side = min(frame.work)
    if side >= smallest:
        return frame
    height, width = (_pixels(length * smallest / side) for length in frame.work)
    return replace(frame, work=(height, width))


def _whole(source: tuple[int, int], target: tuple[int, int]) -> Framing:
    return _framed(source, Area(0, 0, *source), target, target)


def _framed(source: tuple[int, int], crop: Area, scaled: tuple[int, int], target: tuple[int, int]) -> Framing:
    most = int(MAX_SCALE)
    work = min(scaled[0], most * crop.height), min(scaled[1], most * crop.width)
    return Framing(source, crop, work, scaled, target)


def _pixels(length: float) -> int:
    return max(1, round(length))


def _words(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
