"""Pictures in files, made by Pillow, OpenCV or byte by byte."""

import struct
import zlib

import numpy as np

from icmsr_core.pictures.files import Picture

HEIGHT, WIDTH = 13, 17


def noise(channels: int, bits: int = 8, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(channels * 100 + bits)
    return rng.integers(0, 2**bits, (height, width, channels), dtype=np.uint8 if bits == 8 else np.uint16)


def picture_of(samples: np.ndarray, **fields: object) -> Picture:
    """The Picture whose file would hold `samples` [height, width, 1..4]."""
    peak = np.iinfo(samples.dtype).max
    values = samples.astype(np.float32) / peak
    channels = samples.shape[2]
    return Picture(
        rgb=values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=2),
        alpha=values[..., -1] if channels in (2, 4) else None,
        bits=8 if peak == 255 else 16,
        grey=channels < 3,
        **fields,
    )


def samples_of(picture: Picture) -> np.ndarray:
    """uint8 or uint16 [height, width, 1..4] of a Picture; fails if a value is not a level of its depth."""
    peak = 2**picture.bits - 1
    values = picture.rgb[..., :1] if picture.grey else picture.rgb
    if picture.grey:
        assert (picture.rgb == values).all()
    if picture.alpha is not None:
        values = np.dstack([values, picture.alpha])
    levels = values.astype(np.float64) * peak
    np.testing.assert_allclose(levels, levels.round(), atol=0.02)
    return levels.round().astype(np.uint8 if peak == 255 else np.uint16)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(width: int, height: int, bits: int, color_type: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file by hand; `rows` with a filter byte before each row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


def tiff_file(
    samples: np.ndarray, photometric: int, *, order: str = "<", bits: int = 16, planar: bool = False, **tags: int
) -> bytes:
    """An uncompressed 16-bit TIFF file by hand; `tags` are t274=..., one SHORT (per channel for 339) each."""
    height, width, channels = samples.shape
    raw = (samples.transpose(2, 0, 1) if planar else samples).astype(order + "u2").tobytes()
    strips = channels if planar else 1
    length = len(raw) // strips
    entries = {
        256: [width],
        257: [height],
        258: [bits] * channels,
        259: [1],
        262: [photometric],
        273: [8 + i * length for i in range(strips)],
        277: [channels],
        278: [height],
        279: [length] * strips,
        284: [2 if planar else 1],
    }
    entries |= {int(tag[1:]): [value] * (channels if tag == "t339" else 1) for tag, value in tags.items()}
    directory, outside = struct.pack(order + "H", len(entries)), b""
    after = 8 + len(raw) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        kind = 4 if tag in (273, 279) else 3
        packed = struct.pack(order + ("I" if kind == 4 else "H") * len(values), *values)
        directory += struct.pack(order + "HHI", tag, kind, len(values))
        directory += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", after + len(outside))
        outside += packed if len(packed) > 4 else b""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(raw)) + raw + directory + bytes(4) + outside
