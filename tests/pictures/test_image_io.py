"""Pictures in files: every mode, depth, format and kind of damage, with files made by Pillow, OpenCV or by hand."""

import io
import itertools
import logging
import os
import random
import stat
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import (
    READ_EXTENSIONS,
    WRITE_EXTENSIONS,
    Picture,
    find_pictures,
    from_tensor,
    read_picture,
    to_tensor,
    write_picture,
)
from icmsr_core.pictures.metadata import Metadata

HEIGHT, WIDTH = 13, 17
PILLOW = int(PIL.__version__.split(".")[0])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


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


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("extension", [".png", ".tif", ".tiff", ".PNG"])
def test_lossless_formats_give_every_sample_back(tmp_path: Path, extension: str, channels: int, bits: int) -> None:
    samples = noise(channels, bits)
    path = tmp_path / f"picture{extension}"
    write_picture(path, picture_of(samples))
    back = read_picture(path)
    assert back.bits == bits
    if extension != ".png" and channels == 2 and bits == 16 and "tif" in extension:
        assert not back.grey  # no reader here knows grey and alpha in 16-bit TIFF: it is written as RGBA
        back = replace(back, grey=True)
    assert back.grey == (channels < 3)
    np.testing.assert_array_equal(samples_of(back), samples)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_16_bit_files_are_what_opencv_reads(tmp_path: Path, extension: str, channels: int) -> None:
    samples = noise(channels, 16)
    write_picture(tmp_path / f"a{extension}", picture_of(samples))
    read = cv2.imread(str(tmp_path / f"a{extension}"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read[..., [2, 1, 0, 3][:channels]], samples)


@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_16_bit_grey_is_what_pillow_reads(tmp_path: Path, extension: str) -> None:
    samples = noise(1, 16)
    write_picture(tmp_path / f"a{extension}", picture_of(samples))
    with Image.open(tmp_path / f"a{extension}") as image:
        assert image.mode in ("I;16", "I")
        np.testing.assert_array_equal(np.asarray(image), samples[..., 0])


@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_files_that_opencv_wrote_are_read_exactly(tmp_path: Path, extension: str, channels: int) -> None:
    samples = noise(channels, 16)
    assert cv2.imwrite(
        str(tmp_path / f"a{extension}"), samples[..., [2, 1, 0, 3][:channels]] if channels > 1 else samples[..., 0]
    )
    picture = read_picture(tmp_path / f"a{extension}")
    assert picture.bits == 16
    np.testing.assert_array_equal(samples_of(picture), samples)


@pytest.mark.parametrize(
    ("extension", "mode"),
    [
        (extension, mode)
        for extension, modes in {
            ".png": ["1", "L", "LA", "RGB", "RGBA", "P"],
            ".tif": ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK"],
            ".webp": ["L", "RGB", "RGBA"],
            ".jpg": ["L", "RGB", "CMYK", "YCbCr"],
            ".bmp": ["1", "L", "RGB", "RGBA", "P"],
        }.items()
        for mode in modes
    ],
)
def test_every_mode_of_pillow_is_read_as_pillow_converts_it(tmp_path: Path, mode: str, extension: str) -> None:
    rgba = Image.fromarray(noise(4))
    image = (
        rgba.convert("RGB").quantize(16)
        if mode == "P"
        else rgba.convert("L").convert("1")
        if mode == "1"
        else Image.merge("LA", [rgba.getchannel(0), rgba.getchannel(3)])
        if mode == "LA"
        else rgba.convert("RGB").convert(mode)
        if mode in ("CMYK", "YCbCr")
        else rgba.convert(mode)
    )
    path = tmp_path / f"a{extension}"
    image.save(path, **({"lossless": True, "exact": True} if extension == ".webp" else {}))
    with Image.open(path) as stored:
        grey, has_alpha = stored.mode in ("1", "L", "LA"), stored.mode in ("LA", "RGBA")
        expected = np.asarray(stored.convert("RGBA"))
    picture = read_picture(path)
    assert (picture.bits, picture.grey, picture.alpha is not None) == (8, grey, has_alpha)
    np.testing.assert_array_equal((picture.rgb * 255).round(), expected[..., :3])
    if has_alpha:
        np.testing.assert_array_equal((picture.alpha * 255).round(), expected[..., 3])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_color_key_becomes_alpha(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(noise(3)).convert(mode)
    first = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=first)
    picture = read_picture(tmp_path / "a.png")
    expected = np.array([[image.getpixel((x, y)) != first for x in range(WIDTH)] for y in range(HEIGHT)])
    assert picture.grey == (mode in "1L")
    np.testing.assert_array_equal(picture.alpha, expected.astype(np.float32))
    np.testing.assert_array_equal((picture.rgb * 255).round(), np.asarray(image.convert("RGB")))


def test_a_palette_with_graded_transparency_becomes_alpha(tmp_path: Path) -> None:
    image = Image.fromarray(noise(3)).quantize(8)
    table = np.array([0, 40, 80, 120, 160, 200, 240, 255], np.uint8)
    image.save(tmp_path / "a.png", transparency=table.tobytes())
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal((picture.alpha * 255).round(), table[np.asarray(image)])
    np.testing.assert_array_equal((picture.rgb * 255).round(), np.asarray(image.convert("RGB")))


def test_a_color_key_of_two_bit_grey_becomes_alpha(tmp_path: Path) -> None:
    rows = bytes([0, 0b00_01_10_11])
    (tmp_path / "a.png").write_bytes(png_file(4, 1, 2, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 2))))
    picture = read_picture(tmp_path / "a.png")
    assert samples_of(picture)[0].tolist() == [[0, 255], [85, 255], [170, 0], [255, 255]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_color_key_of_16_bits_becomes_alpha(tmp_path: Path, channels: int) -> None:
    samples = noise(channels, 16)
    samples[3, 5] = samples[0, 0]
    samples[4, 5] = samples[0, 0] ^ 1  # differs in the lowest bit of the 16 only
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    key = png_chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())
    (tmp_path / "a.png").write_bytes(png_file(WIDTH, HEIGHT, 16, 0 if channels == 1 else 2, rows, key))
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(samples_of(picture)[..., :channels], samples)
    assert np.argwhere(picture.alpha == 0).tolist() == [[0, 0], [3, 5]]
    assert ((picture.alpha == 0) | (picture.alpha == 1)).all()


def test_grey_and_alpha_of_16_bits_are_read_from_a_foreign_png(tmp_path: Path) -> None:
    samples = noise(2, 16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    (tmp_path / "a.png").write_bytes(png_file(WIDTH, HEIGHT, 16, 4, rows))
    picture = read_picture(tmp_path / "a.png")
    assert picture.grey
    np.testing.assert_array_equal(samples_of(picture), samples)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "photometric", "tags"), [(1, 1, {}), (3, 2, {}), (4, 2, {"t338": 2})])
def test_16_bit_tiff_is_read_in_both_byte_orders(
    tmp_path: Path, order: str, channels: int, photometric: int, tags: dict[str, int]
) -> None:
    samples = noise(channels, 16)
    (tmp_path / "a.tif").write_bytes(tiff_file(samples, photometric, order=order, **tags))
    np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "a.tif")), samples)


def test_16_bit_tiff_is_turned_round_where_zero_is_white(tmp_path: Path) -> None:
    samples = noise(1, 16)
    (tmp_path / "a.tif").write_bytes(tiff_file(samples, 0))
    np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "a.tif")), 65535 - samples)


def test_tiff_s_fourth_channel_is_divided_out_or_dropped_as_the_file_says(tmp_path: Path) -> None:
    straight = noise(4, 16)
    straight[..., 3] |= 0x4000  # enough alpha for the division to be precise
    stored = straight.copy()
    stored[..., :3] = np.rint(straight[..., :3] * (straight[..., 3:] / 65535)).astype(np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff_file(stored, 2, t338=1))
    picture = read_picture(tmp_path / "a.tif")
    assert np.abs(samples_of(picture).astype(int) - straight).max() <= 2
    (tmp_path / "b.tif").write_bytes(tiff_file(stored, 2, t338=0))
    np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "b.tif")), stored[..., :3])


def test_tiff_of_16_bit_cmyk_is_read_as_8_bits(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_file(np.full((2, 3, 4), 0, np.uint16), 5))
    picture = read_picture(tmp_path / "a.tif")
    assert (picture.bits, picture.grey) == (8, False)
    assert (picture.rgb == 1).all()


@pytest.mark.parametrize(("extension", "grey_back"), [(".jpg", True), (".jpeg", True), (".webp", False)])
def test_lossy_formats_are_close_and_8_bit(tmp_path: Path, extension: str, grey_back: bool) -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    grey = np.broadcast_to(ramp[None, :, None], (48, 64, 3)).copy()
    color = grey * np.array([1, 0.5, 0.2], np.float32)
    for rgb, is_grey in ((grey, True), (color, False)):
        write_picture(tmp_path / f"a{extension}", Picture(rgb=rgb, bits=16, grey=is_grey))
        back = read_picture(tmp_path / f"a{extension}")
        assert (back.bits, back.grey) == (8, is_grey and grey_back)
        assert np.abs(back.rgb - rgb).mean() < 0.01


def test_jpeg_keeps_full_color_resolution_and_obeys_quality(tmp_path: Path) -> None:
    picture = picture_of(noise(3, height=64, width=64))
    sizes = []
    for quality in (10, 95):
        write_picture(tmp_path / "a.jpg", picture, quality)
        sizes.append((tmp_path / "a.jpg").stat().st_size)
        with Image.open(tmp_path / "a.jpg") as image:
            assert {layer[1:3] for layer in image.layer} == {(1, 1)}
    assert sizes[0] * 2 < sizes[1]


@pytest.mark.parametrize("channels", [3, 4])
def test_webp_of_quality_100_is_lossless(tmp_path: Path, channels: int) -> None:
    samples = noise(channels)
    write_picture(tmp_path / "a.webp", picture_of(samples), quality=100)
    np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "a.webp")), samples)


def test_webp_keeps_alpha(tmp_path: Path) -> None:
    samples = noise(4)
    write_picture(tmp_path / "a.webp", picture_of(samples))
    np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "a.webp"))[..., 3], samples[..., 3])


@pytest.mark.parametrize("grey", [False, True])
def test_jpeg_lays_alpha_on_white_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, grey: bool) -> None:
    alpha = np.zeros((16, 32), np.float32)
    alpha[:, 16:] = 0.5
    with caplog.at_level(logging.WARNING):
        write_picture(tmp_path / "a.jpg", Picture(np.zeros((16, 32, 3), np.float32), alpha, grey=grey))
    assert "a.jpg" in caplog.text
    assert "white" in caplog.text
    back = read_picture(tmp_path / "a.jpg").rgb
    assert np.abs(back[:, :12] - 1).max() < 0.02
    assert np.abs(back[:, 20:] - 0.5).max() < 0.02


@pytest.mark.parametrize("extension", WRITE_EXTENSIONS)
def test_a_picture_of_one_pixel_comes_back(tmp_path: Path, extension: str) -> None:
    for bits in (8, 16):
        write_picture(tmp_path / f"a{extension}", Picture(np.full((1, 1, 3), 0.5, np.float32), bits=bits))
        back = read_picture(tmp_path / f"a{extension}")
        assert back.rgb.shape == (1, 1, 3)
        assert np.abs(back.rgb - 0.5).max() < 0.01


@pytest.mark.parametrize("bits", [8, 16])
def test_values_are_clamped_and_rounded_to_the_nearest_level(tmp_path: Path, bits: int) -> None:
    peak = 2**bits - 1
    values = np.array([-3, 0.49 / peak, 0.51 / peak, 1.49 / peak, 1 + 1e-3, 7], np.float32)
    rgb = np.broadcast_to(values[None, :, None], (2, 6, 3)).copy()
    write_picture(tmp_path / "a.png", Picture(rgb, alpha=rgb[..., 0].copy(), bits=bits))
    samples = samples_of(read_picture(tmp_path / "a.png"))
    for channel in range(4):
        assert samples[0, :, channel].tolist() == [0, 0, 1, 1, peak, peak]


def test_grey_output_is_the_luma_of_a_picture_that_has_gained_color(tmp_path: Path) -> None:
    rgb = np.zeros((4, 4, 3), np.float32)
    rgb[..., 1] = 1
    write_picture(tmp_path / "a.png", Picture(rgb, grey=True))
    assert (samples_of(read_picture(tmp_path / "a.png")) == 150).all()  # .587 * 255 = 149.7


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp", ".tif", "deflated.tif"])
def test_orientation_is_applied_and_reset(tmp_path: Path, extension: str, orientation: int) -> None:
    image = Image.fromarray(np.kron(noise(3, height=3, width=4), np.ones((16, 16, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[271] = "Maker"
    options = {"compression": "tiff_adobe_deflate"} if "deflated" in extension else {}
    image.save(tmp_path / f"a{extension}", exif=exif, **options)
    # The reference: Pillow's own turning of the picture before it went into the file.
    tagged = image.copy()
    tagged.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(tagged), np.float32) / 255
    picture = read_picture(tmp_path / f"a{extension}")
    assert picture.rgb.shape == expected.shape
    assert np.abs(picture.rgb - expected).mean() < (0.0001 if extension[-3:] in ("png", "tif") else 0.05)
    for output in (".jpg", ".png", ".webp", ".tif"):
        write_picture(tmp_path / f"b{output}", picture)
        with Image.open(tmp_path / f"b{output}") as written:
            assert written.getexif().get(0x0112) == 1
            assert written.getexif().get(271) == "Maker"
        assert read_picture(tmp_path / f"b{output}").rgb.shape == expected.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "channels"), [("tif", 3), ("tif", 1), ("png", 3), ("png", 1)])
def test_orientation_is_applied_to_16_bits(tmp_path: Path, kind: str, channels: int, orientation: int) -> None:
    samples = noise(channels, 16)
    if kind == "tif":
        data = tiff_file(samples, 2 if channels == 3 else 1, t274=orientation)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        data = png_file(WIDTH, HEIGHT, 16, 2 if channels == 3 else 0, rows, chunk)
    (tmp_path / f"a.{kind}").write_bytes(data)
    expected = []
    for channel in range(channels):
        plane = Image.fromarray(samples[..., channel].astype(np.int32))
        plane.getexif()[0x0112] = orientation
        expected.append(np.asarray(ImageOps.exif_transpose(plane)))
    picture = read_picture(tmp_path / f"a.{kind}")
    assert picture.bits == 16
    np.testing.assert_array_equal(samples_of(picture), np.dstack(expected))


# --- metadata --------------------------------------------------------------------------------------------------------


def described(path: Path, **options: object) -> None:
    """Write an RGB file with everything its format holds."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[272] = "Model"
    exif[0x8769] = {36867: "2024:01:02 03:04:05", 40962: WIDTH}
    exif[0x8825] = {1: "N"}
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" dc:title="caf\xc3\xa9"/></x:xmpmeta>'
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Title", "a title")
        info.add_itxt("Comment", "Grüße, 日本")
        info.add_text("Raw profile type exif", "old")
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = info
    elif path.suffix == ".tif":
        exif[700] = xmp
    elif path.suffix == ".jpg":
        options["extra"] = b"\xff\xe1" + struct.pack(">H", 31 + len(xmp)) + b"http://ns.adobe.com/xap/1.0/\0" + xmp
    else:
        options["xmp"] = xmp
    Image.fromarray(noise(3)).save(path, exif=exif.tobytes(), icc_profile=SRGB, dpi=(300, 150), **options)


@pytest.mark.parametrize(
    ("source", "target", "bits"),
    [
        *itertools.product([".png", ".jpg", ".webp", ".tif"], [".png", ".jpg", ".webp", ".tif"], [8]),
        *itertools.product([".png", ".jpg", ".webp", ".tif"], [".png", ".tif"], [16]),
    ],
)
def test_metadata_go_along_and_the_size_in_them_is_dropped(tmp_path: Path, source: str, target: str, bits: int) -> None:
    described(tmp_path / f"a{source}")
    picture = read_picture(tmp_path / f"a{source}")
    larger = np.repeat(np.repeat(picture.rgb, 2, axis=0), 2, axis=1)
    write_picture(tmp_path / f"b{target}", replace(picture, rgb=larger, bits=bits))
    with Image.open(tmp_path / f"b{target}") as image:
        image.load()
        exif = image.getexif()
        assert image.size == (2 * HEIGHT, 2 * WIDTH)  # turned
        assert image.info["icc_profile"] == SRGB
        assert exif[272] == "Model"
        assert exif.get(0x0112, 1) == 1
        assert exif.get_ifd(0x8769)[36867] == "2024:01:02 03:04:05"
        assert 40962 not in exif.get_ifd(0x8769)  # the width before
        assert exif.get_ifd(0x8825)[1] == "N"
        if target != ".webp" and source != ".webp":
            assert image.info["dpi"] == pytest.approx((300, 150), rel=1e-3)
    written = read_picture(tmp_path / f"b{target}")
    assert written.bits == bits
    np.testing.assert_allclose(written.rgb, larger, atol=1 if target in (".jpg", ".webp") else 0.002)
    if target != ".jpg" or PILLOW >= 11:  # Pillow writes XMP into JPEG since version 11
        assert "café" in written.metadata.xmp.decode()
        assert b"Orientation" not in written.metadata.xmp
    assert written.metadata.text == (
        {"Title": "a title", "Comment": "Grüße, 日本"} if source == target == ".png" else {}
    )


def test_metadata_of_the_layout_are_not_carried(tmp_path: Path) -> None:
    described(tmp_path / "a.tif")
    exif = Image.Exif()
    exif.load(read_picture(tmp_path / "a.tif").metadata.exif)
    assert set(exif) <= {0x0112, 272, 0x8769, 0x8825}


def test_no_metadata_stays_none(tmp_path: Path) -> None:
    for extension in WRITE_EXTENSIONS:
        write_picture(tmp_path / f"a{extension}", picture_of(noise(3)))
        assert read_picture(tmp_path / f"a{extension}").metadata == Metadata()


def test_profile_of_another_color_space_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_picture(tmp_path / "grey.png", picture_of(noise(1), metadata=Metadata(icc_profile=SRGB)))
    assert "profile" in caplog.text
    assert read_picture(tmp_path / "grey.png").metadata.icc_profile is None
    grey_profile = SRGB[:16] + b"GRAY" + SRGB[20:]
    write_picture(tmp_path / "grey.png", picture_of(noise(1, 16), metadata=Metadata(icc_profile=grey_profile)))
    assert read_picture(tmp_path / "grey.png").metadata.icc_profile == grey_profile


def test_exif_too_long_for_jpeg_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[270] = "x" * 70000
    picture = picture_of(noise(3), metadata=Metadata(exif=exif.tobytes()))
    write_picture(tmp_path / "a.jpg", picture)
    assert "EXIF" in caplog.text
    assert read_picture(tmp_path / "a.jpg").metadata.exif is None
    write_picture(tmp_path / "a.png", picture)
    assert len(read_picture(tmp_path / "a.png").metadata.exif) > 70000


def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    Image.fromarray(noise(3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fjunk")
    assert read_picture(tmp_path / "a.jpg").metadata.exif is None


def cmyk_profile() -> bytes:
    """An ICC v2 profile of an odd press: no ink is black, and black ink alone (K) is white paper."""
    identity = bytes(range(256))
    grid = bytearray()
    for _, _, _, black in itertools.product(range(2), repeat=4):
        grid += bytes([255 * black, 128, 128])  # Lab in 8 bits
    one = struct.pack(">i", 0x10000)
    zero = bytes(4)
    matrix = one + zero * 3 + one + zero * 3 + one
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + bytes(grid) + identity * 3
    lut += bytes(-len(lut) % 4)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    tags = [(b"A2B0", lut), (b"wtpt", white)]
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    header[8:12] = bytes([2, 0x40, 0, 0])
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = white[8:]
    return bytes(header) + table + body


@pytest.mark.parametrize("extension", [".jpg", ".tif"])
def test_cmyk_goes_through_its_profile_which_is_not_carried_on(tmp_path: Path, extension: str) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:, 3] = 255
    image = Image.frombytes("CMYK", (16, 16), inks.tobytes())
    image.save(tmp_path / f"a{extension}", icc_profile=cmyk_profile())
    picture = read_picture(tmp_path / f"a{extension}")
    assert picture.rgb[:, :6].max() < 0.05
    assert picture.rgb[:, 10:].min() > 0.95
    assert picture.metadata.icc_profile is None
    assert not picture.grey


def test_cmyk_with_a_broken_or_no_profile_uses_the_plain_formula(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    image.save(tmp_path / "none.tif")
    image.save(tmp_path / "broken.tif", icc_profile=cmyk_profile()[:150])
    for name in ("none.tif", "broken.tif"):
        picture = read_picture(tmp_path / name)
        assert picture.rgb.max() < 0.02
        assert picture.metadata.icc_profile is None
    assert "profile" in caplog.text


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".tif", ".webp", ".png"])
def test_of_several_frames_the_first_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extension: str
) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"a{extension}", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / f"a{extension}")
    assert picture.rgb[4, 4].round().tolist() == [1, 0, 0]
    assert "first of its 3 frames" in caplog.text


# --- errors ----------------------------------------------------------------------------------------------------------


def refusal(path: Path, **options: int) -> str | None:
    """The message of the error, or None if there is a picture with finite values."""
    try:
        picture = read_picture(path, **options)
    except IcmsrError as error:
        return str(error)
    assert np.isfinite(picture.rgb).all()
    return None


def assert_refused(path: Path, *words: str, **options: int) -> None:
    message = refusal(path, **options)
    assert message is not None
    assert path.name in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_files_that_are_not_pictures_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing.png", "no such file")
    (tmp_path / "empty.png").touch()
    assert_refused(tmp_path / "empty.png", "empty")
    (tmp_path / "text.png").write_text("This is a letter,\nnot a picture.\n" * 50)
    assert_refused(tmp_path / "text.png", "not a picture", "PNG, JPEG, WebP, TIFF or BMP")
    (tmp_path / "folder.png").mkdir()
    assert_refused(tmp_path / "folder.png", "folder")
    Image.fromarray(noise(3)).save(tmp_path / "animation.gif")
    assert_refused(tmp_path / "animation.gif", "not a picture")


def test_the_content_counts_and_not_the_extension(tmp_path: Path) -> None:
    samples = noise(3)
    Image.fromarray(samples).save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "a.jpg")), samples)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read and write everything")
def test_files_without_permission_are_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", picture_of(noise(3)))
    (tmp_path / "a.png").chmod(0)
    assert_refused(tmp_path / "a.png", "cannot be read")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(IcmsrError, match="cannot be written"):
        write_picture(closed / "a.png", picture_of(noise(3)))


def encoded(extension: str, bits: int) -> bytes:
    if bits == 16:
        ok, data = cv2.imencode(extension, noise(3, 16, 64, 64))
        assert ok
        return data.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(noise(3, 8, 64, 64)).save(buffer, Image.registered_extensions()[extension])
    return buffer.getvalue()


KINDS = [(".png", 8), (".png", 16), (".jpg", 8), (".webp", 8), (".tif", 8), (".tif", 16), (".bmp", 8)]


@pytest.mark.parametrize(("extension", "bits"), KINDS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95])
def test_files_cut_short_are_refused(tmp_path: Path, extension: str, bits: int, kept: float) -> None:
    data = encoded(extension, bits)
    path = tmp_path / f"cut{extension}"
    path.write_bytes(data[: int(len(data) * kept)])
    assert_refused(path)


def test_a_flipped_byte_in_a_png_is_noticed(tmp_path: Path) -> None:
    for bits in (8, 16):
        data = bytearray(encoded(".png", bits))
        data[-40] ^= 0x10  # among the last rows, where unpacking alone may go on
        (tmp_path / "a.png").write_bytes(data)
        assert_refused(tmp_path / "a.png", "damaged")


@pytest.mark.parametrize(("extension", "bits"), KINDS)
def test_damage_of_any_kind_ends_in_one_line_or_a_whole_picture(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, extension: str, bits: int
) -> None:
    whole = encoded(extension, bits)
    rng = random.Random(0)
    path = tmp_path / f"a{extension}"
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            # Half of the blows hit the headers at the beginning or the directory at the end.
            near = rng.choice(
                [
                    range(8, min(400, len(data))),
                    range(max(0, len(data) - 400), len(data)),
                    range(len(data)),
                    range(len(data)),
                ]
            )
            data[rng.choice(near)] = rng.randrange(256)
        path.write_bytes(data)
        message = refusal(path, max_pixels=1_000_000)
        assert message is None or (path.name in message and "\n" not in message)
    assert not recwarn.list  # Pillow's remarks would be lines on stderr


@pytest.mark.parametrize(
    ("samples", "photometric", "tags"),
    [
        (noise(1, 16), 1, {"t339": 2}),  # signed
        (noise(2, 16).reshape(HEIGHT, -1, 1).repeat(2, axis=1), 1, {"t339": 3}),  # float16
    ],
)
def test_samples_without_a_known_range_are_refused(
    tmp_path: Path, samples: np.ndarray, photometric: int, tags: dict[str, int]
) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_file(samples, photometric, **tags))
    assert_refused(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_without_a_known_range_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    assert_refused(tmp_path / "a.tif", "8 or 16 bits")


def test_colors_that_the_two_decoders_read_differently_are_refused(tmp_path: Path) -> None:
    samples = noise(3, 16)
    (tmp_path / "a.tif").write_bytes(tiff_file(samples, 2, planar=True))
    message = refusal(tmp_path / "a.tif")
    if message is None:  # versions that read separate planes rightly
        np.testing.assert_array_equal(samples_of(read_picture(tmp_path / "a.tif")), samples)
    else:
        assert "cannot be trusted" in message


def test_pictures_that_are_too_large_are_refused(tmp_path: Path) -> None:
    # 300 megapixels are beyond Pillow's own limit. The header is enough: nothing is unpacked.
    (tmp_path / "large.png").write_bytes(png_file(20000, 15000, 8, 2, b""))
    before = Image.MAX_IMAGE_PIXELS
    assert_refused(tmp_path / "large.png", "20000 x 15000", "300 megapixels", max_pixels=299_000_000)
    (tmp_path / "huge.png").write_bytes(png_file(30000, 20000, 8, 2, b""))
    assert_refused(tmp_path / "huge.png", "600 megapixels", "512 allowed")
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):  # ... which still stands for everyone else
        Image.open(tmp_path / "huge.png")


def test_pillows_lower_limit_does_not_bind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    write_picture(tmp_path / "a.png", picture_of(noise(3, height=64, width=64)))
    write_picture(tmp_path / "a.tif", picture_of(noise(3, height=64, width=64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_picture(tmp_path / "a.png").rgb.shape == read_picture(tmp_path / "a.tif").rgb.shape == (64, 64, 3)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.gif", ["a.gif", *WRITE_EXTENSIONS]),
        ("a.bmp", ["a.bmp", *WRITE_EXTENSIONS]),
        ("a", ["without extension"]),
        ("nowhere/a.png", ["does not exist", "nowhere"]),
        ("folder.png", ["is a folder"]),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path, name: str, words: list[str]) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IcmsrError) as caught:
        write_picture(tmp_path / name, picture_of(noise(3)))
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_quality_size_and_values_are_checked(tmp_path: Path) -> None:
    picture = picture_of(noise(3))
    for quality in (0, 101):
        with pytest.raises(IcmsrError, match=str(quality)):
            write_picture(tmp_path / "a.jpg", picture, quality)
    wide = Picture(np.zeros((1, 16384, 3), np.float32))
    with pytest.raises(IcmsrError, match=r"16383.*16384 x 1"):
        write_picture(tmp_path / "a.webp", wide)
    write_picture(tmp_path / "a.webp", Picture(wide.rgb[:, 1:].copy()))
    with pytest.raises(IcmsrError, match="65500"):
        write_picture(tmp_path / "b.jpg", Picture(np.zeros((65501, 1, 3), np.float32)))
    for bad in (np.nan, np.inf):
        rgb = picture.rgb.copy()
        rgb[2, 3, 1] = bad
        with pytest.raises(IcmsrError, match="NaN or infinite"):
            write_picture(tmp_path / "c.png", replace(picture, rgb=rgb))
        with pytest.raises(IcmsrError, match="NaN or infinite"):
            write_picture(tmp_path / "c.png", replace(picture, alpha=rgb[..., 1].copy()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.webp"]


@pytest.mark.parametrize(
    "fields",
    [
        {"rgb": np.zeros((4, 4), np.float32)},
        {"rgb": np.zeros((4, 4, 3), np.uint8)},
        {"rgb": np.zeros((0, 4, 3), np.float32)},
        {"rgb": np.zeros((4, 4, 3), np.float32), "alpha": np.zeros((4, 5), np.float32)},
        {"rgb": np.zeros((4, 4, 3), np.float32), "bits": 12},
    ],
)
def test_a_picture_checks_its_arrays(fields: dict[str, object]) -> None:
    with pytest.raises(IcmsrError):
        Picture(**fields)


# --- atomicity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("fsync", KeyboardInterrupt()),
        ("fsync", OSError(28, "No space left")),
        ("replace", OSError(13, "Permission denied")),
    ],
)
def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "a.png"
    if existing:
        path.write_bytes(b"the old file")

    def fail(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1 + existing  # the temporary file is in the same folder
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else IcmsrError) as caught:
        write_picture(path, picture_of(noise(3)))
    if isinstance(error, OSError):
        assert "a.png" in str(caught.value)
        assert error.strerror in str(caught.value)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([b"the old file"] if existing else [])


def test_an_encoder_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"the old file")
    with pytest.raises(IcmsrError, match=r"a\.png.*encoded"):
        # A keyword that PNG cannot hold makes Pillow fail after the header is out.
        write_picture(path, picture_of(noise(3), metadata=Metadata(text={"スキー": "x"})))
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"the old file"]


def test_a_file_is_replaced_by_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"the old file")
    write_picture(path, picture_of(noise(3)))
    np.testing.assert_array_equal(samples_of(read_picture(path)), noise(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", picture_of(noise(3)))
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# --- names, folders, tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extension", WRITE_EXTENSIONS)
def test_file_names_may_hold_any_character(tmp_path: Path, extension: str, bits: int) -> None:
    folder = tmp_path / "Ordner für Bilder 写真"
    folder.mkdir()
    path = folder / f"Übergröße 鳥 🦜{extension}"
    write_picture(path, picture_of(noise(3, bits)))
    assert read_picture(str(path)).rgb.shape == (HEIGHT, WIDTH, 3)
    assert find_pictures(folder) == [path]


def test_a_folder_s_pictures_are_found_by_extension_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.JpEg", "d.webp", "e.tif", "f.TIFF", "g.bmp", ".hidden.png", "notes.txt", "png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inside.png").touch()
    found = find_pictures(str(tmp_path))
    assert [path.name for path in found] == ["a.jpg", "b.PNG", "c.JpEg", "d.webp", "e.tif", "f.TIFF", "g.bmp"]
    assert {path.suffix.lower() for path in found} <= set(READ_EXTENSIONS)
    (tmp_path / "empty").mkdir()
    assert find_pictures(tmp_path / "empty") == []
    with pytest.raises(IcmsrError, match="no such folder"):
        find_pictures(tmp_path / "missing")
    with pytest.raises(IcmsrError, match="not a folder"):
        find_pictures(tmp_path / "a.jpg")


def test_arrays_become_nchw_tensors_and_back() -> None:
    picture = picture_of(noise(4))
    rgb, alpha = to_tensor(picture.rgb), to_tensor(picture.alpha)
    assert (rgb.shape, alpha.shape) == ((1, 3, HEIGHT, WIDTH), (1, 1, HEIGHT, WIDTH))
    assert rgb.dtype == alpha.dtype == torch.float32
    assert rgb.is_contiguous()
    assert rgb[0, 2, 5, 7] == picture.rgb[5, 7, 2]
    np.testing.assert_array_equal(from_tensor(rgb), picture.rgb)
    np.testing.assert_array_equal(from_tensor(alpha), picture.alpha)
    assert from_tensor(rgb.to(torch.bfloat16)).dtype == np.float32
    before = picture.rgb.copy()
    rgb.zero_()
    np.testing.assert_array_equal(picture.rgb, before)
    for shape in ((3, 4, 4), (2, 3, 4, 4), (1, 4, 4, 4)):
        with pytest.raises(IcmsrError, match=r"\[1, 3 or 1"):
            from_tensor(torch.zeros(shape))


@pytest.mark.parametrize("grey", [False, True])
def test_writing_holds_no_copy_of_the_picture(tmp_path: Path, grey: bool) -> None:
    """Of a large picture in float32, beside the picture that is given: what numpy holds at most while it is written."""
    picture = Picture(rgb=np.full((3000, 1000, 3), 0.5, np.float32), alpha=np.ones((3000, 1000), np.float32), grey=grey)
    write_picture(tmp_path / "first.png", picture)  # what is imported then is not counted
    tracemalloc.start()
    try:
        write_picture(tmp_path / "second.png", picture)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < picture.rgb.nbytes
