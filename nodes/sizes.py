"""Inputs of a node for the size of the result, beside a factor: flat ones, of which 0 means not given."""

from __future__ import annotations

from typing import TypedDict

from comfy_api.latest import io

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.upscale.framing import FITS, MAX_SCALE
from ..icmsr_core.upscale.settings import UpscaleSettings

LARGEST_SIDE = 65536
"""Most pixels of a side that the inputs take."""


class SizeSettings(TypedDict):
    """The settings of `UpscaleSettings` for the size of the result."""

    size: tuple[int, int] | None
    longest: int | None
    shortest: int | None
    megapixels: float | None
    fit: str


def size_inputs() -> list[io.Input]:
    """The optional inputs; `size_settings` takes their values, in this order."""

    def side(name: str, tooltip: str) -> io.Input:
        return io.Int.Input(name, default=0, min=0, max=LARGEST_SIDE, optional=True, tooltip=tooltip, advanced=True)

    return [
        side(
            "longest",
            "Instead of scale: the longest side of the result in pixels, with the aspect of your image. 0: not used. "
            f"More than {MAX_SCALE:g} times, and smaller than the image, is reached by resizing.",
        ),
        side("shortest", "Instead of scale: the shortest side of the result in pixels. 0: not used."),
        io.Float.Input(
            "megapixels",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=0.1,
            optional=True,
            tooltip="Instead of scale: the pixels of the result, where 1 is 1024 x 1024 as in ComfyUI. 0: not used.",
            advanced=True,
        ),
        side("width", "Instead of scale, with height: the exact size of the result. 0: not used."),
        side("height", "Instead of scale, with width: the exact size of the result. 0: not used."),
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default=UpscaleSettings.fit,
            optional=True,
            tooltip=(
                "For width and height, when your image has another aspect. stretch: it is stretched. crop: its middle "
                "is used. pad: all of it, with black bars."
            ),
            advanced=True,
        ),
    ]


def size_settings(longest: int, shortest: int, megapixels: float, width: int, height: int, fit: str) -> SizeSettings:
    """The values of `size_inputs` as settings. Raises `IcmsrError` when only one of `width` and `height` is given."""
    if bool(width) != bool(height):
        given, missing = ("width", "height") if width else ("height", "width")
        raise IcmsrError(
            f"{given} is {width or height} but {missing} is 0: an exact size takes both; for one side with the aspect "
            "kept use longest or shortest"
        )
    return {
        "size": (width, height) if width else None,
        "longest": longest or None,
        "shortest": shortest or None,
        "megapixels": megapixels or None,
        "fit": fit,
    }
