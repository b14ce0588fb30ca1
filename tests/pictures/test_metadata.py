"""What a picture's file says about it: orientation, EXIF, colour profiles."""

import itertools
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from icmsr_core.pictures.files import WRITE_EXTENSIONS, read_picture, write_picture
from icmsr_core.pictures.metadata import Metadata
from tests.support.picture_files import HEIGHT, WIDTH, noise, picture_of, png_chunk, png_file, samples_of, tiff_file

PILLOW = int(PIL.__version__.split(".")[0])


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


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
