"""The estimate of a whole picture's statistics: fields, how they are drawn and weighted, how near it is."""

import pytest
import torch

from icmsr_core.backbone.vae_steps import Norm, Residual, Step
from icmsr_core.tiled_vae.estimate import (
    FIELD,
    FIELD_MARGIN,
    Fields,
    Frame,
    calibrate,
    draw,
    draw_fields,
    drawn_windows,
    estimate_whole,
)
from icmsr_core.tiled_vae.held_map import HeldMap
from icmsr_core.tiled_vae.modes import Statistics
from icmsr_core.tiled_vae.tiled import is_exact
from tests.support.vaes import own_statistics, uneven_picture


def test_the_statistics_cost_what_they_may() -> None:
    """The windows: an eighth of the picture or 3 * 2^18 pixels, whichever is less, unless 128 of them are more."""
    for factor, side, cost in ((4, 2056, 1 / 8), (4, 4096, 0.05), (8, 2056, 0.29), (8, 4096, 0.08)):
        assert not is_exact("auto", side, side)
        fields = draw_fields(torch.rand(1, 4, side // factor, side // factor), 1, factor)
        share = len(fields.corners) * ((FIELD + 2 * FIELD_MARGIN) * factor) ** 2 / side**2
        assert 0.8 * cost < share <= cost
        assert len(fields.corners) >= 128


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (5, 9), (64, 20), (256, 256), (514, 600)])
@pytest.mark.parametrize("factor", [4, 8])
def test_no_more_windows_are_drawn_than_memory_is_counted_for(rows: int, columns: int, factor: int) -> None:
    source = torch.rand(1, 4, rows, columns, generator=torch.Generator().manual_seed(0))
    fields = draw_fields(source, 1, factor)
    number, area = drawn_windows(rows, columns, factor)
    height, width = Frame(fields, (rows, columns), 1, FIELD_MARGIN).window
    assert area == height * width
    assert 0.8 * number <= len(fields.corners) <= number


def test_windows_show_the_picture_around_the_fields_and_end_where_it_ends() -> None:
    rows, columns = 31, 40
    source = torch.arange(rows * columns).float().reshape(1, 1, rows, columns)
    fields = Fields([(0, 0), (9, 14), (27, 35), (2, 20)], (4, 5), torch.full((4,), 0.25))
    wide = Frame(fields, (rows, columns), 1, 6)
    assert wide.window == (16, 17)
    assert [wide.start(corner) for corner in fields.corners] == [(0, 0), (3, 8), (15, 23), (0, 14)]
    windows = HeldMap(2)
    whole = torch.cat([source[:, :, y : y + 16, x : x + 17] for y, x in map(wide.start, fields.corners)])
    for band in whole.split(7, 2):
        windows.append(band)
    for margin in (0, 2, 5, 6):
        narrow = wide._replace(margin=margin)
        height, width = narrow.window
        assert (height, width) == (4 + 2 * margin, 5 + 2 * margin)
        for corner, part in zip(fields.corners, torch.cat(list(wide.cut(windows, margin))), strict=True):
            y, x = narrow.start(corner)
            assert torch.equal(part, source[0, :, y : y + height, x : x + width])
            assert source[0, 0, corner[0], corner[1]] in part
            assert source[0, 0, corner[0] + 3, corner[1] + 4] in part
    # Four samples a cell, and windows that reach beyond the picture on both sides.
    assert Frame(fields, (rows, columns), 4, 6).start((9, 14)) == (30, 50)
    everything = Frame(fields, (rows, columns), 1, 50)
    assert everything.window == (rows, columns)
    assert everything.start((9, 14)) == (0, 0)


@torch.inference_mode()
def test_windows_as_large_as_the_picture_measure_it_exactly(backbone) -> None:
    """So its own border is in the estimate, and the picture around a field is what the networks see there."""
    factor = backbone.descriptor.latent_factor
    assert FIELD + 2 * FIELD_MARGIN >= 12, "the whole picture"
    image = 2 * uneven_picture(12 * factor, 8 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    truth = own_statistics(half, image)
    got = estimate_whole(half, image, factor, factor, 8).statistics
    for norm, (mean, variance) in truth.items():
        torch.testing.assert_close(got[norm].variance, variance, rtol=1e-3, atol=0)
        torch.testing.assert_close(got[norm].mean, mean, rtol=0, atol=1e-3 * float(variance.max()) ** 0.5)


@pytest.mark.parametrize("unit", [1, 4])
def test_fields_stand_for_the_picture(unit: int) -> None:
    """Their weighted features are the picture's, also where something rare is unlike all the rest."""
    random = torch.Generator().manual_seed(0)
    source = torch.randn(1, 3, 100 * unit, 170 * unit, generator=random) * torch.linspace(0.3, 1, 170 * unit)
    source[..., : 3 * unit] = 5.0  # a frame at one side
    source[:, :, 40 * unit : 44 * unit, 90 * unit : 96 * unit] = -4.0
    fields = draw_fields(source, unit, 8)
    rows, columns = fields.size
    assert len(fields.corners) <= 128 < 25 * 43  # of all there are
    assert fields.weights.min() >= 0
    assert float(fields.weights.sum()) == pytest.approx(1)
    crops = torch.cat(
        [source[:, :, y * unit : (y + rows) * unit, x * unit : (x + columns) * unit] for y, x in fields.corners]
    )
    assert crops.shape[2:] == (rows * unit, columns * unit), "inside the picture"
    for power, tolerance in ((1, 0.03), (2, 0.06)):
        estimate = (fields.weights * crops.double().pow(power).mean((1, 2, 3))).sum()
        assert abs(float(estimate - source.double().pow(power).mean())) < tolerance * float(source.std())
    plain = crops.double().square().mean()
    assert abs(float(plain - source.double().square().mean())) > 0.06 * float(source.std()), "weights matter here"


def test_small_and_narrow_pictures_have_fields_too() -> None:
    for height, width in ((3, 2), (8, 8), (5, 700), (9, 9), (1, 1)):
        fields = draw_fields(torch.rand(1, 4, height, width), 1, 8)
        assert fields.size == (min(FIELD, height), min(FIELD, width))
        assert float(fields.weights.sum()) == pytest.approx(1)
        for top, left in fields.corners:
            assert 0 <= top <= height - fields.size[0]
            assert 0 <= left <= width - fields.size[1]


def test_draw_gives_everything_its_chance() -> None:
    importance = torch.tensor([1.0, 1, 1, 1, 400, 1, 1, 1, 1, 9], dtype=torch.float64)
    chosen, chances = draw(importance, 4)
    assert 4 in chosen.tolist()
    assert len(chosen) == 4
    by_index = dict(zip(chosen.tolist(), chances.tolist()))
    assert by_index[4] == 1
    for index, chance in by_index.items():
        assert chance == pytest.approx(1 if index == 4 else 3 / 11 * (3 if index == 9 else 1))
    assert draw(importance, 50)[0].tolist() == list(range(10))
    assert draw(torch.ones(12, dtype=torch.float64), 3)[0].tolist() == [1, 5, 9]


def test_calibration_meets_the_features_without_negative_weights() -> None:
    off = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.4
    weights = calibrate(off, torch.ones(40, dtype=torch.float64))
    assert weights.min() >= 0
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights[:, None] * off).sum(0).abs().max()) < 0.25 * float(off.mean(0).abs().max())
    even = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(calibrate(torch.zeros(5, 2, dtype=torch.float64), torch.ones_like(even)), even)
    torch.testing.assert_close(
        calibrate(torch.tensor([[1e3], [1.0], [1.0]]).double(), torch.ones(3).double())[0], torch.tensor(0.0).double()
    )


@torch.inference_mode()
def test_the_same_estimate_every_time(backbone) -> None:
    factor = backbone.descriptor.latent_factor
    image = uneven_picture(30 * factor, 26 * factor)
    half = backbone.vae_half("encoder", 0)
    first, second = (estimate_whole(half, image, factor, factor, 8) for _ in range(2))
    for norm, value in first.statistics.items():
        assert torch.equal(value.variance, second.statistics[norm].variance)
    assert len(first.statistics) == count(half.steps)


@torch.inference_mode()
def test_the_estimate_is_near_the_truth(backbone) -> None:
    """Nearer than the middle of the picture, or than all of it at a fourth of its size."""
    factor = backbone.descriptor.latent_factor
    image = 2 * uneven_picture(64 * factor, 56 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    truth = own_statistics(half, image)

    def miss(known: dict[Norm, Statistics]) -> float:
        return max(float((known[norm].variance / truth[norm].variance).log().abs().max()) for norm in truth)

    middle = image[:, :, 20 * factor : 40 * factor, 20 * factor : 40 * factor]
    reduced = torch.nn.functional.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True)
    estimate = miss(estimate_whole(half, image, factor, factor, 8).statistics)
    print(estimate, miss(own_statistics(half, middle)), miss(own_statistics(half, reduced)))
    attends = backbone.vae.config.mid_block_add_attention  # random, it looks for single places, which a sample misses
    assert estimate < (0.2 if attends else 0.1)
    assert estimate < 0.2 * min(miss(own_statistics(half, middle)), miss(own_statistics(half, reduced)))


def count(steps: tuple[Step, ...]) -> int:
    return sum(count(step.main) if isinstance(step, Residual) else isinstance(step, Norm) for step in steps)
