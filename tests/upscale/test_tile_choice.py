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
    Need,
    batch_for,
    candidates,
    change_for_memory,
    needed_memory,
    plan_for_memory,
    smaller_tiles,
)

NANO = BackboneDescriptor("nano", 8, 4, 8, 999, "residual")
SD21 = BackboneDescriptor("sd21", 4, 8, 64, 999, "eps")
PLAIN = UpscaleSettings()


def chosen(family, height, width, free, kind="cpu", given=PLAIN, **automatic) -> UpscaleSettings:
    memory = DeviceMemory(kind, free)
    return plan_for_memory(family, height, width, given, memory, Automatic(**automatic)).settings


def short_of(family, height, width, settings, memory) -> float:
    return needed_memory(family, settings.frame(height, width).work, settings, memory).short(memory)


@pytest.mark.parametrize("family", [NANO, SD21])
@pytest.mark.parametrize("size", [(1, 1), (750, 1000), (128, 1024), (4096, 4096)])
def test_enough_memory_gives_the_default_whatever_the_picture(family, size):
    assert chosen(family, *size, 1e12) == PLAIN
    assert chosen(family, *size, None) == PLAIN
    assert chosen(family, *size, None, "mps") == PLAIN


MEMORIES = st.builds(
    DeviceMemory,
    kind=st.sampled_from(["cpu", "cuda", "mps", "xpu"]),
    free=st.floats(0, 2e10),
    itemsize=st.sampled_from([2, 4]),
    main=st.one_of(st.none(), st.floats(0, 4e10)),
)
FAMILIES, SIDES = st.sampled_from([NANO, SD21]), st.integers(1, 3000)
MODES = ("auto", "bounded")


@settings(deadline=None, max_examples=100)
@given(FAMILIES, SIDES, SIDES, MEMORIES)
def test_what_is_chosen_fits_and_nothing_better_would(family, height, width, memory):
    found = plan_for_memory(family, height, width, PLAIN, memory, Automatic()).settings

    def short(candidate):
        return short_of(family, height, width, candidate, memory)

    every = [replace(found, batch=1, tile=side, overlap=side // 4, vae=mode) for side in TILES for mode in MODES]
    assert short(found) <= min(map(short, every))
    better = TILES[: TILES.index(found.tile)]
    assert all(short(replace(found, batch=1, tile=side, overlap=side // 4)) > 0 for side in better)
    if found.vae == "bounded":
        assert short(replace(found, batch=1, tile=TILES[-1], overlap=32, vae="auto")) > 0
    assert found.overlap <= found.tile // 4
    assert plan_upscale(family, 16 * 40, 16 * 30, found).tiles  # the overlap suits the family


@settings(deadline=None, max_examples=200)
@given(FAMILIES, SIDES, SIDES, MEMORIES, st.sampled_from([128, 512, 1024]))
def test_the_automatic_choice_is_never_exact_where_exact_does_not_fit(family, height, width, memory, tile):
    """With a tile that was given, as the nodes and the command line's defaults have it.

    Where bounded lacks as much or more, exact stays: a small picture's windows hold more than the picture.
    """
    given = replace(PLAIN, tile=tile, overlap=tile // 4)
    plan = plan_for_memory(family, height, width, given, memory, Automatic(tile=False, batch=False))
    exact, bounded = (short_of(family, height, width, replace(given, vae=mode), memory) for mode in MODES)
    assert (plan.settings.tile, plan.settings.batch) == (tile, 1)
    if plan.exact:
        assert exact == 0 or bounded >= exact
    else:
        assert exact > 0 or not plan_upscale(family, height, width, given).exact
    said = change_for_memory(family, plan, given, memory)
    assert (said is None) == (plan.settings.vae == "auto")
    assert said is None or said.endswith(f"tile {tile}, vae bounded")


def test_what_exact_takes_of_a_card_and_of_main_memory():
    """2048 px of Stable Diffusion: maps of 4.3 GB on the card or in main memory; attention or stripe on the card."""
    gigabyte = 1e9 / FREE_SHARE
    for tile, device in ((128, 150e6 + 192 * 2048**2), (512, 150e6 + 5100 * 512**2)):
        need = needed_memory(SD21, (2048, 2048), replace(PLAIN, tile=tile, overlap=32), DeviceMemory("cuda", None))
        assert need == Need(device, 1024 * 2048**2, PICTURES * 2048**2)
        for free, main, fits in (
            (0.9, 100.0, False),  # not even the attention, or the stripe
            (1.6, 4.4, False),  # the maps in neither
            (1.6, 4.5, True),
            (5.9, 0.2, True),
            (5.9, 0.1, False),  # no place for the pictures
        ):
            memory = DeviceMemory("cuda", free * gigabyte, main=main * gigabyte)
            assert (need.short(memory) == 0) == fits, (tile, free, main)


def test_exact_that_was_asked_for_stays_with_a_warning_where_it_will_hardly_fit():
    given, memory = replace(PLAIN, vae="exact"), DeviceMemory("cpu", 2e9)
    plan = plan_for_memory(SD21, 512, 512, given, memory, Automatic(tile=False, batch=False))
    assert plan.settings == given
    said = change_for_memory(SD21, plan, given, memory)
    assert said == "2048 x 2048 pixels: 2.0 GB of memory are free: the exact VAE may not fit: bounded needs less"
    assert change_for_memory(SD21, plan, given, DeviceMemory("cpu", 1e11)) is None
    assert change_for_memory(SD21, plan, given, DeviceMemory("cpu", None)) is None


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
    assert chosen(SD21, 400, 400, 3e9, tile=False) == replace(PLAIN, vae="bounded")


def test_only_what_may_be_chosen_is():
    fixed = replace(PLAIN, tile=1024, overlap=200, batch=3, vae="exact")
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


@pytest.mark.parametrize(
    ("tile", "expected"),
    [(0, [(1024, 200), (512, 128), (256, 64), (128, 32)]), (384, [(192, 48)]), (128, []), (64, [])],
)
def test_smaller_tiles_are_halves(tile, expected):
    given = UpscaleSettings(tile=tile, overlap=min(200, tile // 2) if tile else 200)
    assert [(one.tile, one.overlap) for one in smaller_tiles(given)] == expected


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
    need = needed_memory(NANO, (side, side), settings, DeviceMemory("cpu", None))
    counted = need.device + need.maps
    print(json.dumps({"part": part, "measured": measured, "counted": counted}))
    assert 0 < measured <= counted / FREE_SHARE
