"""`icmsr demo`: the embedded model on the bundled photograph, and a picture that shows what it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .backbone import Backbone
from .embedded import demo_picture
from .image_io import FloatArray, Picture, from_tensor, read_picture, to_tensor, write_picture
from .one_step import Progress, UpscaleSettings, resize
from .picture_jobs import check_writable, upscale_picture


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    input_size: tuple[int, int]
    """(width, height) of the bundled picture."""
    result_size: tuple[int, int]
    """(width, height) of the result."""
    seconds: float
    """Time of the upscaling alone, the model being loaded."""
    files: tuple[Path, ...]
    """Input, result, side by side."""


def run_demo(load: Callable[[], Backbone], folder: Path, progress: Progress | None = None) -> DemoResult:
    """Upscales the bundled photograph into `folder`, which is checked before `load` is called."""
    check_writable(folder)
    picture = read_picture(demo_picture())
    backbone = load()
    started = time.perf_counter()
    result = upscale_picture(backbone, picture, UpscaleSettings(), progress)
    seconds = time.perf_counter() - started
    names = ("input.png", "result.png", "side_by_side.png")
    files = tuple(folder / name for name in names)
    bicubic = from_tensor(resize(to_tensor(picture.rgb), *result.rgb.shape[:2]))
    panels = side_by_side({"bicubic x4": bicubic, "ICM-SR nano x4": result.rgb})
    for path, content in zip(files, (picture, result, Picture(rgb=panels))):
        write_picture(path, content)
    sizes = [(image.shape[1], image.shape[0]) for image in (picture.rgb, result.rgb)]
    return DemoResult(sizes[0], sizes[1], seconds, files)


def side_by_side(panels: dict[str, FloatArray], gap: int = 8) -> FloatArray:
    """Pictures [H, W, 3] of one height next to each other, each under its label."""
    height = next(iter(panels.values())).shape[0]
    columns: list[FloatArray] = []
    for label, picture in panels.items():
        strip = np.full((32, picture.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, label, (6, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (25, 25, 25), 1, cv2.LINE_AA)
        labelled = np.vstack([strip.astype(np.float32) / 255, picture])
        columns += [np.ones((height + 32, gap, 3), np.float32), labelled]
    return np.ascontiguousarray(np.hstack(columns[1:]).astype(np.float32))
