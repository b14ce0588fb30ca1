"""Labelled sheets of crops from several folders of pictures: a row for each picture, a column for each folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import IcmsrError
from .files import READ_EXTENSIONS, FloatArray, find_pictures, read_picture
from .panels import enlarged

INK = (25, 25, 25)
PAPER = (255, 255, 255)
NARROWEST_LABEL = 8
"""Least width of a label in multiples of the font size, for crops that are narrower."""


@dataclass(frozen=True)
class SheetColumn:
    """A folder of pictures and its heading."""

    title: str
    """The column's heading."""
    folder: Path
    """Where its pictures are; they are found by their file name without extension."""

    @classmethod
    def parse(cls, text: str) -> SheetColumn:
        """The column for ``TITLE=FOLDER``; raises `IcmsrError` for anything else."""
        title, equals, folder = text.partition("=")
        if not (title.strip() and equals and folder):
            raise IcmsrError(f"a column is TITLE=FOLDER, got {text!r}: write for example nano=results/nano")
        return cls(title.strip(), Path(folder))


@dataclass(frozen=True)
class SheetRow:
    """A picture and the place of its crop."""

    name: str
    """The file name without extension."""
    corner: tuple[int, int] | None = None
    """(x, y) of the crop's upper left pixel in the row's largest picture; None crops the middle."""

    @classmethod
    def parse(cls, text: str) -> SheetRow:
        """The row for ``NAME`` or ``NAME:X,Y``, NAME with or without extension; raises `IcmsrError` otherwise."""
        name, colon, position = text.rpartition(":")
        if not colon:
            name, position = text, ""
        x, _, y = position.partition(",")
        if not name or (colon and not (x.strip().isdecimal() and y.strip().isdecimal())):
            raise IcmsrError(f"a row is NAME or NAME:X,Y with X, Y from 0, got {text!r}: write for example cat:64,128")
        stem = Path(name).stem if Path(name).suffix.lower() in READ_EXTENSIONS else name
        return cls(stem, (int(x), int(y)) if colon else None)


@dataclass(frozen=True)
class SheetSettings:
    """Sizes of a sheet. Raises `IcmsrError` for sizes below 1 (the gap: below 0)."""

    crop: int = 192
    """Side of the square crop, in pixels of the row's largest picture."""
    zoom: int = 1
    """Each pixel of the crop becomes a square of this side."""
    gap: int = 8
    """Width in pixels of the white between tiles and around the sheet."""
    font_size: int = 18
    """Height of the labels' font, in pixels."""

    def __post_init__(self) -> None:
        for name, least in (("crop", 1), ("zoom", 1), ("gap", 0), ("font_size", 1)):
            if getattr(self, name) < least:
                raise IcmsrError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def tile(self) -> int:
        """Side of a tile on the sheet."""
        return self.crop * self.zoom


@dataclass(frozen=True)
class SheetLayout:
    """Where everything is on a sheet, in pixels; decided by the labels and the settings alone."""

    titles: tuple[str, ...]
    """Headings of the columns."""
    names: tuple[str, ...]
    """Labels of the rows."""
    settings: SheetSettings
    """Sizes."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the sheet."""
        left, top = self.corner(len(self.names), len(self.titles))
        return left, top

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of the upper left pixel of a tile."""
        gap = self.settings.gap
        return (
            gap + self._name_width + gap + column * (self._column_width + gap),
            gap + self._title_height + gap + row * (self._row_height + gap),
        )

    def draw_labels(self) -> Image.Image:
        """The sheet without its tiles: titles above the columns, names left of the rows (Pillow's font: Latin only)."""
        sheet = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        for column, title in enumerate(self._titles):
            x, y = self.corner(0, column)
            draw.multiline_text((x, y - self.settings.gap), title, INK, self._font, anchor="ld")
        for row, name in enumerate(self._names):
            draw.multiline_text((self.settings.gap, self.corner(row, 0)[1]), name, INK, self._font, anchor="la")
        return sheet

    @cached_property
    def _font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(size=self.settings.font_size)

    @cached_property
    def _titles(self) -> list[str]:
        return [self._wrapped(title, self._column_width) for title in self.titles]

    @cached_property
    def _names(self) -> list[str]:
        return [self._wrapped(name, NARROWEST_LABEL * self.settings.font_size) for name in self.names]

    @cached_property
    def _column_width(self) -> int:
        """At least a tile; more if a short title would not fit above it."""
        widest = max(self._extent(title)[0] for title in self.titles)
        return max(self.settings.tile, min(widest, NARROWEST_LABEL * self.settings.font_size))

    @cached_property
    def _row_height(self) -> int:
        return max(self.settings.tile, *(self._extent(name)[1] for name in self._names))

    @cached_property
    def _name_width(self) -> int:
        return max(self._extent(name)[0] for name in self._names)

    @cached_property
    def _title_height(self) -> int:
        return max(self._extent(title)[1] for title in self._titles)

    def _extent(self, text: str) -> tuple[int, int]:
        """(width, height) of the text, including the room for letters that reach below the last line."""
        draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        right, bottom = draw.multiline_textbbox((0, 0), text + "|", self._font, anchor="la")[2:]
        return int(np.ceil(right)), int(np.ceil(bottom))

    def _wrapped(self, text: str, width: int) -> str:
        """`text` in lines of at most `width` pixels, broken after a space, _, - or . if there is one."""
        lines: list[str] = []
        line = ""
        for letter in text:
            if letter == "\n":
                lines, line = [*lines, line], ""
                continue
            if line and self._extent(line + letter)[0] > width:
                cut = max(line.rfind(mark) for mark in " _-.") + 1 or len(line)
                lines.append(line[:cut].rstrip())
                line = line[cut:]
            line += letter
        return "\n".join([*lines, line])


def contact_sheet(
    columns: Sequence[SheetColumn], rows: Sequence[SheetRow], settings: SheetSettings | None = None
) -> FloatArray:
    """The sheet [H, W, 3], float32 in [0, 1]: the same square crop of each picture from each folder, with labels.

    The largest picture of a row sets the view. A smaller one, such as the low-resolution input, is enlarged to it by
    repeating pixels, so the view must be a whole multiple of its size. Every sample of a tile is one of the file's.
    Rows of the same picture have the crop's corner in their label. Transparency and colour profiles are ignored.

    Raises IcmsrError, before any picture is read, if there are no columns or rows, a folder is missing, or a folder has
    a name not at all (all such names are listed) or twice; later, with the file's name, if a picture cannot be read,
    sizes do not fit each other, or a crop does not fit its picture.
    """
    settings = settings or SheetSettings()
    if not columns or not rows:
        raise IcmsrError(f"a sheet needs at least 1 column and 1 row, got {len(columns)} and {len(rows)}")
    files = _find_files(columns, rows)
    names = [row.name for row in rows]
    labels = [
        f"{row.name}\n{row.corner[0]},{row.corner[1]}" if row.corner and names.count(row.name) > 1 else row.name
        for row in rows
    ]
    layout = SheetLayout(tuple(column.title for column in columns), tuple(labels), settings)
    sheet: FloatArray = np.asarray(layout.draw_labels(), np.float32) / np.float32(255)
    for row_number, (row, paths) in enumerate(zip(rows, files)):
        for column_number, tile in enumerate(_tiles(row, paths, settings)):
            x, y = layout.corner(row_number, column_number)
            sheet[y : y + settings.tile, x : x + settings.tile] = tile
    return sheet


def enlarged_crop(picture: FloatArray, view: tuple[int, int], corner: tuple[int, int], side: int) -> FloatArray:
    """The square [side, side, 3] at `corner` (x, y) of `picture` [h, w, 3] enlarged to `view` (width, height).

    Pixels are repeated (nearest neighbour). Raises IcmsrError if the view is not a whole multiple of the picture, the
    same in both directions, or if the square reaches beyond the view.
    """
    height, width = picture.shape[:2]
    factor = view[0] // width
    if not factor or (width * factor, height * factor) != view:
        raise IcmsrError(
            f"the row's largest picture, {view[0]} x {view[1]}, must be a whole multiple of this one, "
            f"{width} x {height}: resize one of them"
        )
    (x, y), (right, bottom) = corner, (corner[0] + side, corner[1] + side)
    if min(corner) < 0 or right > view[0] or bottom > view[1]:
        raise IcmsrError(
            f"a crop of {side} pixels at {x},{y} reaches beyond {view[0]} x {view[1]}: move it or make it smaller"
        )
    return np.ascontiguousarray(picture[np.arange(y, bottom) // factor][:, np.arange(x, right) // factor])


def _tiles(row: SheetRow, paths: Sequence[Path], settings: SheetSettings) -> list[FloatArray]:
    pictures = [read_picture(path).rgb for path in paths]
    view = max(picture.shape[1] for picture in pictures), max(picture.shape[0] for picture in pictures)
    corner = row.corner or (max(0, view[0] - settings.crop) // 2, max(0, view[1] - settings.crop) // 2)
    tiles = []
    for path, picture in zip(paths, pictures):
        try:
            tile = enlarged_crop(picture, view, corner, settings.crop)
        except IcmsrError as error:
            raise IcmsrError(f"{path}: {error}") from error
        tiles.append(enlarged(tile, settings.zoom))
    return tiles


def _find_files(columns: Sequence[SheetColumn], rows: Sequence[SheetRow]) -> list[list[Path]]:
    """The file of each column, row by row."""
    by_name: list[dict[str, list[Path]]] = []
    problems = []
    for column in columns:
        found: dict[str, list[Path]] = {}
        for path in find_pictures(column.folder):
            found.setdefault(path.stem, []).append(path)
        by_name.append(found)
        wanted = dict.fromkeys(row.name for row in rows)
        missing = [name for name in wanted if name not in found]
        if missing:
            problems.append(f"{os.fspath(column.folder)} ({column.title}) has no {', '.join(missing)}")
        problems += [
            f"{os.fspath(column.folder)} ({column.title}) has {' and '.join(path.name for path in found[name])}"
            for name in wanted
            if len(found.get(name, ())) > 1
        ]
    if problems:
        raise IcmsrError(f"each folder must have exactly one picture for each row: {'; '.join(problems)}")
    return [[found[row.name][0] for found in by_name] for row in rows]
