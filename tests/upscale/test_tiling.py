"""Properties of plans and blending, over sizes, tiles, overlaps and multiples that hypothesis chooses."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from icmsr_core.errors import IcmsrError
from icmsr_core.steps import Steps
from icmsr_core.upscale.tiling import Box, plan_axis, plan_tiles, run_tiles

quick = settings(deadline=None, max_examples=80)
few = settings(deadline=None, max_examples=25)


class Axis(NamedTuple):
    size: int
    tile: int
    overlap: int
    multiple: int


@st.composite
def axes(draw: st.DrawFn, longest: int = 60) -> Axis:
    """Arguments of `plan_axis` with which tiles can advance."""
    multiple = draw(st.sampled_from([1, 2, 3, 4, 8]))
    tile = multiple * draw(st.integers(1, 16))
    overlap = draw(st.integers(0, tile // 2))
    assume((tile - overlap) // multiple >= 1)
    return Axis(multiple * draw(st.integers(1, longest)), tile, overlap, multiple)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Height, width, tile, overlap and multiple in cells, small enough to run."""
    multiple = draw(st.sampled_from([1, 2, 4]))
    tile = multiple * draw(st.integers(2, 5))
    overlap = draw(st.integers(0, tile // 2))
    return multiple * draw(st.integers(1, 14)), multiple * draw(st.integers(1, 14)), tile, overlap, multiple


def windows_sum(axis: Axis) -> torch.Tensor:
    total = torch.zeros(axis.size, dtype=torch.float64)
    for span in plan_axis(*axis):
        total[span.start : span.stop] += span.window().double()
    return total


@given(axis=axes())
@quick
def test_tiles_cover_the_axis_as_asked(axis: Axis) -> None:
    spans = plan_axis(*axis)
    lengths = {span.stop - span.start for span in spans}
    assert len(lengths) == 1
    assert lengths.pop() <= axis.tile
    assert spans[0].start == 0
    assert spans[-1].stop == axis.size
    assert all(span.start % axis.multiple == span.stop % axis.multiple == 0 for span in spans)
    for left, right in itertools.pairwise(spans):
        assert left.start < right.start
        assert left.stop - right.start >= axis.overlap
    assert (len(spans) == 1) == (axis.size <= axis.tile)


@given(axis=axes())
@quick
def test_no_work_beyond_what_is_needed(axis: Axis) -> None:
    """The fewest tiles (the largest steps that leave the overlap), and no smaller tile would do with as many."""
    spans = plan_axis(*axis)
    assume(len(spans) > 1)

    def reach(tile: int, count: int) -> int:
        step = (tile - axis.overlap) // axis.multiple * axis.multiple
        return tile + (count - 1) * max(step, 0)

    assert reach(axis.tile, len(spans) - 1) < axis.size <= reach(axis.tile, len(spans))
    length = spans[0].stop - spans[0].start
    assert reach(length - axis.multiple, len(spans)) < axis.size
    steps = [right.start - left.start for left, right in itertools.pairwise(spans)]
    assert max(steps) - min(steps) <= axis.multiple, "spread evenly"


@given(axis=axes())
@quick
def test_windows_are_a_partition_of_unity(axis: Axis) -> None:
    assert (windows_sum(axis) - 1).abs().max() < 1e-6


@given(axis=axes())
@quick
def test_windows_stay_between_zero_and_one(axis: Axis) -> None:
    for span in plan_axis(*axis):
        window = span.window()
        assert window.dtype == torch.float32
        assert window.shape == (span.stop - span.start,)
        assert window.min() >= 0
        assert window.max() <= 1
        assert (window == 1).any() or span.fade_in[1] == span.fade_out[0], "a tile counts fully somewhere"


@given(axis=axes())
@quick
def test_ramps_lie_in_the_overlaps_and_never_meet(axis: Axis) -> None:
    spans = plan_axis(*axis)
    assert spans[0].fade_in == (0, 0)
    assert spans[-1].fade_out == (axis.size, axis.size)
    for span in spans:
        assert span.start <= span.fade_in[0] <= span.fade_in[1] <= span.fade_out[0] <= span.fade_out[1] <= span.stop
    ramps = set()
    for left, right in itertools.pairwise(spans):
        assert left.fade_out == right.fade_in
        begin, end = right.fade_in
        assert right.start <= begin <= end <= left.stop
        # In the middle: what a tile sees of its zero padding is equally far from the ramp on both sides.
        assert abs((begin - right.start) - (left.stop - end)) <= 1
        ramps.add(end - begin)
    assert len(ramps) <= 1, "one ramp length for the axis"
    assert not ramps or (0 < min(ramps) <= axis.overlap or axis.overlap == 0)


def test_a_wide_overlap_leaves_the_outermost_cells_without_weight() -> None:
    left, right = plan_axis(16, 12, 4, 4)
    assert (left.stop, right.start) == (12, 4)
    assert left.fade_out == (6, 10)
    assert left.window()[-2:].tolist() == [0, 0]
    assert right.window()[:2].tolist() == [0, 0]


def test_ramp_is_a_raised_cosine() -> None:
    _, right = plan_axis(60, 40, 20, 20)
    phase = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    torch.testing.assert_close(right.window()[:20].double(), torch.sin(torch.pi / 2 * phase) ** 2, rtol=0, atol=1e-7)


def test_1080_pixels_in_tiles_of_512_make_three_of_448() -> None:
    """1080 px in tiles of at most 512 with 128 of overlap: three, of 448 px each."""
    spans = plan_axis(1088 // 8, 512 // 8, 128 // 8, 2)
    assert [(span.start, span.stop) for span in spans] == [(0, 56), (40, 96), (80, 136)]


@given(picture=pictures())
@few
def test_boxes_are_all_pairs_row_by_row(picture: tuple[int, int, int, int, int]) -> None:
    height, width, tile, overlap, multiple = picture
    plan = plan_tiles(height, width, tile, overlap, multiple)
    rows, columns = plan_axis(height, tile, overlap, multiple), plan_axis(width, tile, overlap, multiple)
    assert plan.boxes == tuple(Box(row, column) for row in rows for column in columns)
    assert len(plan) == len(rows) * len(columns)
    assert (plan.height, plan.width) == (height, width)


def identity(tiles: torch.Tensor, boxes: tuple[Box, ...]) -> torch.Tensor:
    assert len(tiles) == len(boxes)
    return tiles


@given(picture=pictures(), batch=st.integers(1, 5))
@few
def test_identity_reproduces_the_input(picture: tuple[int, int, int, int, int], batch: int) -> None:
    plan = plan_tiles(*picture)
    source = torch.rand(1, 2, plan.height, plan.width, generator=torch.Generator().manual_seed(0))
    result = run_tiles(source, plan, identity, batch=batch)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, source, rtol=0, atol=1e-6)


@given(picture=pictures(), channels=st.integers(1, 3))
@few
def test_a_function_may_change_the_number_of_channels(picture: tuple[int, int, int, int, int], channels: int) -> None:
    plan = plan_tiles(*picture)
    source = torch.rand(1, 1, plan.height, plan.width, generator=torch.Generator().manual_seed(0))
    result = run_tiles(source, plan, lambda tiles, boxes: tiles.expand(-1, channels, -1, -1))
    torch.testing.assert_close(result, source.expand(-1, channels, -1, -1), rtol=0, atol=1e-6)


@given(picture=pictures(), batch=st.integers(2, 7))
@few
def test_result_does_not_depend_on_the_batch(picture: tuple[int, int, int, int, int], batch: int) -> None:
    """A function that knows its place, so that tiles which changed places would show."""
    plan = plan_tiles(*picture)
    source = torch.rand(1, 1, plan.height, plan.width, generator=torch.Generator().manual_seed(1))

    def place(tiles: torch.Tensor, boxes: tuple[Box, ...]) -> torch.Tensor:
        starts = torch.tensor([box.rows.start * 100.0 + box.columns.start for box in boxes])
        return tiles.square() + starts[:, None, None, None]

    alone = run_tiles(source, plan, place)
    assert torch.equal(alone, run_tiles(source, plan, place, batch=batch))
    if len(plan) > 1:
        assert (alone - source.square()).max() > 0.99, "the last tile alone covers the last cell and adds its start"


@given(picture=pictures(), batch=st.integers(1, 7))
@few
def test_progress_counts_every_tile_once(picture: tuple[int, int, int, int, int], batch: int) -> None:
    plan = plan_tiles(*picture)
    seen: list[int] = []
    sizes: list[int] = []

    def count(tiles: torch.Tensor, boxes: tuple[Box, ...]) -> torch.Tensor:
        sizes.append(len(boxes))
        return tiles

    steps = Steps(lambda done, total: seen.append(done))
    run_tiles(torch.zeros(1, 1, plan.height, plan.width), plan, count, batch=batch, steps=steps)
    assert seen == list(itertools.accumulate(sizes))
    assert seen[-1] == len(plan)
    assert all(size == batch for size in sizes[:-1])


def test_progress_may_stop_the_run() -> None:
    plan = plan_tiles(20, 20, 8, 2)
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiles(torch.zeros(1, 1, 20, 20), plan, identity, steps=Steps(stop))
    assert calls == [1]


def test_blending_is_done_in_float32() -> None:
    plan = plan_tiles(40, 40, 12, 6)
    source = torch.full((1, 1, 40, 40), 0.7, dtype=torch.float16)
    result = run_tiles(source, plan, identity)
    assert result.dtype == torch.float32
    assert (result - source.float()).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 8, 2), "at least 1"),
        ((8, 0, 0), "at least 1"),
        ((8, 8, -1), "overlap at least 0, got 8, 8, -1"),
        ((30, 8, 2, 4), "size 30 and tile 8 must be multiples of 4"),
        ((32, 6, 2, 4), "size 32 and tile 6 must be multiples of 4"),
        ((32, 8, 5), r"at most half of the tile \(4\), got 5"),
        ((32, 4, 2, 4), "with an overlap of 2 tiles of 4 cannot advance in multiples of 4: .* overlap of at most 0"),
    ],
)
def test_impossible_plans_are_refused(arguments: tuple[int, ...], text: str) -> None:
    with pytest.raises(IcmsrError, match=text):
        plan_axis(*arguments)


@pytest.mark.parametrize("shape", [(1, 3, 16, 17), (2, 3, 16, 16), (1, 3, 2, 2)])
def test_a_source_of_another_size_than_the_plan_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(IcmsrError, match=r"1 picture of 16 x 16 cells, got \("):
        run_tiles(torch.zeros(shape), plan_tiles(16, 16, 8, 0), identity)
