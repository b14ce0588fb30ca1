"""The nodes where core computes on a card: on the pretend device, loaded in each way that ComfyUI can be started in."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfy_harness import run_script

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5
"""Largest difference from the results on the CPU, which are pictures in [0, 1]."""
DYNAMIC = ("DynamicVRAM", "DynamicVRAM, a third resident")
EVERY_DAY = ("CUDA", "DynamicVRAM", "half of the UNet")
SELDOM = ("MPS", "DynamicVRAM, a third resident", "--novram", "--gpu-only", "--cpu-vae")
"""With `-m slow`: what they add is in which order weights come and go."""
CASES = ("hint", "exact", "adapter", "applied", "grid")
MORE_CASES = ("bounded", "whole", "tile_batch 0")
PICTURES = 10 * 2 * 3 * 64 * 96 * 4
"""Bytes of the two pictures of a run, ten times: they, their latents and the tiles' windows cross the bus as well."""


@pytest.fixture(
    scope="module", params=[EVERY_DAY, pytest.param(SELDOM, marks=pytest.mark.slow)], ids=["every day", "seldom"]
)
def ways(request: pytest.FixtureRequest) -> Sequence[str]:
    """The ways to load that one ComfyUI process goes through."""
    return request.param


@pytest.fixture(scope="module")
def report(
    ways: Sequence[str], comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One ComfyUI process that runs the nodes on the CPU, and then on the device in each way."""
    job = tmp_path_factory.mktemp("devices")
    (job / "ways.json").write_text(json.dumps(ways), encoding="utf-8")
    run_script(comfy_python, comfyui, "device_checks.py", job)
    return json.loads((job / "report.json").read_text())


def of_these(ways: Sequence[str], *names: str) -> Sequence[str]:
    """Those of `names` that ran; skips the test where none did."""
    found = [name for name in names if name in ways]
    if not found:
        pytest.skip(f"needs one of {', '.join(names)}")
    return found


def test_the_nodes_give_the_cpus_result(report: dict[str, Any], ways: Sequence[str]) -> None:
    assert set(report["differences"]) == set(ways)
    for way, found in report["differences"].items():
        print(way, found)
        assert set(found) == {*CASES, *(MORE_CASES if way in ("CUDA", "MPS", "DynamicVRAM") else ())}
        assert max(found.values()) <= TOLERANCE, way


def test_the_networks_are_where_core_puts_them(report: dict[str, Any], ways: Sequence[str]) -> None:
    """Or the results above would say nothing about other devices and about other ways to load."""
    places = {way: ["pretend", "cpu" if way == "--cpu-vae" else "pretend"] for way in ways}
    assert report["devices"] == {**places, "CPU": ["cpu", "cpu"]}
    assert report["dynamic"] == {way: [way in DYNAMIC] * 2 for way in ("CPU", *ways)}
    partly = {"--novram": (0, 0), "half of the UNet": (0.1, 0.6), "DynamicVRAM, a third resident": (0.1, 0.6)}
    for way in ways:
        least, most = partly.get(way, (1, math.inf))
        assert least <= report["loaded"][way] <= most, way


def test_no_page_of_weights_stays_in_use(report: dict[str, Any], ways: Sequence[str]) -> None:
    """Core could not free it for another network."""
    for way in of_these(ways, *DYNAMIC):
        assert report["left pinned"][way] == 0, way


def test_weights_cross_the_bus_once(report: dict[str, Any], ways: Sequence[str]) -> None:
    """Two pictures, each encoded and decoded in stripes, with the networks of the run before."""
    for way in of_these(ways, "CUDA", "DynamicVRAM"):
        copied = report["copied"][way]
        print(way, copied)
        assert copied["first"] > copied["networks"]
        # DynamicVRAM copies layers of up to 16 KB again whenever it loads a network.
        small = 0.1 * copied["networks"] if way == "DynamicVRAM" else 0
        assert copied["again"] < PICTURES + small
        assert copied["again, pinned"] == 0


def test_an_adapter_crosses_the_bus_once_a_run(report: dict[str, Any], ways: Sequence[str]) -> None:
    """Not once for each batch of tiles: here are four."""
    for way in of_these(ways, "CUDA", "DynamicVRAM"):
        copied = report["copied"][way]
        assert copied["adapter"] < copied["conditioned"] - copied["again"] < 1.5 * copied["adapter"]
