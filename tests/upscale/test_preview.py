"""The picture of a run while it works: what it shows, how often, and what it costs."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from icmsr_core.steps import Steps
from icmsr_core.upscale.one_step import run_plan
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.preview import INTERVAL, LONGEST, SHARE, Preview, linear_map
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.pictures import photo, random_picture
from tests.support.toy_backbone import Toy


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def steps(self, seconds: float) -> Steps:
        """Steps of `seconds` each."""

        def show(*_: int) -> None:
            self.now += seconds

        return Steps(show)


def watched(
    image: torch.Tensor, seconds: float, toy: Toy | None = None, **settings
) -> tuple[torch.Tensor, list, Clock]:
    """The result of a run whose steps take `seconds` each, its previews as [3, h, w] in [0, 1], and the clock."""
    toy, shown, clock = toy or Toy(), [], Clock()
    preview = Preview(lambda pixels: shown.append(pixels.movedim(-1, 0).float() / 255), clock)
    plan = plan_upscale(toy.descriptor, *image.shape[2:], UpscaleSettings(color_fix="none", **settings))
    return run_plan(toy, image, plan, steps=clock.steps(seconds), preview=preview), shown, clock


def test_a_run_begins_with_the_enlarged_input_and_ends_with_the_result() -> None:
    image = photo(60, 100)
    result, shown, _ = watched(image, 1.0, Toy(torch.zeros_like), scale=8, tile=64, overlap=16)
    assert len(shown) > 20
    assert all(picture.shape == (3, 307, LONGEST) for picture in shown)
    expected = F.adaptive_avg_pool2d(result, (307, LONGEST))[0]
    for picture in (shown[0], shown[-1]):
        assert (picture - expected).abs().mean() < 0.01


def test_what_the_unet_has_finished_is_seen_before_the_decoder_writes() -> None:
    """The toy's latent cell holds its pixels, so the fitted map is their mean; its UNet darkens everything."""
    image = photo(60, 100)
    dark = Toy(lambda latent: 0.3 * torch.ones_like(latent))  # residual: the latent, in [-1, 1], less this
    result, shown, _ = watched(image, 1.0, dark, scale=8, tile=64, overlap=16)
    means = [float(picture.mean()) for picture in shown]
    tiles = [index for index in range(1, len(means)) if means[index] < means[index - 1] - 1e-4]
    assert len(tiles) > 20, "tile by tile"
    assert abs(means[0] - means[-1] - 0.15) < 0.01
    before_decoding = shown[tiles[-1]]
    expected = F.adaptive_avg_pool2d(result, (307, LONGEST))[0]
    assert (before_decoding - expected).abs().mean() < 0.03


def test_previews_are_few() -> None:
    _, shown, clock = watched(photo(40, 40), 0.01, scale=8, tile=64, overlap=16)
    assert 2 <= len(shown) <= 1 + clock.now / INTERVAL


def test_a_slow_preview_is_followed_by_a_longer_wait() -> None:
    clock, times, toy = Clock(), [], Toy()

    def send(_: torch.Tensor) -> None:
        times.append(clock.now)
        clock.now += 0.02

    plan = plan_upscale(toy.descriptor, 40, 40, UpscaleSettings(scale=8, tile=64, overlap=16))
    preview = Preview(send, clock)
    for _ in range(5):
        run_plan(toy, photo(40, 40), plan, steps=clock.steps(0.1), preview=preview)
    waits = [after - before for before, after in pairwise(times)]
    assert len(waits) > 2
    assert min(waits) >= 0.02 / SHARE
    assert preview.spent == pytest.approx(0.02 * len(times))
    assert preview.spent < 0.01 * clock.now


def test_an_interrupt_while_a_preview_is_shown_stops_the_run() -> None:
    toy = Toy()

    def cancelled(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    plan = plan_upscale(toy.descriptor, 40, 40, UpscaleSettings())
    with pytest.raises(KeyboardInterrupt):
        run_plan(toy, photo(40, 40), plan, preview=Preview(cancelled))
    assert toy.seen == []


def test_a_preview_changes_no_result() -> None:
    image = photo(40, 70)
    result, _, _ = watched(image, 1.0, scale=4, tile=64, overlap=16)
    plan = plan_upscale(Toy().descriptor, 40, 70, UpscaleSettings(scale=4, tile=64, overlap=16, color_fix="none"))
    assert torch.equal(result, run_plan(Toy(), image, plan))


def test_painting_leaves_the_enlarged_input_alone() -> None:
    """One that is as large as the preview is not resized; the run still needs it after parts have been painted."""
    enlarged = random_picture(64, LONGEST)
    before, preview = enlarged.clone(), Preview(lambda pixels: None)
    preview.start(enlarged, (64, LONGEST))
    preview.written(torch.zeros(1, 3, 64, 100), 0, 0)
    assert torch.equal(enlarged, before)


@pytest.mark.parametrize(("axis", "thickness"), [(2, 1), (2, 3), (3, 2), (3, 700)])
def test_thin_stripes_leave_no_gap(axis: int, thickness: int) -> None:
    white, shown = torch.ones(1, 3, 1500, 900), []
    clock = Clock()
    preview = Preview(shown.append, clock)
    preview.start(torch.zeros_like(white), (1500, 900))
    for position in range(0, white.shape[axis], thickness):
        clock.now += 1
        stripe = white.narrow(axis, position, min(thickness, white.shape[axis] - position))
        preview.written(stripe, *((position, 0) if axis == 2 else (0, position)))
    assert int(shown[0].max()) == 0
    assert int(shown[-1].min()) == 255


def test_the_map_is_found_and_is_the_mean_colour_where_nothing_differs() -> None:
    random = torch.Generator().manual_seed(0)
    cells, weights = torch.randn(4, 500, generator=random), torch.randn(3, 4, generator=random)
    shift = torch.tensor([[0.1], [0.2], [0.3]])
    found = linear_map(cells, weights @ cells + shift)
    assert torch.allclose(found, torch.cat([weights, shift], 1), atol=1e-3)
    flat = linear_map(torch.ones(4, 9), shift.expand(3, 9))
    assert torch.allclose(flat @ torch.ones(5, 1), shift, atol=1e-5)


def test_padding_is_not_shown() -> None:
    """37 x 50 enlarged twice, 74 x 100, is 80 x 112 for the networks."""
    _, shown, _ = watched(photo(37, 50), 1.0, scale=2, tile=64, overlap=16)
    assert {picture.shape for picture in shown} == {(3, 74, 100)}


def test_a_picture_of_one_pixel_and_a_strip_have_previews() -> None:
    for height, width in ((1, 1), (1, 300)):
        _, shown, _ = watched(random_picture(height, width), 1.0, scale=8, tile=64, overlap=16)
        assert len(shown) > 1
