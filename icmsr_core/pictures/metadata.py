"""What a picture file holds besides pixels: colour profile, EXIF, XMP, resolution, text; by way of Pillow.

Not kept: thumbnails, IPTC, JPEG comments. MakerNote keeps its bytes, but addresses inside it no longer fit.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, PngImagePlugin

from .storage import Place

log = logging.getLogger(__name__)

ORIENTATION = 0x0112
_EXIF_IFD = 0x8769
_GPS_IFD = 0x8825
_XMP = 700
_X_RESOLUTION = 282
# Tags of EXIF's first directory that describe the picture. The others there describe the layout of the old file (TIFF
# strips, thumbnails) or are kept elsewhere (resolution, profile, XMP): in the new file they would be wrong.
_DESCRIPTIVE_TAGS = frozenset(
    # ImageDescription, Make, Model, Orientation, Software, DateTime, Artist, HostComputer, ratings, Copyright,
    # the two sub-directories, and the XP* fields of Windows
    {270, 271, 272, ORIENTATION, 305, 306, 315, 316, 18246, 18249, 33432, _EXIF_IFD, _GPS_IFD, *range(40091, 40096)}
)
_SIZE_TAGS = (40962, 40963)  # PixelXDimension, PixelYDimension: the size before upscaling
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation="[0-9]"|<tiff:Orientation>[0-9]</tiff:Orientation>')
# The values that stand for sRGB: gamma 1/2.2, BT.709 primaries and D65, and the codes for both.
_SRGB_CHUNKS = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"cICP": bytes((1, 13, 0, 1)),
}
_JPEG_SEGMENT = 65533  # bytes that one marker segment of a JPEG file can hold


@dataclass(frozen=True)
class Metadata:
    """What goes from the input file to the output file, apart from the pixels."""

    icc_profile: bytes | None = None
    """ICC profile of the RGB or grey samples; never a CMYK one. None: readers assume sRGB."""
    exif: bytes | None = None
    """EXIF block that begins with `Exif\\0\\0`. Its orientation is 1: the pixels are already turned."""
    xmp: bytes | None = None
    """XMP packet (XML), without its orientation."""
    dpi: tuple[float, float] | None = None
    """Horizontal and vertical resolution in pixels per inch, both positive."""
    text: dict[str, str] = field(default_factory=dict)
    """Text chunks of a PNG file, by keyword."""
    png_color: tuple[tuple[bytes, bytes], ...] = ()
    """Kind and content of the chunks of a PNG file that say which colours its samples are (`COLOR_CHUNKS`)."""


def orientation_of(image: Image.Image, *, header: bool = False) -> int:
    """EXIF orientation, 1..8, by which the pixels of `image` still have to be turned; 1 if it is missing or invalid.

    With `header` no pixel is decoded; Pillow otherwise looks for the EXIF of a PNG behind its pixels too.
    """
    value = _exif_of(image, header).get(ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def read_metadata(image: Image.Image, path: Place) -> Metadata:
    """The metadata of a loaded Pillow image, but `png_color`.

    Damaged parts are dropped with a logged warning that says `path`; nothing is raised.
    """
    return Metadata(
        icc_profile=_icc_profile(image),
        exif=_exif_bytes(image, path),
        xmp=_xmp(image),
        dpi=_dpi(image),
        text=_text(image),
    )


def save_arguments(metadata: Metadata, file_format: str, *, grey: bool, path: Place) -> dict[str, Any]:
    """Arguments of `PIL.Image.Image.save` that write `metadata` into a "PNG", "JPEG", "WEBP" or "TIFF" file `path`.

    What the format cannot hold is dropped: text exists in PNG only, resolution in all but WebP. Three things are
    dropped with a logged warning: a profile whose colour space is not that of the samples (`grey` or RGB), EXIF or XMP
    that is too long for JPEG, and colours of a PNG other than sRGB (`png_color`) in another format.
    """
    arguments: dict[str, Any] = {}
    foreign = _colors_other_than_srgb(metadata.png_color)
    if foreign and file_format != "PNG":
        log.warning(
            "%s: %s cannot hold the colour space of the PNG (%s), so colours may look different: write PNG",
            path,
            file_format,
            ", ".join(foreign),
        )
    if metadata.icc_profile is not None:
        space = metadata.icc_profile[16:20]
        # WebP has no grey samples: its profile is an RGB one.
        if space == (b"GRAY" if grey and file_format != "WEBP" else b"RGB "):
            arguments["icc_profile"] = metadata.icc_profile
        else:
            log.warning(
                "%s: the colour profile is dropped: it is for %r samples", path, space.decode("latin-1").strip()
            )
    blocks = {"exif": metadata.exif, "xmp": metadata.xmp}
    for name, block in blocks.items():
        if block is not None and file_format == "JPEG" and len(block) > _JPEG_SEGMENT - 64:
            log.warning("%s: %s is dropped: its %d bytes are too many for JPEG", path, name.upper(), len(block))
            blocks[name] = None
    exif, xmp = blocks["exif"], blocks["xmp"]
    if file_format == "TIFF":
        tags = Image.Exif()
        if exif is not None:
            tags.load(exif)
        if xmp is not None:
            tags[_XMP] = xmp
        if len(tags):
            arguments["exif"] = tags
    else:
        if exif is not None:
            arguments["exif"] = exif
        if xmp is not None and file_format != "PNG":
            arguments["xmp"] = xmp
    if metadata.dpi is not None and file_format != "WEBP":
        arguments["dpi"] = metadata.dpi
    if file_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for keyword, value in metadata.text.items():
            chunks.add_text(keyword, value, zip=len(value) > 1024)
        if xmp is not None:
            chunks.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
        arguments["pnginfo"] = chunks
    return arguments


def _exif_of(image: Image.Image, header: bool) -> Image.Exif:
    try:
        return Image.Image.getexif(image) if header else image.getexif()
    except Exception:  # parsers of damaged blocks raise nearly everything; `_exif_bytes` says so
        return Image.Exif()


def _exif_bytes(image: Image.Image, path: Place) -> bytes | None:
    try:
        exif = image.getexif()
        for tag in [tag for tag in exif if tag not in _DESCRIPTIVE_TAGS]:
            del exif[tag]
        if _EXIF_IFD in exif:
            details = exif.get_ifd(_EXIF_IFD)
            for tag in _SIZE_TAGS:
                details.pop(tag, None)
        if not len(exif):
            return None
        exif[ORIENTATION] = 1
        block = exif.tobytes()
    except Exception as error:
        log.warning("%s: EXIF is dropped, it cannot be read: %s", path, error)
        return None
    return block if block.startswith(b"Exif\0\0") else b"Exif\0\0" + block


def _icc_profile(image: Image.Image) -> bytes | None:
    profile = image.info.get("icc_profile")
    # The header has 128 bytes and names the colour space. CMYK is converted when the picture is read.
    if not isinstance(profile, bytes) or len(profile) < 128 or profile[16:20] not in (b"RGB ", b"GRAY"):
        return None
    return profile


def _colors_other_than_srgb(png_color: tuple[tuple[bytes, bytes], ...]) -> list[str]:
    """The names of the chunks that ask for other colours than sRGB's, which readers assume without them."""
    held = dict(png_color)
    if b"sRGB" in held and b"cICP" not in held:
        return []  # it stands above gAMA and cHRM
    return [kind.decode() for kind, content in png_color if content != _SRGB_CHUNKS.get(kind)]


def _xmp(image: Image.Image) -> bytes | None:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if packet is None:
        packet = getattr(image, "tag_v2", {}).get(_XMP)
    if isinstance(packet, str):
        packet = packet.encode("utf-8")
    return _XMP_ORIENTATION.sub(b"", packet) if isinstance(packet, bytes) and packet else None


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    tags = getattr(image, "tag_v2", None)
    if tags is not None and _X_RESOLUTION not in tags:
        return None  # Pillow reports 1 dpi for a TIFF file without a resolution
    try:
        horizontal, vertical = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(math.isfinite(value) and 0 < value < 1e6 for value in (horizontal, vertical)):
        return None
    return horizontal, vertical


def _text(image: Image.Image) -> dict[str, str]:
    # ImageMagick's "Raw profile type exif" is EXIF in disguise, with the old orientation in it.
    return {
        str(keyword): str(value)
        for keyword, value in getattr(image, "text", {}).items()
        if not keyword.startswith("Raw profile type") and keyword != "XML:com.adobe.xmp"
    }
