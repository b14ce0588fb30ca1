"""Chunks of PNG files: checksums, and the colour spaces that Pillow does not carry from file to file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
"""Chunks that say which colours the samples stand for, apart from a profile (PNG specification, section 11.3.2)."""
_HEADER_END = len(PNG_SIGNATURE) + 25  # IHDR is first and holds 13 bytes


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Kind, content and stored checksum of each chunk of the PNG file `data`, up to its end.

    Raises ValueError where the file ends in the middle of a chunk, or without its last one.
    """
    position = len(PNG_SIGNATURE)
    while True:
        if position + 12 > len(data):
            raise ValueError("it is cut short")
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if end > len(data):
            raise ValueError(f"it is cut short in its chunk {kind.decode('latin-1')}")
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        yield kind, data[position + 8 : end - 4], checksum
        if kind == b"IEND":
            return
        position = end


def without_damaged_chunks(data: bytes) -> tuple[bytes, list[str]]:
    """The PNG file `data` without chunks that are not needed and whose checksum is wrong, and the names of these.

    Viewers do the same: a damaged comment does not cost the picture. Raises ValueError for a chunk with pixels, size or
    palette that is damaged, and where the file is cut short.
    """
    kept, dropped = [PNG_SIGNATURE], []
    for kind, content, checksum in chunks(data):
        if zlib.crc32(kind + content) == checksum:
            kept.append(chunk(kind, content))
        elif kind[:1].islower():  # a small first letter marks what a reader may ignore
            dropped.append(kind.decode("latin-1"))
        else:
            raise ValueError(f"wrong checksum in its chunk {kind.decode('latin-1')}")
    return (b"".join(kept), dropped) if dropped else (data, [])


def without_pixels(file: BinaryIO) -> bytes:
    """The PNG in `file`, open at its begin, without pixels and damaged chunks: what it says about itself, wherever in
    the file it says so. Raises ValueError where the file is cut short."""
    kept, described = [file.read(len(PNG_SIGNATURE))], False
    while True:
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IDAT":
            file.seek(length + 4, 1)
            described = described or any(part[4:8] == b"eXIf" for part in kept)
            continue
        content = file.read(length + 4)
        if len(content) < length + 4 or len(kind) < 4:
            raise ValueError("it is cut short")
        if kind == b"IEND":
            return b"".join([*kept, chunk(b"IDAT", b""), head, content])
        second = kind == b"eXIf" and described  # Pillow too then goes by the one before the pixels
        if not second and zlib.crc32(kind + content[:-4]) == int.from_bytes(content[-4:], "big"):
            kept.append(head + content)


def color_chunks(data: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Kind and content of the `COLOR_CHUNKS` of the PNG file `data`, in the file's order."""
    return tuple((kind, content) for kind, content, _ in chunks(data) if kind in COLOR_CHUNKS)


def with_chunks(data: bytes, more: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The PNG file `data` with `more` chunks after its header."""
    return data[:_HEADER_END] + b"".join(chunk(kind, content) for kind, content in more) + data[_HEADER_END:]
