"""Reads and writes picture files: PNG, JPEG, WebP, TIFF; reads more. Arrays to tensors and back."""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError

from ..errors import IcmsrError
from ..whole_file import replace_file
from .metadata import Metadata, orientation_of, read_metadata, save_arguments
from .png_chunks import PNG_SIGNATURE, color_chunks, with_chunks, without_damaged_chunks, without_pixels
from .samples import upright_samples
from .sixteen_bits import encode_png_16bit, encode_tiff_16bit
from .storage import Place, RemotePath, place_of

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

ENCODED_ROWS = 256
"""Rows that are rounded to 8 or 16 bits at a time."""
_WRITE_FORMATS = {
    ".png": "PNG",
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    ".webp": "WEBP",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
}
WRITE_EXTENSIONS: tuple[str, ...] = tuple(_WRITE_FORMATS)
"""Extensions, in lower case, that `write_picture` takes."""
READ_EXTENSIONS: tuple[str, ...] = (*WRITE_EXTENSIONS, ".bmp", ".gif", ".avif", ".heic", ".heif")
"""Extensions, in lower case, that `find_pictures` finds. `read_picture` looks at the content, not at the extension.
HEIC needs the package pillow-heif, AVIF Pillow 11.3 or pillow-heif."""

MAX_PIXELS = 512_000_000
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of libjpeg and libwebp
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601, as Pillow's "L"
_pillow_globals = threading.Lock()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in memory, upright, with everything that its file says about it. Change it with `dataclasses.replace`.

    Raises IcmsrError if an array has another shape or type than named below, or if `bits` is neither 8 nor 16.
    """

    rgb: FloatArray
    """float32 [height, width, 3], R, G, B in [0, 1], in the file's own colour space, not premultiplied by alpha."""
    alpha: FloatArray | None = None
    """float32 [height, width] in [0, 1], 1 opaque; None if the file has no transparency."""
    bits: int = 8
    """Bits per sample of the source, 8 or 16; `write_picture` keeps them if the format can."""
    grey: bool = False
    """The source was greyscale: R = G = B, and the output is written as grey again if the format can."""
    metadata: Metadata = field(default_factory=Metadata)
    """Profile, EXIF, XMP, resolution and text of the source."""
    lossless: bool = False
    """The source was a lossless WebP: the output is written without loss again if it is WebP."""

    def __post_init__(self) -> None:
        if self.rgb.dtype != np.float32 or self.rgb.ndim != 3 or self.rgb.shape[2] != 3 or not self.rgb.size:
            raise IcmsrError(f"rgb must be float32 [height, width, 3], got {self.rgb.dtype} {list(self.rgb.shape)}")
        if self.alpha is not None and (self.alpha.dtype != np.float32 or self.alpha.shape != self.rgb.shape[:2]):
            raise IcmsrError(
                f"alpha must be float32 {list(self.rgb.shape[:2])} like rgb, got {self.alpha.dtype} "
                f"{list(self.alpha.shape)}"
            )
        if self.bits not in (8, 16):
            raise IcmsrError(f"bits must be 8 or 16, got {self.bits}")


def to_tensor(array: FloatArray) -> torch.Tensor:
    """`array` [height, width, channels] or [height, width] as a float32 tensor [1, channels or 1, height, width].

    The range stays as it is ([0, 1] for a Picture's arrays). The tensor is contiguous, on the CPU, and owns its memory.
    """
    stacked = array if array.ndim == 3 else array[..., None]
    return torch.from_numpy(np.array(rearrange(stacked, "h w c -> 1 c h w"), np.float32, order="C"))


def from_tensor(tensor: torch.Tensor) -> FloatArray:
    """The inverse of `to_tensor`: a tensor [1, 3, H, W] as [H, W, 3], a tensor [1, 1, H, W] as [H, W].

    Any device and floating type; the result is float32 and contiguous. Values are not clamped: `write_picture` does
    that. Raises IcmsrError for any other shape.
    """
    if tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.shape[1] not in (1, 3):
        raise IcmsrError(f"a picture's tensor must be [1, 3 or 1, height, width], got {list(tensor.shape)}")
    image = rearrange(tensor.detach(), "1 c h w -> h w c").to("cpu", torch.float32).contiguous()
    return np.asarray((image if image.shape[2] == 3 else image[..., 0]).numpy(), np.float32)


def find_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """The picture files of `folder`, sorted by name: `READ_EXTENSIONS` in any case, no hidden files, no sub-folders.

    Empty if there are none. Raises IcmsrError if `folder` is missing, not a folder or not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise IcmsrError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise IcmsrError(f"{folder}: cannot be read ({error.strerror})") from error
    return [
        entry
        for entry in entries
        if entry.suffix.lower() in READ_EXTENSIONS and not entry.name.startswith(".") and entry.is_file()
    ]


def read_picture(path: str | os.PathLike[str] | RemotePath, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF or HEIC file; the content decides, not the extension.

    - Of several frames or pages the first is read, with a logged warning.
    - Chunks of a PNG with a wrong checksum that hold no pixels are dropped with a logged warning.
    - It is turned upright by its EXIF orientation, which is then 1.
    - Palettes are expanded, and every kind of transparency (channel, palette, colour key) becomes `alpha`.
    - PNG and TIFF with 16 bits per sample keep them (`bits` 16); 12-bit TIFF counts as 16, everything else as 8. 16-bit
      colours that can only be read as 8 bits are logged as a warning.
    - CMYK becomes sRGB: through the file's own CMYK profile if that is usable, else by the plain formula. The profile
      describes inks, so it is dropped.

    Raises IcmsrError, which names the file, if it is missing, a folder, unreadable, empty, not a picture in these
    formats, damaged or incomplete, larger than `max_pixels`, or has samples without a defined black and white (float,
    32-bit). Damage inside JPEG data that leaves the stream decodable cannot be detected.
    """
    path = place_of(path)
    data = _read_bytes(path)
    try:
        with _pillow_quiet_and_unlimited():
            if data.startswith(PNG_SIGNATURE):
                data, damaged = without_damaged_chunks(data)  # loading does not look at all checksums
                if damaged:
                    log.warning("%s: dropped, wrong checksum: %s", path, ", ".join(damaged))
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise IcmsrError(
                        f"{path}: {width} x {height} is {width * height / 1e6:.0f} megapixels, "
                        f"more than the {max_pixels / 1e6:.0f} allowed: cut it into parts, or raise max_pixels"
                    )
                # MPO: a photograph followed by a depth map or the view of a second lens, which nobody expects here.
                frames = int(getattr(image, "n_frames", 1))
                if frames > 1 and image.format != "MPO":
                    log.warning("%s: only the first of its %d frames is read", path, frames)
                return _decode(image, data, path)
    except IcmsrError:
        raise
    except MemoryError as error:
        raise IcmsrError(
            f"{path}: too little memory to read it{_stated_size(data)}: cut it into parts, or close other programs"
        ) from error
    except UnidentifiedImageError as error:
        raise IcmsrError(f"{path}: {_why_unknown(data)}") from error
    except Exception as error:  # parsers of damaged files raise nearly everything: OSError, SyntaxError, KeyError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise IcmsrError(f"{path}: the file is damaged or incomplete ({reason})") from error


def longest_side(path: Place) -> int | None:
    """The most pixels that a side can have in the format of `path`; None: no limit that matters, or no such format."""
    return _LONGEST_SIDE.get(_WRITE_FORMATS.get(path.suffix.lower(), ""))


def stored_size(path: str | os.PathLike[str] | RemotePath) -> tuple[int, int] | None:
    """(width, height) of the upright picture in a file, from its header; None where `read_picture` will raise."""
    try:
        with _pillow_quiet_and_unlimited(), place_of(path).open("rb") as file:
            png = file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
            file.seek(0)
            with Image.open(io.BytesIO(without_pixels(file)) if png else file, formats=readable_formats()) as image:
                width, height = image.size
                return (width, height) if orientation_of(image, header=True) < 5 else (height, width)
    except Exception:  # parsers of damaged files raise nearly everything
        return None


def write_picture(path: str | os.PathLike[str] | RemotePath, picture: Picture, quality: int = 95) -> None:
    """Write `picture` in the format that the extension of `path` names (`WRITE_EXTENSIONS`, in any case).

    - Samples are clamped to [0, 1] and rounded to the nearest level; `bits` 16 is kept in PNG and TIFF.
    - A grey picture is written as grey (BT.601 luma of `rgb`). WebP has no grey, and 16-bit TIFF no grey with alpha.
    - JPEG has no alpha: the picture is laid on white, with a logged warning.
    - Metadata is written as far as the format can hold it, see `save_arguments`.
    - `quality`, 1..100, is for JPEG (full colour resolution) and WebP (100, or a `lossless` picture: without loss).
      TIFF is uncompressed.
    - The file appears whole or not at all, see `replace_file` and, for a storage, `RemotePath.write_bytes`.

    Raises IcmsrError, which names the file, for an unknown extension, a quality outside 1..100, an output folder that
    is missing or not writable, values that are not finite, and a picture too large for the format.
    """
    path = place_of(path)
    file_format = _WRITE_FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise IcmsrError(
            f"{path}: cannot write {path.suffix or 'a file without extension'}: use one of "
            f"{', '.join(WRITE_EXTENSIONS)}"
        )
    if not 1 <= quality <= 100:
        raise IcmsrError(f"quality must be in 1..100, got {quality}")
    local = isinstance(path, Path)
    if local and path.is_dir():
        raise IcmsrError(f"{path}: is a folder, not a file to write")
    if local and not path.parent.is_dir():
        raise IcmsrError(f"{path}: the folder {path.parent} does not exist: create it first")
    height, width = picture.rgb.shape[:2]
    longest = longest_side(path)
    if longest is not None and max(height, width) > longest:
        raise IcmsrError(
            f"{path}: {file_format} holds at most {longest} pixels per side, got {width} x {height}: write PNG or TIFF"
        )
    if not np.isfinite(picture.rgb).all() or (picture.alpha is not None and not np.isfinite(picture.alpha).all()):
        raise IcmsrError(f"{path}: not written: the picture has NaN or infinite values: try fp32")
    try:
        data = _encode(picture, file_format, quality, path)
    except (OSError, ValueError) as error:
        raise IcmsrError(f"{path}: cannot be encoded as {file_format} ({error})") from error
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    try:
        replace_file(path, data)
    except OSError as error:
        raise IcmsrError(f"{path}: cannot be written ({error.strerror})") from error


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here, by its names; with pillow-heif installed also HEIF."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in _READ_FORMATS if name in Image.OPEN)


def _stated_size(data: bytes) -> str:
    """What the header of the file `data` says of its size, for an error."""
    # As in `stored_size`: parsers of damaged files raise nearly everything, and this is only part of an error.
    with suppress(Exception), Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        return f" ({image.width} x {image.height} pixels)"
    return ""


def _why_unknown(data: bytes) -> str:
    """Why Pillow does not know the file `data`, and what to do."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        kind, way = ("AVIF", "update Pillow to 11.3, or ") if data[8:12].startswith(b"av") else ("HEIC", "")
        return f"{kind} cannot be read here: {way}pip install pillow-heif, or convert it to PNG"
    if data[:4] in (b"II*\0", b"MM\0*"):
        samples = None
        with suppress(cv2.error):  # of sizes that it refuses
            samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if samples is not None and samples.dtype.kind == "f":
            return (
                f"{samples.dtype.itemsize * 8}-bit floating-point samples have no defined black and white: convert the "
                "file to 8 or 16 bits"
            )
    known = ", ".join(name for name in readable_formats())
    return f"not a picture in a known format ({known})"


def _read_bytes(path: Place) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IcmsrError(f"{path}: no such file") from None
    except OSError as error:
        what = "is a folder, not a picture" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise IcmsrError(f"{path}: {what}") from error
    if not data:
        raise IcmsrError(f"{path}: the file is empty")
    return data


@contextmanager
def _pillow_quiet_and_unlimited() -> Iterator[None]:
    """Lifts Pillow's global limit on pixels, lower than `MAX_PIXELS`, and silences its warnings about odd tags.

    Files that cannot be read end in an error anyway; the others need no line on stderr.
    """
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode(image: Image.Image, data: bytes, path: Place) -> Picture:
    samples, peak = upright_samples(image, data, path)
    values = samples.astype(np.float32) / np.float32(peak)
    channels = values.shape[2]
    return Picture(
        rgb=np.ascontiguousarray(values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, axis=2)),
        alpha=np.ascontiguousarray(values[..., -1]) if channels in (2, 4) else None,
        bits=8 if peak == 255 else 16,
        grey=channels < 3,
        metadata=replace(read_metadata(image, path), png_color=color_chunks(data) if image.format == "PNG" else ()),
        lossless=image.format == "WEBP" and _is_lossless_webp(data),
    )


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the pictures in a WebP file are lossless (RIFF chunk VP8L, also inside the frames of ANMF)."""
    return b"VP8L" in (data[12:16], *(data[i : i + 4] for i in _riff_chunks(data)))


def _riff_chunks(data: bytes) -> Iterator[int]:
    """Where the chunks of a RIFF file begin, frames (ANMF) opened."""
    position = 12
    while position + 8 <= len(data):
        yield position
        if data[position : position + 4] == b"ANMF":
            position += 24  # its own header; the frame's chunks follow
            continue
        (length,) = struct.unpack_from("<I", data, position + 4)
        position += 8 + length + length % 2


def _encode(picture: Picture, file_format: str, quality: int, path: Place) -> bytes:
    alpha = picture.alpha
    on_white = alpha is not None and file_format == "JPEG"
    if on_white:
        log.warning("%s: JPEG has no transparency, the picture is laid on white", path)
    wide = picture.bits == 16 and file_format in ("PNG", "TIFF")
    kept = alpha is not None and not on_white
    grey = picture.grey and file_format != "WEBP" and not (wide and kept and file_format == "TIFF")
    height, width = picture.rgb.shape[:2]
    samples = np.empty((height, width, (1 if grey else 3) + kept), np.uint16 if wide else np.uint8)
    for top in range(0, height, ENCODED_ROWS):  # so that no float32 copy of the whole picture is made
        rows = slice(top, top + ENCODED_ROWS)
        channels = np.clip(picture.rgb[rows], 0, 1)
        opaque = np.ones(1, np.float32) if alpha is None else np.clip(alpha[rows], 0, 1)[..., None]
        if on_white:
            channels = channels * opaque + (1 - opaque)
        if grey:
            channels = (channels @ _LUMA)[..., None]
        if kept:
            channels = np.dstack([channels, opaque])
        samples[rows] = np.rint(np.clip(channels, 0, 1) * np.float32(65535 if wide else 255))
    arguments = save_arguments(picture.metadata, file_format, grey=grey, path=path)
    profile = "icc_profile" in arguments
    png_color = tuple(one for one in picture.metadata.png_color if not (profile and one[0] == b"sRGB"))
    if wide and file_format == "PNG":
        return with_chunks(encode_png_16bit(samples, arguments), png_color)
    if wide:
        return encode_tiff_16bit(samples, arguments)
    if file_format == "JPEG":
        arguments |= {"quality": quality, "subsampling": 0}  # full resolution of the colours too
    elif file_format == "WEBP":
        # `exact` keeps colours under full transparency. Without loss, Pillow's quality is the effort.
        lossless = quality == 100 or picture.lossless
        arguments |= {"exact": True, "lossless": lossless, "quality": 80 if lossless else quality}
    buffer = io.BytesIO()
    Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples).save(buffer, file_format, **arguments)
    data = buffer.getvalue()
    return with_chunks(data, png_color) if file_format == "PNG" else data
