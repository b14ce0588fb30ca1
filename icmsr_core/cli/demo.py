"""`icmsr demo`: runs the embedded model on the bundled photograph and writes a comparison with bicubic."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..backbone.protocol import Backbone
from ..pictures.files import Picture, from_tensor, read_picture, to_tensor, write_picture
from ..pictures.panels import side_by_side
from ..steps import Steps
from ..upscale.plan import UpscalePlan, plan_upscale
from ..upscale.settings import UpscaleSettings
from ..upscale.sizes import resize
from ..weights.embedded import demo_picture
from .job_list import check_writable
from .picture_jobs import UntilItFits


@dataclass(frozen=True)
class DemoResult:
    """Sizes, time and files of the demo."""

    input_size: tuple[int, int]
    """(width, height) of the bundled picture."""
    result_size: tuple[int, int]
    """(width, height) of the result."""
    seconds: float
    """Time of upscaling, without loading the model."""
    files: tuple[Path, ...]
    """Input, result, side by side."""


def run_demo(load: Callable[[], Backbone], folder: Path, steps: Steps | None = None) -> DemoResult:
    """Upscales the bundled photograph and writes three pictures into `folder`; checks it before it calls `load`."""
    check_writable(folder)
    picture = read_picture(demo_picture())
    backbone = load()
    started = time.perf_counter()

    def plan_for(height: int, width: int) -> UpscalePlan:
        return plan_upscale(backbone.descriptor, height, width, UpscaleSettings())

    result = UntilItFits(backbone, plan_for).upscale("the demo", picture, steps)
    seconds = time.perf_counter() - started
    names = ("input.png", "result.png", "side_by_side.png")
    files = tuple(folder / name for name in names)
    bicubic = from_tensor(resize(to_tensor(picture.rgb), *result.rgb.shape[:2]))
    panels = side_by_side({"bicubic x4": bicubic, "ICM-SR nano x4": result.rgb})
    for path, content in zip(files, (picture, result, Picture(rgb=panels))):
        write_picture(path, content)
    sizes = [(image.shape[1], image.shape[0]) for image in (picture.rgb, result.rgb)]
    return DemoResult(sizes[0], sizes[1], seconds, files)
