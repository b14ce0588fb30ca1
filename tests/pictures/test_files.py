"""Pictures in files: every mode, depth and format, with files made by Pillow, OpenCV or by hand."""

import io
import logging
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, features

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import (
    READ_EXTENSIONS,
    WRITE_EXTENSIONS,
    Picture,
    find_pictures,
    from_tensor,
    read_picture,
    stored_size,
    to_tensor,
    write_picture,
)
from tests.support.picture_files import HEIGHT, WIDTH, noise, picture_of, png_chunk, png_file, samples_of, tiff_file


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


def test_16_bit_grey_is_read_where_the_header_is_not_the_first_chunk(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">2H", *row) for row in ((0, 65535), (257, 1)))
    whole = png_file(2, 2, 16, 0, rows)
    (tmp_path / "a.png").write_bytes(whole[:8] + png_chunk(b"prVt", b"0123456789abcdefgh") + whole[8:])
    grey = read_picture(tmp_path / "a.png").rgb[..., 0]
    np.testing.assert_allclose(grey, np.array([[0, 65535], [257, 1]]) / 65535, rtol=1e-6)


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


@pytest.mark.parametrize("extension", [".tif", ".webp", ".png"])
def test_of_several_frames_the_first_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extension: str
) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"a{extension}", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / f"a{extension}")
    assert picture.rgb[4, 4].round().tolist() == [1, 0, 0]
    assert "first of its 3 frames" in caplog.text


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


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("animated", [False, True])
def test_lossless_webp_stays_lossless_and_lossy_stays_lossy(tmp_path: Path, alpha: bool, animated: bool) -> None:
    samples = noise(4 if alpha else 3)
    image = Image.fromarray(samples)
    more = {"save_all": True, "append_images": [Image.fromarray(samples[::-1])]} if animated else {}
    image.save(tmp_path / "a.webp", lossless=True, exact=True, **more)
    image.save(tmp_path / "lossy.webp", quality=90, **more)
    picture = read_picture(tmp_path / "a.webp")
    assert picture.lossless
    assert not read_picture(tmp_path / "lossy.webp").lossless
    write_picture(tmp_path / "b.webp", picture)
    again = read_picture(tmp_path / "b.webp")
    assert again.lossless
    assert np.array_equal(again.rgb, picture.rgb)
    assert alpha is False or np.array_equal(again.alpha, picture.alpha)


@pytest.mark.parametrize("extension", [".jfif", ".jpe", ".JPEG"])
def test_every_extension_of_jpeg_is_read_and_written(tmp_path: Path, extension: str) -> None:
    write_picture(tmp_path / f"a{extension}", picture_of(noise(3)))
    assert find_pictures(tmp_path) == [tmp_path / f"a{extension}"]
    with Image.open(tmp_path / f"a{extension}") as image:
        assert image.format == "JPEG"


def test_the_first_frame_of_a_gif_is_read_with_its_transparency(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Image.new("P", (8, 6), 1), Image.new("P", (8, 6), 2)
    for image in (first, second):
        image.putpalette([0, 0, 0, 200, 40, 20, 10, 20, 30])
    first.putpixel((2, 3), 0)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second, second.copy()], transparency=0)
    picture = read_picture(tmp_path / "a.gif")
    assert np.allclose(picture.rgb[0, 0] * 255, (200, 40, 20))
    assert picture.alpha is not None
    assert (picture.alpha[3, 2], picture.alpha[0, 0]) == (0, 1)
    assert "only the first of its" in caplog.text
    assert find_pictures(tmp_path) == [tmp_path / "a.gif"]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), (200, 100, 50)).save(tmp_path / "a.avif", quality=100)
    picture = read_picture(tmp_path / "a.avif")
    assert picture.rgb.shape == (24, 32, 3)
    assert np.abs(picture.rgb * 255 - (200, 100, 50)).max() < 4


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_is_known_from_the_header(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    height, width = read_picture(tmp_path / "a.jpg").rgb.shape[:2]
    assert stored_size(tmp_path / "a.jpg") == (width, height)
    # A PNG may have its EXIF behind the pixels.
    png = io.BytesIO()
    Image.new("RGB", (30, 20)).save(png, "PNG")
    late = png.getvalue()[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + png.getvalue()[-12:]
    (tmp_path / "c.png").write_bytes(late)
    assert stored_size(tmp_path / "c.png") == read_picture(tmp_path / "c.png").rgb.shape[1::-1]
    other = png_chunk(b"eXIf", b"broken")
    early = png.getvalue()[:33] + png_chunk(b"eXIf", exif.tobytes()[6:]) + png.getvalue()[33:-12]
    for data in (early + other + late[-12:], late[:-12] + other + late[-12:]):
        (tmp_path / "d.png").write_bytes(data)
        assert stored_size(tmp_path / "d.png") == read_picture(tmp_path / "d.png").rgb.shape[1::-1]
    (tmp_path / "b.jpg").write_text("not a picture")
    assert stored_size(tmp_path / "b.jpg") is None


def test_no_pixel_is_decoded_for_the_size(tmp_path: Path) -> None:
    """2.7 billion pixels; their memory alone took a minute."""
    (tmp_path / "a.png").write_bytes(png_file(2, 1_325_400_066, 2, 0, b"\0\0"))
    started = time.monotonic()
    assert stored_size(tmp_path / "a.png") == (2, 1_325_400_066)
    assert time.monotonic() - started < 2
    with pytest.raises(IcmsrError, match="more than the 512 allowed"):
        read_picture(tmp_path / "a.png")


def test_a_lack_of_memory_names_the_file_and_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png_file(30, 20, 8, 0, bytes(20 * 31)))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("icmsr_core.pictures.files.upright_samples", fail)
    with pytest.raises(IcmsrError, match=r"a\.png: too little memory to read it \(30 x 20 pixels\): cut it into parts"):
        read_picture(tmp_path / "a.png")
