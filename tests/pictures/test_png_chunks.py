"""Chunks of PNG files: checksums that are wrong, and colour spaces that go from file to file."""

import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import read_picture, write_picture
from icmsr_core.pictures.png_chunks import PNG_SIGNATURE, chunk, chunks, with_chunks, without_damaged_chunks

GAMMA = (b"gAMA", struct.pack(">I", 100000))
SRGB_GAMMA = (b"gAMA", struct.pack(">I", 45455))
HDR = (b"cICP", bytes((9, 16, 0, 1)))
SRGB = (b"sRGB", b"\0")


def png(bits: int = 8) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    if bits == 16:
        Image.fromarray(samples[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    else:
        Image.fromarray(samples).save(buffer, "PNG")
    return buffer.getvalue()


def kinds(data: bytes) -> list[bytes]:
    return [kind for kind, _, _ in chunks(data)]


def test_chunks_are_those_of_the_file():
    data = png()
    assert kinds(data)[0] == b"IHDR"
    assert kinds(data)[-1] == b"IEND"
    assert PNG_SIGNATURE + b"".join(chunk(kind, content) for kind, content, _ in chunks(data)) == data
    added = with_chunks(data, (GAMMA, HDR))
    assert kinds(added)[:3] == [b"IHDR", b"gAMA", b"cICP"]


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP"])
def test_a_damaged_chunk_without_pixels_costs_a_warning_and_not_the_picture(tmp_path, caplog, kind):
    content = b"Comment\0hello" if kind == b"tEXt" else b"profile\0\0" + b"not packed"
    damaged = bytearray(with_chunks(png(), ((kind, content),)))
    place = damaged.index(kind) + 4 + len(content)
    damaged[place : place + 4] = b"\0\0\0\0"
    (tmp_path / "a.png").write_bytes(damaged)
    picture = read_picture(tmp_path / "a.png")
    assert f"{tmp_path / 'a.png'}: dropped, wrong checksum: {kind.decode()}" in caplog.text
    (tmp_path / "b.png").write_bytes(png())
    assert np.array_equal(picture.rgb, read_picture(tmp_path / "b.png").rgb)
    assert picture.metadata.text == {}


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND"])
def test_damage_to_pixels_and_size_is_refused(kind):
    damaged = bytearray(png())
    damaged[damaged.index(kind) - 4 + 8 + struct.unpack_from(">I", damaged, damaged.index(kind) - 4)[0]] ^= 1
    with pytest.raises(ValueError, match=f"wrong checksum in its chunk {kind.decode()}"):
        without_damaged_chunks(bytes(damaged))


@pytest.mark.parametrize("kept", [12, 40, 0.5, -6])
def test_a_file_that_is_cut_short_is_refused(tmp_path, kept):
    data = png()
    end = int(len(data) * kept) if isinstance(kept, float) else kept
    (tmp_path / "a.png").write_bytes(data[:end])
    with pytest.raises(IcmsrError, match=r"a\.png: the file is damaged or incomplete \(it is cut short"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("chunk_", [GAMMA, HDR, SRGB, (b"cHRM", bytes(range(32)))])
def test_a_png_s_colour_space_goes_into_the_new_png(tmp_path, bits, chunk_):
    (tmp_path / "a.png").write_bytes(with_chunks(png(bits), (chunk_,)))
    picture = read_picture(tmp_path / "a.png")
    assert picture.bits == bits
    write_picture(tmp_path / "b.png", picture)
    found = [(kind, content) for kind, content, _ in chunks((tmp_path / "b.png").read_bytes()) if kind == chunk_[0]]
    assert found == [chunk_]


@pytest.mark.parametrize(
    ("held", "named"), [([GAMMA], "gAMA"), ([HDR, SRGB], "cICP"), ([SRGB_GAMMA], ""), ([SRGB, GAMMA], ""), ([], "")]
)
@pytest.mark.parametrize("extension", ["jpg", "webp", "tif"])
def test_another_format_says_which_colour_space_is_lost(tmp_path, caplog, held, named, extension):
    caplog.set_level(logging.WARNING)
    (tmp_path / "a.png").write_bytes(with_chunks(png(), tuple(held)))
    write_picture(tmp_path / f"b.{extension}", read_picture(tmp_path / "a.png"))
    if named:
        assert f"b.{extension}: " in caplog.text
        assert f"cannot hold the colour space of the PNG ({named}" in caplog.text
    else:
        assert not caplog.text


def test_a_profile_stands_without_an_srgb_chunk(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG", icc_profile=profile)
    (tmp_path / "a.png").write_bytes(with_chunks(buffer.getvalue(), (SRGB,)))
    write_picture(tmp_path / "b.png", read_picture(tmp_path / "a.png"))
    assert kinds((tmp_path / "b.png").read_bytes()).count(b"iCCP") == 1
    assert b"sRGB" not in kinds((tmp_path / "b.png").read_bytes())
