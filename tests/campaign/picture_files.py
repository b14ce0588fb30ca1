"""Picture files for the fuzz: every kind that Pillow writes here, PNG of every type by hand, and changes of them."""

import io
import struct
import zlib
from random import Random

import numpy as np
from PIL import Image

from tests.support.picture_files import png_chunk, png_file, tiff_file

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_TYPES = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Depths by colour type, as the standard allows them."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
CHUNKS = (
    *(b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"pHYs", b"eXIf"),
    *(b"tRNS", b"PLTE", b"bKGD", b"hIST", b"sBIT", b"tIME", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IHDR", b"IEND"),
    *(b"xxXx", b"XXXX"),
)
SIDES = (1, 2, 3, 7, 16, 33, 64)
ENDINGS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "TIFF": ".tif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "AVIF": ".avif",
}

Ways = tuple[tuple[str, str, dict], ...]
SAVED: Ways = (
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGB", {"transparency": (1, 2, 3), "dpi": (72, 72)}),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"progressive": True, "quality": 30, "comment": b"x"}),
    ("JPEG", "RGB", {"restart_marker_blocks": 2}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"save_all": True}),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB", "YCbCr")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"save_all": True}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")),
    ("GIF", "P", {"save_all": True, "transparency": 2}),
    ("AVIF", "RGB", {}),
)


def picture_file(random: Random) -> tuple[str, bytes]:
    """The ending and the bytes of a whole picture file of at most 64 pixels a side."""
    if random.random() < 0.25:
        return ".png", png_by_hand(random)
    if random.random() < 0.1:
        samples = np.random.default_rng(random.randrange(1 << 30)).integers(0, 65536, (_side(random), 9, 3), np.uint16)
        return ".tif", tiff_file(samples, random.choice((1, 2, 5, 8)), order=random.choice("<>"), planar=_coin(random))
    kind, mode, options = random.choice(SAVED)
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        kind, mode = "WEBP", "RGB"
    image = _image(random, mode)
    options = {**options, **_metadata(random, kind)}
    if options.get("save_all"):
        options["append_images"] = [image.transpose(Image.Transpose.ROTATE_180) for _ in range(random.randint(1, 2))]
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ENDINGS[kind], buffer.getvalue()


def png_by_hand(random: Random) -> bytes:
    """A PNG of any colour type and depth, with further chunks, interlaced in every fourth case."""
    color_type = random.choice(tuple(PNG_TYPES))
    bits = random.choice(PNG_TYPES[color_type])
    width, height = _side(random), _side(random)
    row = (width * CHANNELS[color_type] * bits + 7) // 8
    rows = b"".join(bytes([random.randrange(5)]) + random.randbytes(row) for _ in range(height))
    extra = [png_chunk(b"PLTE", random.randbytes(3 * 2**bits))] if color_type == 3 else []
    extra += [random_chunk(random) for _ in range(random.choice((0, 0, 1, 3)))]
    data = png_file(width, height, bits, color_type, rows, *extra)
    if random.random() < 0.25:
        interlaced = bytearray(data)
        interlaced[28] = 1
        interlaced[29:33] = struct.pack(">I", zlib.crc32(bytes(interlaced[12:29])))
        return bytes(interlaced)
    return data


def random_chunk(random: Random) -> bytes:
    """A chunk of any kind with content that is right, nearly right, or noise; its checksum is wrong now and then."""
    kind = random.choice(CHUNKS)
    keyword = random.choice((b"Comment", b"x" * 80, b"", b"\xff"))
    content = random.choice(
        (
            random.randbytes(random.choice((0, 1, 4, 6, 9, 13, 26, 32, 200))),
            keyword + b"\0" + random.randbytes(9),
            keyword + b"\0\0" + zlib.compress(random.randbytes(50)),
            keyword + b"\0\0" + zlib.compress(bytes(random.choice((1_000, 3_000_000)))),
            keyword + b"\0\1\0en\0k\0" + zlib.compress(b"text"),
            b"Exif\0\0" + random.randbytes(20),
            b"II*\0\x08\0\0\0" + random.randbytes(40),
        )
    )
    chunk = png_chunk(kind, content)
    return chunk if random.random() < 0.9 else chunk[:-4] + random.randbytes(4)


def mutated_png(random: Random, data: bytes) -> bytes:
    """A PNG whose chunks are changed, dropped, doubled, moved or joined by others; their checksums are right."""
    chunks, at = [], len(PNG_START)
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(random.randint(1, 3)):
        if not chunks:
            break
        number = random.randrange(len(chunks))
        kind, content = chunks[number]
        action = random.randrange(6)
        if action == 0:
            chunks.pop(number)
        elif action == 1:
            chunks.insert(number, chunks[random.randrange(len(chunks))])
        elif action == 2:
            chunks[number] = (random.choice(CHUNKS), content)
        elif action == 3 and content:
            place = random.randrange(len(content))
            chunks[number] = (kind, content[:place] + random.randbytes(1) + content[place + 1 :])
        elif action == 4:
            chunks[number] = (kind, content[: random.randint(0, len(content))])
        else:
            whole = random_chunk(random)
            chunks.insert(number, (whole[4:8], whole[8:-4]))
    return PNG_START + b"".join(png_chunk(kind, content) for kind, content in chunks)


def _image(random: Random, mode: str) -> Image.Image:
    width, height = _side(random), _side(random)
    noise = np.random.default_rng(random.randrange(1 << 30)).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "CMYK"):
        return Image.fromarray(noise, mode)
    return Image.fromarray(noise[..., :3]).convert(mode)


def _metadata(random: Random, kind: str) -> dict:
    """EXIF, ICC profile and XMP, some of them broken, for the kinds that take them."""
    found: dict = {}
    if kind in ("JPEG", "WEBP", "PNG", "TIFF") and _coin(random):
        exif = Image.Exif()
        exif[0x0112] = random.choice((1, 3, 6, 8, 0, 9))
        exif[0x010E] = "description"
        found["exif"] = exif if _coin(random) else b"Exif\0\0" + exif.tobytes()[6:] + random.randbytes(3)
    if kind in ("JPEG", "WEBP", "PNG", "TIFF") and random.random() < 0.3:
        found["icc_profile"] = random.choice((random.randbytes(200), b"", bytes(128) + b"acsp"))
    if kind in ("JPEG", "WEBP") and random.random() < 0.2:
        found["xmp"] = b"<x:xmpmeta>" + random.randbytes(9)
    if kind == "TIFF" and "exif" in found:
        found.pop("exif")
    return found


def _side(random: Random) -> int:
    return random.choice(SIDES)


def _coin(random: Random) -> bool:
    return random.random() < 0.5
