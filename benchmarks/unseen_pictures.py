"""Writes small damaged pictures of kinds that nobody tuned on, and their truths: OUT/lr and OUT/hr, of the same names.

    python benchmarks/unseen_pictures.py OUT
    icmsr upscale OUT/lr OUT/nano
    icmsr evaluate --sr OUT/nano --hr OUT/hr --lq OUT/lr --metrics psnr,ssim,hf,fsim,dss,srsim

Faces, fur, brick, grass, gravel, night noise, heavy JPEG and a machine, from the free pictures that come with
scikit-image (extra `test`), and lettering that is drawn here. The same every time. OUT must not be there yet.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data
from _command_line import run_benchmark
from numpy.typing import NDArray

from icmsr_core.pictures.files import Picture, write_picture
from icmsr_core.train.data.degradation import degrade
from icmsr_core.train.data.presets import PRESETS

Image = NDArray[np.float32]
"""[H, W, 3] in [0, 1]."""
SIDE, SCALE = 512, 4
TEXT = "Sphinx of black quartz, judge my vow."
NOISE, QUALITY = 15 / 255, 20
"""Standard deviation of the night's noise; the quality of the heavy JPEG."""


def cut(picture: Any, left: int = 0, top: int = 0) -> Image:
    """At most SIDE x SIDE pixels of an 8-bit picture from a corner on, in whole multiples of SCALE."""
    colours = np.asarray(picture if picture.ndim == 3 else np.dstack([picture] * 3))[..., :3]
    part = colours[top : top + SIDE, left : left + SIDE].astype(np.float32) / np.float32(255)
    height, width = (length // SCALE * SCALE for length in part.shape[:2])
    return np.ascontiguousarray(part[:height, :width])


def lettering() -> Image:
    """Lines of the same words, from large to small, on paper."""
    paper, bottom = np.full((256, SIDE, 3), 235, np.uint8), 0
    for size in (0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3):
        bottom += round(44 * size) + 8
        cv2.putText(paper, TEXT, (10, bottom), cv2.FONT_HERSHEY_COMPLEX, size, (25, 25, 40), 1, cv2.LINE_AA)
    return cut(paper)


def preset(name: str) -> Callable[[Image, int], Image]:
    """The degradation of that name."""

    def damage(picture: Image, seed: int) -> Image:
        low = degrade(np.rint(picture * 255).astype(np.uint8), PRESETS[name], np.random.default_rng(seed))
        return low.astype(np.float32) / np.float32(255)

    return damage


def reduced(picture: Image) -> Image:
    """A SCALE-th of the size."""
    height, width = picture.shape[:2]
    return np.asarray(cv2.resize(picture, (width // SCALE, height // SCALE), interpolation=cv2.INTER_AREA))


def night(picture: Image, seed: int) -> Image:
    """Reduced, with noise."""
    small = reduced(picture)
    return np.clip(small + np.random.default_rng(seed).normal(0, NOISE, small.shape), 0, 1).astype(np.float32)


def heavy_jpeg(picture: Image, seed: int) -> Image:
    """Reduced and kept as a JPEG of QUALITY."""
    small = (reduced(picture)[..., ::-1] * 255).round().astype(np.uint8)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1].astype(np.float32) / np.float32(255)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pairs and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    out: Path = parser.parse_args(arguments).out
    if out.exists():
        parser.error(f"{out} is there already: name another folder")
    data, light = skimage.data, preset("light")
    pairs: dict[str, tuple[Image, Callable[[Image, int], Image]]] = {
        "face": (cut(data.astronaut()), light),
        "face, realesrgan": (cut(data.astronaut()), preset("realesrgan")),
        "fur": (cut(data.chelsea()), light),
        "brick": (cut(data.brick()), light),
        "grass": (cut(data.grass()), light),
        "gravel": (cut(data.gravel()), light),
        "lettering": (lettering(), light),
        "machine": (cut(data.stereo_motorcycle()[0], left=120), light),
        "night": (cut(data.rocket(), left=60), night),
        "heavy JPEG": (cut(data.coffee(), left=60), heavy_jpeg),
    }
    for seed, (name, (truth, damage)) in enumerate(pairs.items()):
        for part, picture in (("hr", truth), ("lr", damage(truth, seed))):
            (out / part).mkdir(parents=True, exist_ok=True)
            write_picture(out / part / f"{name}.png", Picture(rgb=picture))
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
