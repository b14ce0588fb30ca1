"""What a result may ask of a device, counted instead of timed: launches, synchronisations, bytes.

That is one of 1024 px of nano, and one of 512 px of Stable Diffusion with a tenth of its channels (of 1024 px with
`-m slow`).

U is the number of launches of one pass that is not tiled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.tiled_vae.modes import count_norms
from icmsr_core.tiled_vae.tiled import decode_tiled, encode_tiled
from icmsr_core.upscale.one_step import run_plan
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.tiling import run_tiles
from tests.support.apart import apart
from tests.support.device_models import NANO, load
from tests.support.device_trace import Trace
from tests.support.pretend_device import pretend_device

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Counts:
    """Of one result."""

    side: int
    """Pixels."""
    stripes: int
    batches: int
    norms: int
    """GroupNorms of both halves of the VAE."""
    unet: int
    """U of the UNet, for a batch of tiles."""
    encoder: int
    """U of the encoder."""
    decoder: int
    tiled_unet: int
    """Launches for all batches, cutting and blending included."""
    tiled_encoder: int
    tiled_decoder: int
    synchronisations: int
    bytes_to_device: int
    bytes_to_host: int
    summary: str
    """Where the most of it is asked for."""


def counts_of(recipe: Recipe, side: int) -> dict[str, Counts]:
    """Of a result of `side` x `side` px in tiles of half the side, by the VAE's mode."""
    with pretend_device("cuda", values=False) as device, torch.inference_mode():
        backbone = load(recipe, "pretend")
        return {mode: count(backbone, device.trace, side, mode) for mode in ("exact", "bounded")}


def count(backbone: DiffusersBackbone, trace: Trace, side: int, mode: str) -> Counts:
    """The picture is in main memory; in the launches of the parts, theirs is on the device."""
    descriptor, factor = backbone.descriptor, backbone.descriptor.latent_factor
    settings = UpscaleSettings(size=(side, side), tile=side // 2, overlap=side // 8, vae=mode, batch=2)
    plan = plan_upscale(descriptor, side // 4, side // 4, settings)
    picture = torch.rand(1, 3, side // 4, side // 4)
    latent = torch.rand(1, descriptor.latent_channels, side // factor, side // factor).to("pretend")
    image, result = (torch.zeros(1, 3, side, side, device="pretend") for _ in range(2))
    unet = partial(backbone.predict_noise, timestep=descriptor.timestep)
    tile = latent[:, :, : side // 2 // factor, : side // 2 // factor].expand(2, -1, -1, -1)
    unet(tile)  # what the first call computes once

    def launches(function: Callable[[], object]) -> int:
        return trace.launched_during(function)

    whole = [partial(unet, tile), partial(backbone.encode, image), partial(backbone.decode, latent)]
    tiled = [
        lambda: run_tiles(latent, plan.tiles, lambda tiles, _: unet(tiles), batch=2),
        lambda: encode_tiled(backbone, image, plan.stripes, exact=plan.exact),
        lambda: decode_tiled(backbone, latent, result, plan.stripes, exact=plan.exact),
    ]
    parts = [launches(part) for part in (*whole, *tiled)]
    halves = [backbone.vae_half(part, 0) for part in ("encoder", "decoder")]
    trace.clear()
    run_plan(backbone, picture, plan)
    return Counts(
        side,
        plan.stripes.number,
        -(-len(plan.tiles) // 2),
        sum(count_norms(half.steps) for half in halves),
        *parts,
        trace.synchronisations.total(),
        trace.copied("to device"),
        trace.copied("to host"),
        trace.summary(),
    )


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest, stable_diffusion: Recipe) -> dict[str, Counts]:
    """By the VAE's mode. Printed, for docs/performance.md."""
    name, side = request.param
    recipe = NANO if name == "nano" else stable_diffusion
    found = apart(counts_of, recipe, side)
    for mode, one in found.items():
        numbers = [f"{name} {value}" for name, value in vars(one).items() if name != "summary"]
        print(f"\n{name}, {mode}: {', '.join(numbers)}")
    return found


both_models = pytest.mark.parametrize(
    "counts",
    [
        ("nano", 768),
        *(pytest.param(case, marks=pytest.mark.slow) for case in (("nano", 1024), ("sd", 512), ("sd", 1024))),
    ],
    indirect=True,
    ids=["nano, 768 px", "nano, 1024 px", "sd, 512 px", "sd, 1024 px"],
)


@both_models
def test_the_unet_takes_little_more_than_its_batches(counts: dict[str, Counts]) -> None:
    exact = counts["exact"]
    assert exact.tiled_unet <= 1.05 * exact.batches * exact.unet


@both_models
def test_the_exact_vae_takes_at_most_three_passes_a_stripe(counts: dict[str, Counts]) -> None:
    exact = counts["exact"]
    assert exact.tiled_encoder <= 3 * exact.stripes * exact.encoder
    assert exact.tiled_decoder <= 3 * exact.stripes * exact.decoder


@both_models
def test_the_bounded_vae_takes_at_most_twice_the_exact_ones_launches(counts: dict[str, Counts]) -> None:
    exact, bounded = counts["exact"], counts["bounded"]
    assert bounded.tiled_encoder <= 2 * 3 * exact.stripes * exact.encoder
    assert bounded.tiled_decoder <= 2 * 3 * exact.stripes * exact.decoder


@both_models
def test_the_program_waits_once_a_batch_a_norm_and_a_finished_stripe(counts: dict[str, Counts]) -> None:
    exact = counts["exact"]
    pictures = 2  # there and back
    assert exact.synchronisations <= exact.batches + exact.norms + 2 * exact.stripes + pictures, exact.summary


@both_models
def test_only_the_picture_crosses_the_bus_and_once_each_way(counts: dict[str, Counts]) -> None:
    exact = counts["exact"]
    statistics, picture = 2**16, 4 * 3 * exact.side**2
    assert exact.bytes_to_device <= picture // 16 + statistics, exact.summary
    assert exact.bytes_to_host <= picture + statistics, exact.summary
