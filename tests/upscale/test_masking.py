"""Where to upscale: what a mask leaves out, what it costs, and that nothing changes inside."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.errors import IcmsrError
from icmsr_core.steps import Steps
from icmsr_core.upscale.framing import scaled_frame
from icmsr_core.upscale.masking import GRID, MARGIN, MaskPlan, blend_grid, checked_mask, filled, plan_mask
from icmsr_core.upscale.one_step import run_plan
from icmsr_core.upscale.plan import UpscalePlan, plan_upscale
from icmsr_core.upscale.preview import Preview
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize, resized_into
from icmsr_core.upscale.tiling import TilePlan, plan_tiles, run_tiles
from tests.support.pictures import photo, random_picture
from tests.support.toy_backbone import Toy


def spot(height: int, width: int, *places: tuple[int, int, int, int]) -> torch.Tensor:
    """A mask [1, 1, height, width] that is 1 in `places`: top, left, bottom, right."""
    mask = torch.zeros(1, 1, height, width)
    for top, left, bottom, right in places:
        mask[:, :, top:bottom, left:right] = 1
    return mask


def chosen(vae: str, **values) -> UpscaleSettings:
    return UpscaleSettings(**{"scale": 4, "tile": 128, "overlap": 32, "color_fix": "none", "vae": vae, **values})


def darker() -> Toy:
    return Toy(lambda latent: 0.3 + 0.2 * latent)


def planned(toy: Toy, image: torch.Tensor, vae: str, mask: torch.Tensor, **values) -> tuple[UpscalePlan, MaskPlan]:
    plan = plan_upscale(toy.descriptor, *image.shape[2:], chosen(vae, **values))
    masked = plan_mask(toy.descriptor, plan, mask)
    assert masked is not None
    return plan, masked


@pytest.mark.parametrize("vae", ["exact", "bounded"])
@pytest.mark.parametrize("color_fix", ["none", "wavelet"])
def test_inside_the_mask_nothing_changes_and_outside_is_the_enlarged_picture(vae: str, color_fix: str) -> None:
    image, mask = photo(200, 220), spot(200, 220, (60, 80, 90, 120))
    plan, masked = planned(darker(), image, vae, mask, color_fix=color_fix)
    whole = run_plan(darker(), image, plan)
    part = run_plan(darker(), image, plan, mask=mask)
    inside = slice(240, 360), slice(320, 480)
    assert (part - whole)[(..., *inside)].abs().max() < 1e-5
    far = torch.ones(800, 880, dtype=torch.bool)
    far[240 - MARGIN : 360 + MARGIN, 320 - MARGIN : 480 + MARGIN] = False
    assert far.float().mean() > 0.5
    assert torch.equal(part[..., far], resize(image, 800, 880)[..., far])
    assert (whole - part)[..., far].abs().mean() > 0.003
    assert bool(masked.regions) == (vae == "bounded")


@pytest.mark.parametrize("vae", ["exact", "bounded"])
def test_tiles_outside_cost_nothing(vae: str) -> None:
    image, mask, toy = photo(200, 220), spot(200, 220, (60, 80, 90, 120)), Toy()
    plan, masked = planned(toy, image, vae, mask)
    run_plan(toy, image, plan, mask=mask)
    areas: dict[str, int] = {}
    for name, shape in toy.seen:
        areas[name] = areas.get(name, 0) + shape[2] * shape[3]
    assert sum(name == "unet" for name, _ in toy.seen) == masked.tile_count < 0.3 * len(plan.tiles)
    area = plan.padded[0] * plan.padded[1]
    if vae == "exact":
        assert areas["encode"] == 64 * areas["decode"] == area
    else:
        (region,) = masked.regions
        assert areas["encode"] == 64 * areas["decode"] == 64 * region.height * region.width < 0.2 * area


def test_a_tenth_of_4096_pixels_is_less_than_a_fifth_of_the_work() -> None:
    """Of the families' shapes; the fields that the statistics come from are counted in benchmarks/preview_and_mask."""
    side = round(1024 * 0.1**0.5)
    first = (1024 - side) // 2
    mask = spot(1024, 1024, (first, first, first + side, first + side))
    for factor, multiple in ((4, 16), (8, 64)):
        toy = Toy(latent_factor=factor, multiple_of=multiple)
        plan = plan_upscale(toy.descriptor, 1024, 1024, UpscaleSettings())
        masked = plan_mask(toy.descriptor, plan, mask)
        assert masked is not None

        def cells(tiles: TilePlan) -> int:
            return sum((box.rows.stop - box.rows.start) * (box.columns.stop - box.columns.start) for box in tiles.boxes)

        (region,), (tiles,) = masked.regions, masked.region_tiles
        vae, unet = region.height * region.width * factor**2 / 4096**2, cells(tiles) / cells(plan.tiles)
        print(f"factor {factor}: VAE {vae:.3f}, UNet {unet:.3f} of the whole, {len(tiles)} of {len(plan.tiles)} tiles")
        assert vae < 0.15
        assert unet < 0.15


@pytest.mark.parametrize("vae", ["exact", "bounded"])
def test_an_empty_mask_means_the_whole_picture_and_so_does_a_full_one(vae: str) -> None:
    image, toy = photo(60, 70), darker()
    plan = plan_upscale(toy.descriptor, 60, 70, chosen(vae))
    whole = run_plan(toy, image, plan)
    for mask in (torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 5, 9)):
        assert torch.equal(run_plan(toy, image, plan, mask=mask), whole)


def test_an_empty_mask_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        maps = checked_mask(torch.zeros(64, 64), 3)
        checked_mask(torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(4, 4)]), 3)
        checked_mask(torch.eye(4), 3)
    assert maps.shape == (1, 1, 64, 64)
    assert caplog.messages == [
        "the mask is all 0: the whole picture is upscaled",
        "the mask is all 0 for picture 1, 3: the whole picture is upscaled",
    ]


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.zeros(2, 4, 4), r"1 map for all pictures or one for each of the 3, got 2"),
        (torch.zeros(1, 1, 4, 4), r"must be a MASK \[pictures, height, width\], got \[1, 1, 4, 4\]"),
        (torch.zeros(0, 4, 4), r"must be a MASK .* got \[0, 4, 4\]"),
        (torch.full((4, 4), float("nan")), "NaN"),
    ],
)
def test_masks_that_are_none_are_refused(mask: torch.Tensor, text: str) -> None:
    with pytest.raises(IcmsrError, match=text):
        checked_mask(mask, 3)


def test_a_mask_of_another_number_than_the_pictures_is_refused() -> None:
    with pytest.raises(IcmsrError, match=r"expected a mask \[1 or 3, 1, height, width\], got \(2, 1, 4, 4\)"):
        run_plan(
            Toy(),
            photo(8, 8).expand(3, -1, -1, -1),
            plan_upscale(Toy().descriptor, 8, 8, UpscaleSettings()),
            mask=torch.ones(2, 1, 4, 4),
        )


@pytest.mark.parametrize("vae", ["exact", "bounded"])
def test_each_picture_of_a_batch_has_its_own_mask_and_steps_reach_their_total(vae: str) -> None:
    images = torch.cat([photo(100, 120), random_picture(100, 120, 2)])
    masks = torch.cat([spot(100, 120, (5, 5, 20, 20)), torch.zeros(1, 1, 100, 120), spot(100, 120, (60, 0, 90, 120))])
    toy, seen = darker(), []
    plan = plan_upscale(toy.descriptor, 100, 120, chosen(vae))
    together = run_plan(toy, images, plan, mask=masks, steps=Steps(lambda done, total: seen.append((done, total))))
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(run_plan(toy, images[one], plan, mask=masks[one]), together[one])
    assert {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] < 3 * plan.steps


def test_parts_far_from_each_other_run_apart_and_near_ones_together() -> None:
    image = photo(300, 300)
    _, apart = planned(Toy(), image, "bounded", spot(300, 300, (10, 10, 40, 40), (250, 250, 280, 290)))
    assert len(apart.regions) == 2
    _, near = planned(Toy(), image, "bounded", spot(300, 300, (10, 10, 40, 40), (20, 45, 60, 70)))
    assert len(near.regions) == 1
    plan, most = planned(Toy(), image, "bounded", spot(300, 300, (10, 10, 290, 280)))
    assert not most.regions, "nearly everything runs as a whole"
    assert len(most.tiles) <= len(plan.tiles)


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
)
@settings(deadline=None, max_examples=60)
def test_weights_are_1_in_the_mask_0_beyond_the_margin_and_the_same_in_parts(
    seed: int, rows: int, columns: int, height: int, width: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 1, rows, columns, generator=random) > 0.9).float()
    frame = scaled_frame((height, width), 4)
    grid = blend_grid(mask, frame)
    plan = MaskPlan(grid, plan_tiles(4, 4, 4, 0), (), (), 1)
    weights = plan.weights(slice(0, 4 * height), slice(0, 4 * width))
    assert weights.shape == (1, 1, 4 * height, 4 * width)
    assert float(weights.min()) >= 0
    assert float(weights.max()) <= 1
    down, right = 4 * height / rows, 4 * width / columns
    for y, x in mask[0, 0].nonzero().tolist():
        middle = min(int((y + 0.5) * down), 4 * height - 1), min(int((x + 0.5) * right), 4 * width - 1)
        assert float(weights[0, 0, middle[0], middle[1]]) == 1
    if not bool(mask.any()):
        assert not bool(weights.any())
    top, left = height, width
    part = plan.weights(slice(top, 3 * height), slice(left, 4 * width))
    assert torch.allclose(part, weights[:, :, top : 3 * height, left:], rtol=0, atol=1e-6)


def test_the_margin_is_that_wide_and_no_wider() -> None:
    grid = blend_grid(spot(100, 100, (40, 40, 60, 60)), scaled_frame((100, 100), 4))
    weights = MaskPlan(grid, plan_tiles(4, 4, 4, 0), (), (), 1).weights(slice(0, 400), slice(0, 400))[0, 0]
    row = weights[200]
    assert bool((row[160:240] == 1).all())
    assert bool((row[: 160 - MARGIN] == 0).all())
    assert bool((row[240 + MARGIN :] == 0).all())
    assert 0.3 < float(row[160 - MARGIN // 2]) < 0.9
    assert bool((row[:200].diff() >= 0).all())
    assert MARGIN == 8 * GRID


def test_what_did_not_run_is_matched_to_what_did() -> None:
    """A UNet that scales and shifts each channel: the filled latent is as if it had run everywhere."""
    latent = torch.randn(1, 4, 40, 60, generator=torch.Generator().manual_seed(1))
    gain, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]).view(1, 4, 1, 1), torch.arange(4.0).view(1, 4, 1, 1)
    tiles = plan_tiles(40, 60, 16, 4)
    some = TilePlan(40, 60, tiles.boxes[:7])

    def run(given: torch.Tensor, _boxes: object) -> torch.Tensor:
        return gain * given + shift

    whole, part = run_tiles(latent, tiles, run), run_tiles(latent, some, run)
    assert (filled(part, latent, some) - whole).abs().max() < 1e-4


def test_a_preview_shows_the_parts_that_run() -> None:
    image, toy, shown, clock = photo(200, 220), darker(), [], [0.0]
    plan, masked = planned(toy, image, "bounded", mask := spot(200, 220, (60, 80, 90, 120)))
    assert masked.regions

    def tick(*_: int) -> None:
        clock[0] += 1

    preview = Preview(lambda pixels: shown.append(pixels.float() / 255), lambda: clock[0])
    run_plan(toy, image, plan, mask=mask, preview=preview, steps=Steps(tick))
    changed = (shown[-1] - shown[0]).abs().sum(2) > 0.02
    assert bool(changed[145:205, 192:275].all()), "240 to 360 and 320 to 480 of 800 x 880, in 465 x 512"
    assert not bool(changed[:80].any()), "above the part that runs"


@pytest.mark.parametrize("vae", ["exact", "bounded"])
@pytest.mark.parametrize("wish", [{"size": (300, 500), "fit": "crop"}, {"size": (900, 500), "fit": "pad"}])
def test_a_mask_lies_on_the_picture_whatever_the_frame(vae: str, wish: dict) -> None:
    image, mask = photo(100, 120), spot(100, 120, (40, 50, 60, 70))
    plan = plan_upscale(darker().descriptor, 100, 120, chosen(vae, **wish))
    whole, part = run_plan(darker(), image, plan), run_plan(darker(), image, plan, mask=mask)
    middle = slice(plan.target[0] // 2 - 40, plan.target[0] // 2 + 40)
    across = slice(plan.target[1] // 2 - 40, plan.target[1] // 2 + 40)
    assert (part - whole)[..., middle, across].abs().max() < 1e-4
    assert torch.equal(part[..., :20, :20], resized_into(image, plan.frame)[..., :20, :20])
