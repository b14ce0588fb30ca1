"""Sizes, masks and previews of ICM-SR Upscale, in ComfyUI with the embedded model."""

import json

import pytest

from tests.support.comfy_harness import run_script

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def report(comfyui, comfy_python, tmp_path_factory) -> dict:
    job = tmp_path_factory.mktemp("inputs")
    run_script(comfy_python, comfyui, "upscale_inputs.py", job, timeout=600)
    return json.loads((job / "report.json").read_text())


def test_every_way_to_wish_for_a_size(report):
    shapes = {name: found["shape"][1:] for name, found in report["sizes"].items()}
    assert shapes == {
        "longest": [75, 100, 4],
        "shortest": [60, 80, 4],
        "megapixels": [89, 118, 4],
        "crop": [64, 64, 4],
        "pad": [64, 64, 4],
        "stretch": [64, 64, 4],
        "beyond": [300, 400, 4],
        "smaller": [15, 20, 4],
    }
    assert report["sizes"]["pad"]["bars"][0] == 0, "black and transparent"
    assert report["sizes"]["pad"]["bars"][1] > 0
    assert report["hint and crop"] == [1, 64, 64, 3]


def test_size_and_tiles_are_said_at_the_start_and_the_time_at_the_end(report):
    said = {name: found["said"] for name, found in report["sizes"].items()}
    assert said["longest"][0].startswith("ICM-SR Upscale: 1 picture, 40 x 30 to 100 x 75 pixels, ")
    assert said["longest"][0].endswith("1 tile")
    assert "; more than 8 times as large (the model makes 320 x 240" in said["beyond"][0]
    assert "; smaller than the picture (resized to 20 x 15 before the model)" in said["smaller"][0]
    assert "; stretched (0.75 times as wide" in said["stretch"][0]
    for lines in said.values():
        assert lines[-1].startswith("ICM-SR Upscale: 1 picture in ")


def test_wrong_sizes_and_masks_are_errors_in_words(report):
    two, one, maps = report["refused"]
    assert "only one of size, longest, shortest, megapixels can be given, got longest 5 and megapixels 1.0" in two
    assert "width is 64 but height is 0" in one
    assert "1 map for all pictures or one for each of the 1, got 3" in maps


def test_each_picture_has_its_own_mask_of_any_size(report):
    masks = report["masks"]
    assert max(masks["inside"]) < 1 / 255
    assert min(masks["outside"]) > 1 / 255
    assert any("the mask of the first needs" in line for line in masks["said"])


def test_an_empty_mask_is_the_whole_picture_and_said_once(report):
    equal, said = report["empty mask"]
    assert equal
    assert len(said) == 1


def test_the_bar_shows_a_picture(report):
    assert report["previews"]
    assert all(shown == ["JPEG", [512, 410], "RGB", 512] for shown in report["previews"])
    value, total = report["progress"]
    assert value == total
