"""Files that are refused, in one line that names them, and writes that fail: the old file stays."""

import io
import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import WRITE_EXTENSIONS, Picture, read_picture, write_picture
from icmsr_core.pictures.metadata import Metadata
from tests.support.picture_files import HEIGHT, noise, picture_of, png_file, samples_of, tiff_file


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
    assert_refused(tmp_path / "text.png", "not a picture", "PNG, JPEG, WEBP, TIFF, BMP, GIF")
    (tmp_path / "folder.png").mkdir()
    assert_refused(tmp_path / "folder.png", "folder")
    Image.fromarray(noise(3)).save(tmp_path / "a.tga")
    assert_refused(tmp_path / "a.tga", "not a picture")


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


def test_a_format_that_needs_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmsr_core.pictures.files.readable_formats", lambda: ("PNG", "JPEG"))
    for brand, words in ((b"heic", "HEIC cannot be read here: pip install pillow-heif"), (b"avif", "update Pillow")):
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
        assert_refused(tmp_path / "a.heic", words)


def test_floating_point_tiff_in_colour_is_refused_with_the_reason(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.tif"), np.random.default_rng(0).random((8, 9, 3), np.float32))
    assert_refused(tmp_path / "a.tif", "32-bit floating-point samples have no defined black and white")


def test_a_tiff_of_a_size_that_opencv_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow does not know colours in floating point, so OpenCV is asked for the reason; of some sizes it raises."""
    cv2.imwrite(str(tmp_path / "a.tif"), np.random.default_rng(0).random((8, 9, 3), np.float32))

    def refusing(*_: object) -> None:
        raise cv2.error("static_cast<size_t>(size.height) <= CV_IO_MAX_IMAGE_HEIGHT")

    monkeypatch.setattr(cv2, "imdecode", refusing)
    assert_refused(tmp_path / "a.tif", "not a picture in a known format")
