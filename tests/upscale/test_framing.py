"""Sizes as people think of them: what of a picture is used, what the model does, and what is said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.errors import IcmsrError
from icmsr_core.upscale.framing import FITS, Framing, exact_frame
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import cut, fitted, resize, resized_into
from tests.support.pictures import photo
from tests.support.toy_backbone import Toy

SIDES = st.integers(1, 300)


@pytest.mark.parametrize(
    ("wish", "target", "work"),
    [
        ({"longest": 400}, (300, 400), (300, 400)),
        ({"shortest": 400}, (400, 533), (400, 533)),
        ({"megapixels": 0.25}, (443, 591), (443, 591)),
        ({"size": (400, 500)}, (500, 400), (500, 400)),
        ({"longest": 1600}, (1200, 1600), (600, 800)),
        ({"longest": 50}, (38, 50), (38, 50)),
        ({"size": (900, 100)}, (100, 900), (100, 800)),
        ({}, (300, 400), (300, 400)),
    ],
)
def test_a_wish_gives_the_size_of_the_result_and_that_of_the_model(wish: dict, target: tuple, work: tuple) -> None:
    frame = UpscaleSettings(**wish).frame(75, 100)
    assert (frame.target, frame.work) == (target, work)
    assert frame.crop == (0, 0, 75, 100)


@pytest.mark.parametrize(
    ("wish", "kinds"),
    [
        ({}, []),
        ({"longest": 401}, []),
        ({"longest": 1600}, ["more than 8 times as large"]),
        ({"longest": 50}, ["smaller than the picture"]),
        ({"size": (400, 300), "fit": "crop"}, []),
        ({"size": (400, 200)}, ["stretched"]),
        ({"size": (400, 200), "fit": "crop"}, ["cropped"]),
        ({"size": (400, 200), "fit": "pad"}, ["padded"]),
    ],
)
def test_what_is_special_about_a_size_is_said(wish: dict, kinds: list[str]) -> None:
    assert [remark.kind for remark in UpscaleSettings(**wish).frame(75, 100).remarks()] == kinds


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"longest": 0}, "longest must be at least 1 pixel, got 0"),
        ({"shortest": -5}, "shortest must be at least 1 pixel, got -5"),
        ({"megapixels": 0.0}, "megapixels must be above 0, got 0"),
        ({"megapixels": float("nan")}, "megapixels must be above 0, got nan"),
        (
            {"longest": 5, "megapixels": 2.5},
            "only one of .* can be given, got longest 5 and megapixels 2.5",
        ),
        ({"fit": "fill"}, "fit must be one of stretch, crop, pad, got 'fill'"),
    ],
)
def test_wrong_wishes_are_refused(values: dict, text: str) -> None:
    with pytest.raises(IcmsrError, match=text):
        UpscaleSettings(**values)


@given(height=SIDES, width=SIDES, rows=SIDES, columns=SIDES, fit=st.sampled_from(FITS))
@settings(deadline=None, max_examples=80)
def test_every_exact_size_is_reached_within_what_the_model_does(
    height: int, width: int, rows: int, columns: int, fit: str
) -> None:
    frame = exact_frame((height, width), (rows, columns), fit)
    result = resized_into(torch.ones(1, 1, height, width), frame)
    assert result.shape == (1, 1, rows, columns)
    area = frame.crop
    assert area.top >= 0
    assert area.top + area.height <= height
    assert area.left + area.width <= width
    assert all(work <= 8 * own for work, own in zip(frame.work, (area.height, area.width)))
    if fit != "pad":
        assert (result - 1).abs().max() < 1e-5, "no bars"
    else:  # the bars are even on both sides, and of one axis only
        bars = (result[0, 0] == 0).nonzero()
        assert abs(float(result[0, 0, (rows - 1) // 2, (columns - 1) // 2]) - 1) < 1e-5
        assert len(bars) == 0 or (frame.scaled[0] == rows or frame.scaled[1] == columns)


@given(height=SIDES, width=SIDES, rows=SIDES, columns=SIDES)
@settings(deadline=None, max_examples=60)
def test_crop_and_pad_keep_the_aspect_and_the_middle(height: int, width: int, rows: int, columns: int) -> None:
    crop = exact_frame((height, width), (rows, columns), "crop")
    for top, used, own in zip(crop.crop[:2], crop.crop[2:], (height, width)):
        assert own - used == 2 * top
    for frame in (crop, exact_frame((height, width), (rows, columns), "pad")):
        factors = [scaled / own for scaled, own in zip(frame.scaled, frame.crop[2:])]
        # To the rounding of one side to whole pixels.
        assert abs(factors[0] - factors[1]) * min(frame.crop[2:]) <= 1.01


def test_cropping_gives_the_middle_of_the_enlarged_picture() -> None:
    image = photo(60, 90)
    frame = exact_frame((60, 90), (240, 240), "crop")
    assert frame.crop == (0, 15, 60, 60)
    whole = resize(image, 240, 360)[..., 60:300]
    assert (resized_into(image, frame) - whole)[..., 8:-8].abs().max() < 1e-5


def test_a_crop_is_found_in_a_map_of_another_size() -> None:
    frame = exact_frame((60, 90), (240, 240), "crop")
    assert frame.crop_in(60, 90) == frame.crop
    assert frame.crop_in(120, 180) == (0, 30, 120, 120)
    assert frame.crop_in(1, 1) == (0, 0, 1, 1)
    assert cut(torch.rand(2, 4, 30, 45), frame).shape == (2, 4, 30, 31)


@pytest.mark.parametrize(
    "wish", [{"longest": 900}, {"size": (130, 70), "fit": "crop"}, {"size": (130, 70), "fit": "pad"}, {"longest": 9}]
)
def test_the_model_sees_the_part_at_the_size_of_its_work(wish: dict) -> None:
    """A backbone that changes nothing: the result is the enlarged picture."""
    image, toy = photo(30, 30), Toy()
    given = UpscaleSettings(tile=64, overlap=16, color_fix="none", **wish)
    frame: Framing = plan_upscale(toy.descriptor, 30, 30, given).frame
    result = upscale(toy, image, given)
    assert result.shape[2:] == frame.target
    assert (result - resized_into(image, frame)).abs().max() < 1e-5
    seen = max(shape[-1] for name, shape in toy.seen if name == "encode")
    assert seen <= 8 * 30 + 15, "never more than the model does, and padding"


def test_fitting_resizes_cuts_and_pads() -> None:
    worked = torch.ones(1, 1, 4, 8)
    padded = fitted(worked, exact_frame((1, 2), (4, 11), "pad"))
    assert padded[0, 0, 0].tolist() == [0] + 8 * [1] + 2 * [0]
    assert fitted(worked, exact_frame((1, 1), (16, 32), "stretch")).shape == (1, 1, 16, 32)
