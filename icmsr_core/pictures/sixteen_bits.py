"""PNG and TIFF with 16 bits per sample in colour; Pillow reads and writes 16 bits for grey pictures only.

OpenCV reads. Writing lets Pillow write an 8-bit file and replaces its samples, so that both depths carry the same
metadata.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from .png_chunks import PNG_SIGNATURE, chunk, chunks

_PNG_COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG specification, table 11.1
_IDAT_BYTES = 1 << 24  # a chunk holds at most 2^31 - 1 bytes
_IMAGE_WIDTH = 256
_BITS_PER_SAMPLE = 258
_ORIENTATION = 274
_TIFF_SHORT, _TIFF_LONG = 3, 4


def decode_16bit(data: bytes) -> npt.NDArray[np.uint16] | None:
    """Samples [height, width, channels] of a colour PNG or TIFF file with 16 bits per sample, not turned.

    The channels are R, G, B, and A if there are four. None if OpenCV cannot read such samples from the file.
    """
    if not data.startswith(PNG_SIGNATURE):
        # Some versions of OpenCV turn a TIFF picture, some do not: without an orientation none does.
        data = _with_tiff_tag(data, _ORIENTATION, 1)
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16 or samples.ndim != 3 or samples.shape[2] not in (3, 4):
        return None
    order = cv2.COLOR_BGR2RGB if samples.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    return np.asarray(cv2.cvtColor(samples, order), dtype=np.uint16)


def encode_png_16bit(samples: npt.NDArray[np.uint16], save_arguments: dict[str, Any]) -> bytes:
    """A PNG file of `samples` [height, width, channels], channels 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA).

    `save_arguments` are Pillow's, with the profile, EXIF, resolution and text to write.
    """
    height, width, channels = samples.shape
    carrier = io.BytesIO()
    Image.new("RGB" if channels > 2 else "L", (1, 1)).save(carrier, "PNG", **save_arguments)
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOR_TYPE[channels], 0, 0, 0)
    pixel = 2 * channels
    rows = samples.astype(">u2").view(np.uint8).reshape(height, width * pixel)
    filtered = np.empty((height, 1 + width * pixel), np.uint8)
    filtered[:, 0] = 1  # filter "Sub" on every row: the difference to the pixel on the left, modulo 256
    filtered[:, 1 : 1 + pixel] = rows[:, :pixel]
    np.subtract(rows[:, pixel:], rows[:, :-pixel], out=filtered[:, 1 + pixel :])
    packed = zlib.compress(filtered.tobytes(), 6)
    body = [chunk(b"IDAT", packed[start : start + _IDAT_BYTES]) for start in range(0, len(packed), _IDAT_BYTES)]
    # A small first letter marks what is not pixels, size or palette.
    extra = [chunk(kind, content) for kind, content, _ in chunks(carrier.getvalue()) if kind[:1].islower()]
    return b"".join([PNG_SIGNATURE, chunk(b"IHDR", header), *extra, *body, chunk(b"IEND", b"")])


def encode_tiff_16bit(samples: npt.NDArray[np.uint16], save_arguments: dict[str, Any]) -> bytes:
    """An uncompressed TIFF file of `samples` [height, width, channels], channels 1, 3 or 4; metadata as for PNG.

    Pillow writes an 8-bit picture of twice the width, whose bytes are the same; then two tags are corrected.
    """
    height, width, channels = samples.shape
    halves = samples.astype("<u2").view(np.uint8).reshape(height, 2 * width, channels)
    carrier = io.BytesIO()
    Image.fromarray(halves[..., 0] if channels == 1 else halves).save(carrier, "TIFF", **save_arguments)
    return _with_tiff_tag(_with_tiff_tag(carrier.getvalue(), _IMAGE_WIDTH, width), _BITS_PER_SAMPLE, 16)


def _with_tiff_tag(data: bytes, tag: int, value: int) -> bytes:
    """A copy of a classic TIFF file in which every value of a SHORT or LONG tag of the first directory is `value`.

    `data` itself if it has no such tag or no such directory (BigTIFF, damaged).
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return data
    patched = bytearray(data)
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        (entries,) = struct.unpack_from(order + "H", data, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            found, kind, count = struct.unpack_from(order + "HHI", data, entry)
            if found != tag or kind not in (_TIFF_SHORT, _TIFF_LONG) or count > 4:
                continue
            values = struct.pack(f"{order}{count}{'H' if kind == _TIFF_SHORT else 'I'}", *[value] * count)
            # Up to four bytes are in the entry itself, more are at the address that it holds.
            place = entry + 8 if len(values) <= 4 else struct.unpack_from(order + "I", data, entry + 8)[0]
            if place + len(values) > len(patched):
                return data
            patched[place : place + len(values)] = values
    except struct.error:
        return data
    return bytes(patched)
