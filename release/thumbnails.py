"""The pictures of the templates: crops before (bicubic) and after (nano), beside each other, as JPEG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from icmsr_core.conditions import canny_edges, colormap
from icmsr_core.pictures.channels import as_rgb
from icmsr_core.pictures.files import from_tensor, read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import demo_picture, embedded_generator
from icmsr_core.whole_file import replace_file

SIZE = (480, 320)
"""Width and height of a thumbnail."""
SCALE = 4
MOST_BYTES = 100_000
PAPER, INK = (24, 24, 28), (255, 255, 255)

Picture = npt.NDArray[np.float32]
"""[H, W, 3] in [0, 1]."""


@dataclass(frozen=True)
class Crop:
    """A part of a free picture, reduced before it is upscaled."""

    source: str
    """``demo``, the bundled photograph, or a picture of skimage.data."""
    corner: tuple[int, int]
    """Left and upper edge in the reduced picture."""
    reduce: int = 1
    """The picture is made so many times smaller first."""


@dataclass(frozen=True)
class Thumbnail:
    """What a template's picture shows: each crop before and after, in as many columns."""

    crops: tuple[Crop, ...]
    columns: int = 1
    caption: str = ""


CUP, CAT = Crop("demo", (150, 20)), Crop("chelsea", (42, 12), 2)
FACE, BIKE = Crop("astronaut", (82, 16), 2), Crop("stereo_motorcycle", (190, 60), 2)
THUMBNAILS = {
    "upscale": Thumbnail((BIKE,)),
    "upscale.app": Thumbnail((BIKE,), caption="as an app"),
    "sizes_and_megapixels": Thumbnail((FACE,), caption="2 megapixels, 1920 x 1080, longest side 1536"),
    "folder": Thumbnail((CUP, CAT, FACE, BIKE), columns=2, caption="a folder of pictures"),
    "video": Thumbnail((CAT, Crop("chelsea", (46, 14), 2)), columns=2, caption="video, frame by frame"),
    "own_generator": Thumbnail((CAT,), caption="a generator of your own"),
    "after_text_to_image": Thumbnail((CUP,), caption="after Stable Diffusion"),
}


def small_picture(crop: Crop, width: int, height: int) -> Picture:
    """The crop before it is upscaled, `width` x `height` pixels."""
    whole: Any
    if crop.source == "demo":
        whole = read_picture(demo_picture()).rgb
    else:
        import skimage.data

        loaded = getattr(skimage.data, crop.source)()
        array = loaded[0] if isinstance(loaded, tuple) else loaded
        whole = np.asarray(array, np.float32)[..., :3] / np.float32(255)
    if crop.reduce > 1:
        full_height, full_width = whole.shape[:2]
        size = full_width // crop.reduce, full_height // crop.reduce
        whole = np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), np.float32)
    left, top = crop.corner
    part = whole[top : top + height, left : left + width]
    if part.shape[:2] != (height, width):
        raise ValueError(f"{crop} does not hold {width} x {height} pixels")
    return np.ascontiguousarray(part)


class Nano:
    """The embedded model."""

    def __init__(self) -> None:
        silence_diffusers()
        self._backbone = load_backbone(Recipe(generator=embedded_generator()))

    def before_and_after(self, crop: Crop, width: int, height: int) -> tuple[Picture, Picture]:
        """The crop by bicubic and by nano, both `width` x `height` pixels."""
        small = to_tensor(small_picture(crop, width // SCALE, height // SCALE))
        before = resize(small, height, width).clamp(0, 1)
        return from_tensor(before), from_tensor(upscale(self._backbone, small))


def split(before: Picture, after: Picture) -> Image.Image:
    """The left half before, the right half after, with a line between them."""
    middle = before.shape[1] // 2
    return _divided(np.concatenate([before[:, :middle], after[:, middle:]], axis=1))


def beside(before: Picture, after: Picture) -> Image.Image:
    """The same crop twice, with a line between and a word on each."""
    image = _divided(np.concatenate([before, after], axis=1))
    _label(image, "bicubic", (8, 8))
    _label(image, "ICM-SR", (before.shape[1] + 10, 8))
    return image


def _divided(picture: Picture) -> Image.Image:
    image = as_image(picture)
    ImageDraw.Draw(image).line([(image.width // 2, 0), (image.width // 2, image.height)], INK, 2)
    return image


def as_image(picture: Picture) -> Image.Image:
    """The picture in 8 bits."""
    return Image.fromarray(np.rint(picture * 255).clip(0, 255).astype(np.uint8))


def drawn(thumbnail: Thumbnail, nano: Nano) -> Image.Image:
    """The thumbnail, `SIZE`."""
    if len(thumbnail.crops) == 1:
        sheet = beside(*nano.before_and_after(thumbnail.crops[0], SIZE[0] // 2, SIZE[1]))
    else:
        rows = len(thumbnail.crops) // thumbnail.columns
        width, height = SIZE[0] // thumbnail.columns, SIZE[1] // rows
        parts = [split(*nano.before_and_after(crop, width, height)) for crop in thumbnail.crops]
        sheet = _grid(parts, thumbnail.columns)
    return _captioned(sheet, thumbnail.caption)


def region_thumbnail(nano: Nano) -> Image.Image:
    """A picture that is upscaled only inside of an oval."""
    before, after = nano.before_and_after(Crop("astronaut", (56, 16), 2), *SIZE)
    oval = (150, 20, 370, 310)
    mask = Image.new("L", SIZE, 0)
    ImageDraw.Draw(mask).ellipse(oval, 255)
    sheet = Image.composite(as_image(after), as_image(before), mask)
    ImageDraw.Draw(sheet).ellipse(oval, outline=INK, width=2)
    _label(sheet, "bicubic", (8, 8))
    _label(sheet, "ICM-SR", (226, 30))
    return _captioned(sheet, "only where the mask says")


def conditions_thumbnail() -> Image.Image:
    """A picture, its colormap and its edges."""
    width, height = SIZE[0] // 3, SIZE[1]
    picture = to_tensor(small_picture(Crop("astronaut", (130, 0)), width, height))
    edges = as_rgb(canny_edges(picture, 60.0, 160.0))
    parts = [as_image(from_tensor(one)) for one in (picture, colormap(picture), edges)]
    return _captioned(_grid(parts, 3), "picture, colormap, edges")


def write(path: Path, picture: Image.Image) -> None:
    """Writes a JPEG of at most `MOST_BYTES`, of the best quality that allows it."""
    for quality in range(92, 40, -4):
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MOST_BYTES:
            replace_file(path, buffer.getvalue())
            return
    raise ValueError(f"{path.name}: more than {MOST_BYTES} bytes")


def _grid(parts: Sequence[Image.Image], columns: int) -> Image.Image:
    rows = len(parts) // columns
    sheet = Image.new("RGB", SIZE, PAPER)
    for index, part in enumerate(parts):
        column, row = index % columns, index // columns
        sheet.paste(part, (column * SIZE[0] // columns, row * SIZE[1] // rows))
    return sheet


def _captioned(image: Image.Image, caption: str) -> Image.Image:
    if caption:
        _label(image, caption, (8, image.height - 30))
    return image


def _label(image: Image.Image, text: str, corner: tuple[int, int]) -> None:
    """White text on a dark plate, its left upper corner at `corner`."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    left, top, right, bottom = draw.textbbox((corner[0] + 6, corner[1] + 3), text, font=font)
    draw.rectangle((left - 6, top - 4, right + 6, bottom + 4), fill=PAPER)
    draw.text((corner[0] + 6, corner[1] + 3), text, fill=INK, font=font)
