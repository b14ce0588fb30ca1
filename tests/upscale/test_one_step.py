"""`upscale` end to end: toys whose result is known in closed form, and random networks of the real classes."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmsr_core.backbone.protocol import Backbone
from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.steps import Steps
from icmsr_core.tiled_vae import tiled as tiled_vae
from icmsr_core.upscale.one_step import run_plan, upscale
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import MAX_SCALE, UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.upscale.tiling import Box
from icmsr_core.weights.base import open_base
from tests.support.model_files import write_base, write_generator
from tests.support.pictures import photo, random_picture
from tests.support.toy_backbone import Toy


def plain(**values) -> UpscaleSettings:
    return UpscaleSettings(**{"color_fix": "none", **values})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def nano(base) -> DiffusersBackbone:
    return load_backbone(Recipe(base, write_generator(base.parent / "generator.safetensors", base)))


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 200), (3, 5), (17, 31), (128, 96)]


@pytest.mark.parametrize("scale", [1, 1.5, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_through_a_lossless_toy_is_the_resize(size: tuple[int, int], scale: float) -> None:
    image = random_picture(*size)
    result = upscale(Toy(), image, plain(scale=scale, tile=256, overlap=64))
    assert result.dtype == torch.float32
    height, width = result.shape[-2:]
    assert abs(height - size[0] * scale) <= 0.5
    assert abs(width - size[1] * scale) <= 0.5
    torch.testing.assert_close(result, resize(image, height, width), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "scale"), [*((size, scale) for size in SIZES[:-1] for scale in (1, 1.5, 4, 8)), (SIZES[-1], 1.5)]
)
def test_any_size_through_the_real_networks(nano: Backbone, size: tuple[int, int], scale: float) -> None:
    result = upscale(nano, random_picture(*size), UpscaleSettings(scale=scale))
    assert result.shape == (1, 3, round(size[0] * scale), round(size[1] * scale))
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1


@given(height=st.integers(1, 40), width=st.integers(1, 40), target=st.tuples(st.integers(1, 90), st.integers(1, 90)))
@settings(deadline=None, max_examples=25)
def test_the_result_has_exactly_the_size_asked_for(height: int, width: int, target: tuple[int, int]) -> None:
    image = random_picture(height, width)
    result = upscale(Toy(), image, plain(size=target, tile=64, overlap=32))
    assert result.shape == (1, 3, target[1], target[0]), "size is width x height"
    if max(target[0] / width, target[1] / height) <= MAX_SCALE:  # beyond, the rest is resized from what the model made
        torch.testing.assert_close(result, resize(image, target[1], target[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1, 2])
def test_precision_of_the_input_does_not_leak_into_the_arithmetic(dtype: torch.dtype, scale: float) -> None:
    image = random_picture(20, 24).to(dtype)
    toy = Toy()
    inner: list[torch.dtype] = []
    toy.output = lambda latent: inner.append(latent.dtype) or torch.zeros_like(latent)
    result = upscale(toy, image, plain(scale=scale))
    assert torch.equal(result, upscale(Toy(), image.float(), plain(scale=scale)))
    assert set(inner) == {torch.float32}


def test_input_is_left_alone_and_its_memory_layout_does_not_matter(nano: Backbone) -> None:
    image = random_picture(24, 40)
    before = image.clone()
    channels_last = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    chosen = UpscaleSettings(scale=1)
    torch.testing.assert_close(upscale(nano, channels_last, chosen), upscale(nano, image, chosen), rtol=0, atol=1e-4)
    assert torch.equal(image, before)


# --- the closed form -------------------------------------------------------------------------------------------------


def alpha(t: int) -> tuple[float, float]:
    product = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t]
    return float(product) ** 0.5, float(1 - product) ** 0.5


@pytest.mark.parametrize("t", [0, 200, 700, 999])
@pytest.mark.parametrize("prediction", ["eps", "v", "residual"])
def test_clean_latent_is_the_predictions_closed_form(prediction: str, t: int) -> None:
    """A network that answers what a perfect one would, if the clean latent were z / 2 + 0.1."""
    a, s = alpha(t)

    def answer(z: torch.Tensor) -> torch.Tensor:
        z = z.double()
        x0 = 0.5 * z + 0.1
        eps = (z - a * x0) / s
        return {"eps": eps, "v": a * eps - s * x0, "residual": z - x0}[prediction].float()

    toy = Toy(answer, prediction, t)
    image = random_picture(30, 33)
    result = upscale(toy, image, plain(scale=2, tile=64, overlap=16))
    expected = (0.5 * (2 * resize(image, 60, 66) - 1) + 0.1 + 1) / 2
    assert 0 < expected.min() < expected.max() < 1, "nothing is clamped"
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert toy.timesteps == {t}


def by_hand(backbone: DiffusersBackbone, image: torch.Tensor, residuals: list[torch.Tensor] | None) -> torch.Tensor:
    """The whole method for one tile with the diffusers modules alone; `image` has its final size."""
    height, width = image.shape[-2:]
    pixels = np.pad(image[0].numpy(), ((0, 0), (0, -height % 16), (0, -width % 16)), mode="reflect")
    embedding = backbone.prompt[None]
    with torch.no_grad():
        posterior = backbone.vae.encode(2 * torch.from_numpy(pixels)[None] - 1).latent_dist
        assert posterior.std.mean() > 0.01, "a sample would differ from the mode"
        z = posterior.mean * 0.7
        output = backbone.unet(
            z, 200, encoder_hidden_states=embedding, down_intrablock_additional_residuals=residuals
        ).sample
        decoded = backbone.vae.decode((z - output) / 0.7).sample
    return ((decoded + 1) / 2)[:, :, :height, :width].clamp(0, 1)


@pytest.fixture(scope="module")
def nano_by_hand(base, nano) -> DiffusersBackbone:
    nano.prompt = open_base(base).prompt_embedding()
    return nano


def test_real_networks_do_what_the_method_says(nano_by_hand: DiffusersBackbone) -> None:
    image = photo(44, 61)
    result = upscale(nano_by_hand, image, plain(scale=1))
    assert result.std() > 0.01, "not a constant picture"
    torch.testing.assert_close(result, by_hand(nano_by_hand, image, None), rtol=0, atol=1e-5)


def test_two_runs_are_bitwise_equal(nano: Backbone) -> None:
    image = photo(40, 56)
    torch.manual_seed(1)
    first = upscale(nano, image, UpscaleSettings(scale=2, tile=64, overlap=16))
    torch.manual_seed(2)
    assert torch.equal(first, upscale(nano, image, UpscaleSettings(scale=2, tile=64, overlap=16)))


def test_result_can_be_used_outside_inference_mode_after_leaving_it(nano: Backbone) -> None:
    """And the schedule that `upscale` used first, inside inference mode, still gives gradients."""
    upscale(nano, random_picture(8, 8))
    x0 = torch.ones(1, 1, 1, 1, requires_grad=True)
    nano.descriptor.schedule.add_noise(x0, torch.ones(1, 1, 1, 1), 200).sum().backward()
    assert x0.grad is not None


# --- tiles and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_tiled_equals_untiled_for_a_local_network(batch: int) -> None:
    def local(z: torch.Tensor) -> torch.Tensor:
        return z - torch.tanh(1.5 * z)

    image = random_picture(50, 70)
    tiled_toy, whole_toy = Toy(local), Toy(local)
    tiled = upscale(tiled_toy, image, plain(tile=128, overlap=32, batch=batch))
    whole = upscale(whole_toy, image, plain(tile=0))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)
    assert whole_toy.seen[:2] == [("encode", (1, 3, 208, 288)), ("unet", (1, 192, 26, 36))]
    for name, shape in tiled_toy.seen:
        if name == "unet":
            assert max(shape[-2:]) <= 16
            assert shape[0] <= batch
        else:  # stripes along the longer side, with the area of a tile
            assert shape[-2] == (208 if name == "encode" else 26)
            assert shape[-2] * shape[-1] <= (128**2 if name == "encode" else 16**2)
    assert max(shape[0] for _, shape in tiled_toy.seen) == batch
    assert set(tiled_toy.pixels) == {208 * 72}
    assert set(whole_toy.pixels) == {208 * 288}  # a single stripe


def test_tile_batches_give_the_same_picture_with_real_networks(nano: Backbone) -> None:
    image = photo(60, 80)
    one, three = (upscale(nano, image, UpscaleSettings(scale=2, tile=64, overlap=16, batch=n)) for n in (1, 3))
    torch.testing.assert_close(one, three, rtol=0, atol=1e-4)


class WithoutUNet:
    """`nano` whose UNet changes nothing, so that only the VAE's mode tells results apart."""

    def __init__(self, backbone: DiffusersBackbone) -> None:
        self.descriptor, self.encode, self.decode = backbone.descriptor, backbone.encode, backbone.decode
        self.vae_half = backbone.vae_half

    def predict_noise(self, latent, timestep, features=None) -> torch.Tensor:
        return torch.zeros_like(latent)


def test_exact_does_not_depend_on_the_tile_and_bounded_does_not_depend_on_the_batch(nano: DiffusersBackbone) -> None:
    image, still = photo(96, 120), WithoutUNet(nano)
    whole = upscale(still, image, plain(scale=2, tile=0))
    for tile in (64, 128):
        exact = upscale(still, image, plain(scale=2, tile=tile, overlap=16, vae="exact"))
        torch.testing.assert_close(exact, whole, rtol=0, atol=1e-5)
    bounded = upscale(still, image, plain(scale=2, tile=64, overlap=16, vae="bounded"))
    assert 1e-4 < (bounded - whole).abs().max() < 0.2
    batched = upscale(still, image, plain(scale=2, tile=64, overlap=16, vae="bounded", batch=3))
    torch.testing.assert_close(batched, bounded, rtol=0, atol=1e-6)


def test_auto_is_exact_up_to_a_size(nano: DiffusersBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    image, still = photo(48, 60), WithoutUNet(nano)
    results = {
        mode: upscale(still, image, plain(scale=2, tile=64, overlap=16, vae=mode)) for mode in ("exact", "bounded")
    }
    assert not torch.equal(results["exact"], results["bounded"])
    for largest, mode in ((96 * 128, "exact"), (96 * 128 - 1, "bounded")):
        monkeypatch.setattr(tiled_vae, "LARGEST_EXACT", largest)
        assert torch.equal(upscale(still, image, plain(scale=2, tile=64, overlap=16)), results[mode])


def test_pictures_of_a_batch_equal_each_alone(nano: Backbone) -> None:
    images = torch.cat([photo(20, 24), random_picture(20, 24, 2)])
    together = upscale(nano, images, UpscaleSettings(scale=2))
    alone = torch.cat([upscale(nano, image[None], UpscaleSettings(scale=2)) for image in images])
    assert together.shape == (3, 3, 40, 48)
    assert torch.equal(together, alone)


def test_plan_is_in_cells_and_respects_the_unets_multiple() -> None:
    plan = plan_upscale(Toy(multiple_of=64).descriptor, 256, 160, plain(tile=512, overlap=100)).tiles
    for box in plan.boxes:
        for span in (box.rows, box.columns):
            assert span.start % 8 == span.stop % 8 == 0
            assert span.stop - span.start <= 64
    assert (plan.height, plan.width) == (128, 80)
    rows = sorted({box.rows for box in plan.boxes}, key=lambda span: span.start)
    assert all(left.stop - right.start >= 100 / 8 for left, right in itertools.pairwise(rows))


def test_an_overlap_that_leaves_a_family_no_step_is_named_in_pixels() -> None:
    toy = Toy(multiple_of=64)
    narrow = plain(tile=64, overlap=16)
    with pytest.raises(IcmsrError, match="tile of 64 takes an overlap of at most 0, got 16: try a tile of 128"):
        upscale(toy, random_picture(20, 20), narrow)
    assert toy.seen == []
    assert upscale(toy, random_picture(16, 16), narrow).shape[-1] == 64, "one tile needs no step"
    assert upscale(Toy(), random_picture(20, 20), narrow).shape[-1] == 80, "nano has room"
    assert upscale(toy, random_picture(20, 20), plain(tile=64, overlap=0)).shape[-1] == 80


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch", "vae"), [(1, 1, "exact"), (2, 4, "exact"), (1, 1, "bounded")])
def test_progress_reaches_its_total(count: int, batch: int, vae: str) -> None:
    chosen = plain(tile=64, overlap=16, batch=batch, vae=vae)
    toy, steps = Toy(), []
    upscale(toy, random_picture(30, 45, count), chosen, steps=Steps(lambda done, total: steps.append((done, total))))
    total = count * plan_upscale(toy.descriptor, 30, 45, chosen).steps
    done = [step for step, _ in steps]
    assert {entry for _, entry in steps} == {total}
    assert done == sorted(set(done))
    assert done[-1] == total
    seen = [shape[0] for name, shape in toy.seen if vae == "exact" or shape[0] == 1]  # bounded looks at samples too
    assert total == sum(seen) > 3 * count


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_a_stop_from_progress_ends_the_run_and_spoils_nothing(nano: Backbone, stop_at: int) -> None:
    class Stop(BaseException):
        pass

    image, chosen = photo(32, 48), UpscaleSettings(scale=2, tile=64, overlap=16)
    expected = upscale(nano, image, chosen)
    seen = []

    def show(done: int, total: int) -> None:
        seen.append(done)
        if done == stop_at:
            raise Stop

    with pytest.raises(Stop):
        upscale(nano, image, chosen, steps=Steps(show))
    assert seen == list(range(1, stop_at + 1))
    assert torch.equal(upscale(nano, image, chosen), expected)


# --- features --------------------------------------------------------------------------------------------------------


def nano_features(boxes: Sequence[Box]) -> list[torch.Tensor]:
    """What an adapter would give nano's two levels for these tiles; different at every place."""
    maps = []
    for channels, step in ((64, 1), (128, 2)):
        tiles = []
        for box in boxes:
            y = torch.arange(box.rows.start, box.rows.stop, step)[:, None]
            x = torch.arange(box.columns.start, box.columns.stop, step)[None, :]
            tiles.append(torch.sin(0.7 * y + 0.3 * x).expand(channels, -1, -1))
        maps.append(2 * torch.stack(tiles))
    return maps


def test_features_reach_the_unet(nano_by_hand: DiffusersBackbone) -> None:
    image = photo(48, 64)
    result = upscale(nano_by_hand, image, plain(scale=1), features=nano_features)
    plan = plan_upscale(nano_by_hand.descriptor, 48, 64, plain(scale=1)).tiles
    assert len(plan) == 1
    expected = by_hand(nano_by_hand, image, nano_features(plan.boxes))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert (result - by_hand(nano_by_hand, image, None)).abs().max() > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_every_tile_gets_its_own_features(nano: Backbone, batch: int) -> None:
    image, chosen = photo(64, 160), plain(scale=1, tile=64, overlap=16, batch=batch)
    asked: list[Box] = []

    def features(boxes: Sequence[Box]) -> list[torch.Tensor]:
        asked.extend(boxes)
        return nano_features(boxes)

    guided = upscale(nano, image, chosen, features=features)
    free = upscale(nano, image, chosen)
    plan = plan_upscale(nano.descriptor, 64, 160, chosen).tiles
    assert tuple(asked) == plan.boxes
    assert len(plan) == 3
    for box in plan.boxes:
        own = slice(8 * box.columns.fade_in[1], 8 * box.columns.fade_out[0])
        assert (guided - free)[..., own].abs().max() > 1e-3, box


def test_a_list_of_features_survives_the_call(nano: Backbone) -> None:
    """diffusers empties the list that it is given; a second call with it would be silently unconditioned."""
    latent = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    box = plan_upscale(nano.descriptor, 16, 16, plain()).tiles.boxes[0]
    features = nano_features([box])
    kept = list(features)
    with torch.inference_mode():
        free = nano.predict_noise(latent, 200)
        first = nano.predict_noise(latent, 200, features)
        second = nano.predict_noise(latent, 200, features)
    assert all(entry is old for entry, old in zip(features, kept, strict=True))
    assert torch.equal(first, second)
    assert (first - free).abs().max() > 1e-3
    shared = nano_features([box])
    image, chosen = photo(64, 160), plain(scale=1, tile=64, overlap=16)
    fresh = upscale(nano, image, chosen, features=lambda boxes: [entry.clone() for entry in shared])
    assert torch.equal(upscale(nano, image, chosen, features=lambda boxes: shared), fresh)


# --- colour ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["wavelet", "adain"])
def test_colour_correction_takes_a_decoders_tone_away(mode: str) -> None:
    toy = Toy()
    toy.tone = 0.1
    image = 0.2 + 0.6 * photo(40, 30)
    reference = resize(image, 160, 120)
    fixed = upscale(toy, image, UpscaleSettings(color_fix=mode))
    torch.testing.assert_close(fixed, reference, rtol=0, atol=2e-5)
    assert (upscale(toy, image, plain()) - reference).mean() == pytest.approx(0.05, abs=1e-3)


def test_padding_does_not_enter_the_colour_statistics() -> None:
    """A picture of one row beyond a multiple: its 15 padded rows are cropped before the correction."""
    image = photo(17, 32)
    result = upscale(Toy(), image, UpscaleSettings(scale=1, color_fix="adain"))
    torch.testing.assert_close(result, image, rtol=0, atol=1e-5)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_plan_for_another_size_is_refused_before_anything_runs() -> None:
    toy = Toy()
    plan = plan_upscale(toy.descriptor, 20, 30, plain())
    with pytest.raises(IcmsrError, match=r"the plan is for pictures of 20 x 30 \(height x width\), got 30 x 20"):
        run_plan(toy, random_picture(30, 20), plan)
    assert toy.seen == []


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.zeros(3, 8, 8), r"pictures \[N, 3, H, W\] .*got \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), r"got \(1, 4, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8), r"at least 1 x 1 pixel, got \(1, 3, 0, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"floating-point pictures in \[0, 1\], got torch.uint8"),
        (torch.full((1, 3, 8, 8), float("nan")), "finite pictures in .* got NaN or infinite"),
        (torch.full((1, 3, 8, 8), float("inf")), "finite pictures in .* got NaN or infinite"),
    ],
)
def test_unusable_inputs_are_refused_before_anything_runs(image: torch.Tensor, text: str) -> None:
    toy = Toy()
    with pytest.raises(IcmsrError, match=text):
        upscale(toy, image)
    assert toy.seen == [], "nothing ran"


def test_a_precision_that_networks_cannot_run_in_is_refused(nano: DiffusersBackbone) -> None:
    with pytest.raises(IcmsrError, match=r"networks run in fp32, bf16, fp16, got float64"):
        DiffusersBackbone(nano.unet, nano.vae, nano.descriptor, torch.zeros(1, 32), torch.device("cpu"), torch.float64)


def test_threads_that_share_a_backbone_get_the_pictures_that_they_would_get_alone(nano: DiffusersBackbone) -> None:
    pictures = [photo(48 + 8 * number, 60) for number in range(4)]
    wanted = plain(scale=2, tile=64, overlap=16, vae="exact")
    alone = [upscale(nano, picture, wanted) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda picture: upscale(nano, picture, wanted), pictures))
    assert all(torch.equal(one, other) for one, other in zip(alone, together))


def test_threads_may_load_backbones_at_the_same_time(base: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_backbone(Recipe(base)), range(4)))
    picture = photo(16, 16)
    first, *others = (upscale(backbone, picture) for backbone in loaded)
    assert all(torch.equal(first, other) for other in others)
