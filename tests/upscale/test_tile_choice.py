"""Tile and batch from free memory: what is chosen, and the memory that it was chosen for against real runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.tile_choice import (
    FREE_SHARE,
    MOST_TOGETHER,
    PICTURES,
    TILES,
    Automatic,
    DeviceMemory,
    batch_for,
    candidates,
    needed_memory,
    plan_for_memory,
    smaller_settings,
)

NANO = BackboneDescriptor("nano", 8, 4, 8, 999, "residual")
SD21 = BackboneDescriptor("sd21", 4, 8, 64, 999, "eps")
PLAIN = UpscaleSettings()


def chosen(family, height, width, free, kind="cpu", given=PLAIN, itemsize=4, **automatic) -> UpscaleSettings:
    memory = DeviceMemory(kind, free, itemsize)
    return plan_for_memory(family, height, width, given, memory, Automatic(**automatic)).settings


@pytest.mark.parametrize("family", [NANO, SD21])
@pytest.mark.parametrize("size", [(1, 1), (750, 1000), (128, 1024), (4096, 4096)])
def test_enough_memory_gives_the_default_whatever_the_picture(family, size):
    assert chosen(family, *size, 1e12) == PLAIN
    assert chosen(family, *size, None) == PLAIN
    assert chosen(family, *size, None, "mps") == PLAIN


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([NANO, SD21]),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0, 2e10),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([2, 4]),
)
def test_what_is_chosen_fits_and_nothing_better_would(family, height, width, free, kind, itemsize):
    found = chosen(family, height, width, free, kind, itemsize=itemsize)
    target = PLAIN.target_size(height, width)

    def need(candidate):
        return needed_memory(family, target, candidate, DeviceMemory(kind, free, itemsize))

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
    assert plan_upscale(family, 16 * 40, 16 * 30, found).tiles  # the overlap suits the family


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
    tiles = len(plan_upscale(NANO, 750, 1000, PLAIN).tiles)
    full = chosen(NANO, 750, 1000, 1e12, "cuda")
    assert full.tile == 512
    assert full.batch == -(-tiles // -(-tiles // MOST_TOGETHER))
    assert 1 < chosen(NANO, 750, 1000, 1e9, "cuda").batch < full.batch
    assert chosen(NANO, 100, 100, 1e12, "cuda").batch == 1
    assert [batch_for(9, lambda count, most=most: count <= most) for most in (1, 2, 4, 8, 9)] == [1, 2, 3, 5, 5]


def test_candidates_go_from_large_tiles_to_small_and_from_exact_to_bounded():
    found = list(candidates(PLAIN))
    assert [one.tile for one in found] == 2 * list(TILES)
    assert [one.vae for one in found] == len(TILES) * ["auto"] + len(TILES) * ["bounded"]
    assert [one.overlap for one in found[: len(TILES)]] == [128, 96, 64, 48, 32]


@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_a_vae_mode_that_was_asked_for_is_the_only_candidate(mode):
    assert {one.vae for one in candidates(replace(PLAIN, vae=mode))} == {mode}


def test_after_a_lack_of_memory_comes_one_tile_at_a_time_and_then_ever_smaller_tiles():
    settings, seen = replace(PLAIN, batch=4, tile=0, overlap=200), []
    while (settings := smaller_settings(settings)) is not None:
        seen.append((settings.batch, settings.tile, settings.overlap))
    assert seen == [(1, 0, 200), (1, 1024, 200), (1, 512, 128), (1, 256, 64), (1, 128, 32)]


@pytest.mark.long
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
    counted = needed_memory(NANO, (side, side), settings, DeviceMemory("cpu", None)) - PICTURES * side**2
    print(json.dumps({"part": part, "measured": measured, "counted": counted}))
    assert 0 < measured <= counted / FREE_SHARE
