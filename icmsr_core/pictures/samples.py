"""The samples of a Pillow image as an array: upright, with palettes and colour keys expanded and 16 bits kept."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from ..errors import IcmsrError
from .metadata import orientation_of
from .sixteen_bits import decode_16bit
from .storage import Place

log = logging.getLogger(__name__)

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_EXTRA_SAMPLES, _TIFF_SAMPLE_FORMAT = 258, 262, 338, 339
_SIGNED = 2


def upright_samples(image: Image.Image, data: bytes, path: Place) -> tuple[npt.NDArray[Any], int]:
    """Samples [height, width, channels] of the opened `image`, turned upright, and the value of white.

    `data` is the whole file, `path` its name for messages. Channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
    (not premultiplied). The samples are uint8 with white 255, or uint16 with white 65535 (4095 for 12-bit TIFF). Loads
    `image`. Raises IcmsrError for samples without a defined black and white (float, signed, 32-bit), for Lab colours,
    and for 16-bit colours that Pillow and OpenCV read differently (it happens with separate colour planes).
    """
    orientation = orientation_of(image)
    image.load()
    # Loading turns TIFF pictures, and Pillow then drops the tag; other formats are turned here.
    remaining = orientation_of(image)
    depth = _depth(image, data)
    signed = _SIGNED in _tag(image, _TIFF_SAMPLE_FORMAT, (1,))
    if signed or image.mode in ("F", "LAB") or (image.mode == "I" and depth > 16):
        raise IcmsrError(
            f"{path}: {depth}-bit samples in Pillow's mode {image.mode}{', signed,' if signed else ''} "
            "have no defined black and white: convert the file to 8 or 16 bits, RGB or grey"
        )
    if image.mode.startswith("I"):
        return _turned(_grey_samples(image, depth), remaining), 2**depth - 1
    if depth == 16 and image.mode in ("RGB", "RGBA"):
        samples = _color_samples(image, data, path, orientation, remaining)
        if samples is not None:
            return samples, 65535
        log.warning("%s: its 16-bit samples could only be read as 8 bits", path)
    if depth == 16 and image.mode == "CMYK":
        log.warning("%s: its 16-bit CMYK samples are read as 8 bits", path)
    return _turned(_eight_bit_samples(image, depth, path), remaining), 255


def _depth(image: Image.Image, data: bytes) -> int:
    """Bits per sample in the file, which Pillow's mode does not say."""
    if image.format == "PNG":
        # Pillow reads files in which the header is not the first chunk, and then byte 24 is another.
        return 16 if image.mode.startswith("I") else data[24]
    if image.format == "TIFF":
        return int(max(_tag(image, _TIFF_BITS, (1,))))
    return 8


def _tag(image: Image.Image, tag: int, default: Any) -> Any:
    return getattr(image, "tag_v2", {}).get(tag, default)


def _grey_samples(image: Image.Image, depth: int) -> npt.NDArray[Any]:
    """uint16 [height, width, 1 or 2] of a grey picture with more than 8 bits."""
    white = 2**depth - 1
    grey = np.asarray(image).astype(np.uint16)
    if _tag(image, _TIFF_PHOTOMETRIC, 1) == 0:  # white is 0, and Pillow does not invert it in this mode
        grey = white - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        return np.stack([grey, np.where(grey == key, 0, white).astype(np.uint16)], axis=2)
    return grey[..., None]


def _color_samples(
    image: Image.Image, data: bytes, path: Place, orientation: int, remaining: int
) -> npt.NDArray[Any] | None:
    """uint16 [height, width, 2..4], upright, read by OpenCV; None if it cannot read the file.

    The upper bytes must equal what Pillow read, because both can be wrong without an error: OpenCV returns half a
    picture for half a file, Pillow mixes up the separate planes of an uncompressed TIFF file.
    """
    decoded = decode_16bit(data)
    if decoded is None or decoded.shape[2] < len(image.getbands()):
        return None
    decoded = _turned(decoded, orientation)
    seen = _turned(np.asarray(image), remaining)
    premultiplied = 1 in _tag(image, _TIFF_EXTRA_SAMPLES, ())
    compared = slice(3, 4) if premultiplied else slice(0, 3)
    upper = (decoded[..., compared] >> 8).astype(np.int16)
    if decoded.shape[:2] != seen.shape[:2] or np.abs(upper - seen[..., compared]).max() > 1:
        raise IcmsrError(
            f"{path}: its 16-bit samples cannot be trusted (Pillow and OpenCV read different values): "
            "save it as PNG, or as TIFF with interleaved channels"
        )
    key = image.info.get("transparency")
    if isinstance(key, tuple):  # one colour of a PNG file without alpha is transparent
        opaque = (decoded[..., :3] != np.array(key, np.uint16)).any(axis=2)
        return np.dstack([decoded[..., :3], np.where(opaque, 65535, 0).astype(np.uint16)])
    if image.mode == "RGB":
        return decoded[..., :3]
    if premultiplied:
        alpha = np.maximum(decoded[..., 3:], 1).astype(np.float64)
        straight = np.rint(np.minimum(decoded[..., :3] * (65535 / alpha), 65535)).astype(np.uint16)
        return np.dstack([straight, decoded[..., 3]])
    return decoded[..., [0, 3]] if data[25:26] == b"\x04" and image.format == "PNG" else decoded  # 4: grey, alpha


def _eight_bit_samples(image: Image.Image, depth: int, path: Place) -> npt.NDArray[Any]:
    """uint8 [height, width, 1..4]."""
    grey = image.mode in ("1", "L", "LA", "La")
    key = image.info.get("transparency")
    if image.mode == "L" and image.format == "PNG" and depth < 8 and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)  # Pillow scales the samples but not the key
    if image.mode == "CMYK":
        converted = _rgb_from_cmyk(image, path)
    elif image.mode[-1] in "Aa" or key is not None or getattr(image.palette, "mode", "") == "RGBA":
        converted = image.convert("LA" if grey else "RGBA")
    else:
        converted = image.convert("L" if grey else "RGB")
    samples = np.asarray(converted)
    return samples if samples.ndim == 3 else samples[..., None]


def _rgb_from_cmyk(image: Image.Image, path: Place) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, ImportError, OSError) as error:
            log.warning("%s: the CMYK profile cannot be used, colours are converted without it: %s", path, error)
    return image.convert("RGB")


def _turned(samples: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """[height, width, channels] turned upright from EXIF orientation 1..8 (EXIF 2.32, section 4.6.4, tag 274)."""
    if orientation >= 5:  # 5..8 are stored with rows and columns exchanged
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return samples
