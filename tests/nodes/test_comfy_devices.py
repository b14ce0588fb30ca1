"""The nodes where core computes on a card: on the pretend device, loaded in each way that ComfyUI can be started in."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfy_harness import run_script

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5
"""Largest difference from the results on the CPU, which are pictures in [0, 1]."""
DYNAMIC = ("DynamicVRAM", "DynamicVRAM, a third resident")
WAYS = ("CUDA", "MPS", *DYNAMIC, "half of the UNet", "--novram", "--gpu-only", "--cpu-vae")
CASES = ("hint", "exact", "adapter", "applied", "grid")
MORE_CASES = ("bounded", "whole", "tile_batch 0")
PICTURES = 10 * 2 * 3 * 64 * 96 * 4
"""Bytes of the two pictures of a run, ten times: they, their latents and the tiles' windows cross the bus as well."""


@pytest.fixture(scope="module")
def report(comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One ComfyUI process that runs the nodes on the CPU, and then on the device in each way."""
    job = tmp_path_factory.mktemp("devices")
    run_script(comfy_python, comfyui, "device_checks.py", job)
    return json.loads((job / "report.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_the_nodes_give_the_cpus_result(report: dict[str, Any], way: str) -> None:
    found = report["differences"][way]
    print(found)
    assert set(found) == {*CASES, *(MORE_CASES if way in ("CUDA", "MPS", "DynamicVRAM") else ())}
    assert max(found.values()) <= TOLERANCE


def test_the_networks_are_where_core_puts_them(report: dict[str, Any]) -> None:
    """Or the results above would say nothing about other devices and about other ways to load."""
    on_card = {way: ["pretend", "pretend"] for way in WAYS}
    assert report["devices"] == {**on_card, "CPU": ["cpu", "cpu"], "--cpu-vae": ["pretend", "cpu"]}
    assert report["dynamic"] == {way: [way in DYNAMIC] * 2 for way in ("CPU", *WAYS)}
    loaded = report["loaded"]
    assert loaded["--novram"] == 0
    assert 0.1 < loaded["half of the UNet"] < 0.6
    assert 0.1 < loaded["DynamicVRAM, a third resident"] < 0.6
    assert all(loaded[way] >= 1 for way in ("CUDA", "MPS", "DynamicVRAM", "--gpu-only", "--cpu-vae"))


@pytest.mark.parametrize("way", DYNAMIC)
def test_no_page_of_weights_stays_in_use(report: dict[str, Any], way: str) -> None:
    """Core could not free it for another network."""
    assert report["left pinned"][way] == 0


@pytest.mark.parametrize("way", ["CUDA", "DynamicVRAM"])
def test_weights_cross_the_bus_once(report: dict[str, Any], way: str) -> None:
    """Two pictures, each encoded and decoded in stripes, with the networks of the run before."""
    copied = report["copied"][way]
    print(copied)
    assert copied["first"] > copied["networks"]
    # DynamicVRAM copies layers of up to 16 KB again whenever it loads a network.
    small = 0.1 * copied["networks"] if way == "DynamicVRAM" else 0
    assert copied["again"] < PICTURES + small
    assert copied["again, pinned"] == 0


@pytest.mark.parametrize("way", ["CUDA", "DynamicVRAM"])
def test_an_adapter_crosses_the_bus_once_a_run(report: dict[str, Any], way: str) -> None:
    """Not once for each batch of tiles: here are four."""
    copied = report["copied"][way]
    assert copied["adapter"] < copied["conditioned"] - copied["again"] < 1.5 * copied["adapter"]
