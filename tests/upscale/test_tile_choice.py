"""Tile and batch from free memory: what is chosen, and the memory that it was chosen for against real runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.upscale.one_step import make_plan
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.tile_choice import (
    FREE_SHARE,
    MOST_TOGETHER,
    PICTURES,
    TILES,
    batch_for,
    fit_to_memory,
    needed_memory,
)

NANO = SimpleNamespace(descriptor=BackboneDescriptor("nano", 8, 4, 8, 999, "residual"))
SD21 = SimpleNamespace(descriptor=BackboneDescriptor("sd21", 4, 8, 64, 999, "eps"))
PLAIN = UpscaleSettings()


def chosen(backbone, height, width, free, kind="cpu", given=PLAIN, **options) -> UpscaleSettings:
    return fit_to_memory(backbone, height, width, given, free, kind, **options)


@pytest.mark.parametrize("backbone", [NANO, SD21])
@pytest.mark.parametrize("size", [(1, 1), (750, 1000), (128, 1024), (4096, 4096)])
def test_enough_memory_gives_the_default_whatever_the_picture(backbone, size):
    assert chosen(backbone, *size, 1e12) == PLAIN
    assert chosen(backbone, *size, None) == PLAIN
    assert chosen(backbone, *size, None, "mps") == PLAIN


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([NANO, SD21]),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0, 2e10),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([2, 4]),
)
def test_what_is_chosen_fits_and_nothing_better_would(backbone, height, width, free, kind, itemsize):
    found = chosen(backbone, height, width, free, kind, itemsize=itemsize)
    target = PLAIN.target_size(height, width)

    def need(candidate):
        return needed_memory(*target, candidate, backbone.descriptor, itemsize, kind)

    least = min(
        need(replace(found, batch=1, tile=side, overlap=side // 4, vae=mode))
        for side in TILES
        for mode in ("auto", "bounded")
    )
    assert need(found) <= max(FREE_SHARE * free, least)
    better = TILES[: TILES.index(found.tile)]
    assert all(need(replace(found, batch=1, tile=side, overlap=side // 4)) > FREE_SHARE * free for side in better)
    if found.vae == "bounded":
        exact = replace(found, batch=1, tile=TILES[-1], overlap=32, vae="auto")
        assert need(exact) > FREE_SHARE * free or need(exact) == need(replace(exact, vae="bounded"))
    assert found.overlap <= found.tile // 4
    assert make_plan(backbone, 64 * 40, 64 * 30, found)  # the overlap suits the family


@pytest.mark.parametrize(("kind", "different"), [("cpu", 2), ("cuda", 4)])
def test_less_memory_never_means_a_larger_tile(kind, different):
    """On a CPU the tile sets the UNet's memory alone, and Stable Diffusion's VAE takes more."""
    tiles = [chosen(SD21, 750, 1000, gigabytes * 1e9, kind).tile for gigabytes in np.arange(20, -0.1, -0.1)]
    assert tiles == sorted(tiles, reverse=True)
    assert len(set(tiles)) >= different


def test_where_nothing_fits_a_small_picture_stays_exact_on_a_cpu():
    """The windows of bounded mode's statistics are 1.18 megapixels with Stable Diffusion, whatever the picture."""
    assert chosen(SD21, 128, 128, 0.0).vae == "auto"
    assert chosen(SD21, 400, 400, 0.0).vae == "bounded"
    assert chosen(SD21, 128, 128, 0.0, "cuda").vae == "auto"


def test_exact_is_left_only_when_it_was_not_asked_for():
    """1600 x 1600 of Stable Diffusion: whole maps of 2.6 GB."""
    assert chosen(SD21, 400, 400, 3e10).vae == "auto"
    assert chosen(SD21, 400, 400, 3e9).vae == "bounded"
    assert chosen(SD21, 400, 400, 3e9, given=replace(PLAIN, vae="exact")) == replace(
        PLAIN, vae="exact", tile=TILES[-1], overlap=32
    )
    assert chosen(SD21, 400, 400, 3e9, tile=False).vae == "auto"


def test_only_what_may_be_chosen_is():
    fixed = replace(PLAIN, tile=1024, overlap=200, batch=3)
    assert chosen(NANO, 750, 1000, 1e6, given=fixed, tile=False, batch=False) == fixed
    assert chosen(NANO, 750, 1000, 1e6, given=fixed, tile=False) == replace(fixed, batch=1)
    assert chosen(NANO, 750, 1000, 1e12, "cuda", given=fixed, batch=False).batch == 3


def test_a_card_takes_as_many_tiles_as_fit_in_batches_of_one_size():
    assert chosen(NANO, 750, 1000, 1e12, "cpu").batch == 1
    tiles = len(make_plan(NANO, 3000, 4000, PLAIN))
    full = chosen(NANO, 750, 1000, 1e12, "cuda")
    assert full.tile == 512
    assert full.batch == -(-tiles // -(-tiles // MOST_TOGETHER))
    assert 1 < chosen(NANO, 750, 1000, 1e9, "cuda").batch < full.batch
    assert chosen(NANO, 100, 100, 1e12, "cuda").batch == 1
    assert [batch_for(9, lambda count, most=most: count <= most) for most in (1, 2, 4, 8, 9)] == [1, 2, 3, 5, 5]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak")
@pytest.mark.parametrize(
    ("part", "tile", "vae"), [("unet", 512, "bounded"), ("decoder", 256, "bounded"), ("encoder", 256, "exact")]
)
def test_real_runs_take_no_more_than_was_counted_on(load_benchmark, part, tile, vae):
    """nano on the CPU, each part where it needs the most, by the benchmark that the numbers come from."""
    benchmark, measurement = load_benchmark("tile_memory"), load_benchmark("_measurement")
    case = benchmark.Case("nano", part, "fp32", "cpu", tile, 2 if part == "unet" else 1, 1, "cpu", vae)
    measured = measurement.in_child(benchmark.measure_case, case).memory
    settings, side = replace(PLAIN, tile=tile, batch=2, vae=vae), 2 * tile
    counted = needed_memory(side, side, settings, NANO.descriptor, 4, "cpu") - PICTURES * side**2
    print(json.dumps({"part": part, "measured": measured, "counted": counted}))
    assert 0 < measured <= counted / FREE_SHARE
