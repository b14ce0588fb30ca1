"""A lack of memory on the pretend device, as the command line meets it: what is tried then, and what is still held."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.cli import picture_jobs
from icmsr_core.cli.picture_jobs import UntilItFits
from icmsr_core.pictures.files import Picture
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from icmsr_core.train.networks.bases import NetworkConfig, make_unet
from icmsr_core.upscale.free_memory import free_memory
from icmsr_core.upscale.plan import UpscalePlan, plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.apart import apart
from tests.support.platform_rules import PLATFORMS, Platform
from tests.support.pretend_device import pretend_device
from tests.support.vaes import random_vae

HEIGHT, WIDTH = 70, 90
BUDGET = 2**30


class Outcome(NamedTuple):
    """What became of one picture in whose run an allocation failed."""

    result: np.ndarray
    """The picture after that."""
    expected: np.ndarray
    """The same with the smaller tile, on the CPU."""
    tried: list[int]
    """Largest tiles of the plans."""
    held: list[int]
    """Bytes on the device: before the run, and before the second attempt."""
    free: list[float | None]
    """What the device says then."""


def backbone_on(device: str) -> DiffusersBackbone:
    torch.manual_seed(0)
    unet = make_unet(NetworkConfig(latent_channels=4, unet_channels=(32, 32)))
    descriptor = BackboneDescriptor("toy", 4, 8, 16, 200, "residual")
    vae = random_vae(4, True, True)
    return DiffusersBackbone(unet, vae, descriptor, torch.zeros(1, 32), torch.device(device), torch.float32)


def upscaled_after_a_lack(platform: Platform, allocation: int) -> Outcome:
    picture = Picture(np.random.default_rng(0).random((HEIGHT, WIDTH, 3), dtype=np.float32))
    with pretend_device(platform, budget=BUDGET) as device:
        backbone = backbone_on("pretend")
        tried, held, free = [], [device.memory.now], [free_memory(torch.device("pretend"))]

        def plan_for(height: int, width: int) -> UpscalePlan:
            return plan_upscale(backbone.descriptor, height, width, UpscaleSettings(scale=4, tile=256, overlap=32))

        def noted(*arguments, real=picture_jobs.run_plan, **options):
            tried.append(arguments[2].settings.tile)
            if len(tried) == 1:
                device.memory.run_out_at(allocation)
            return real(*arguments, **options)

        def emptied() -> None:
            held.append(device.memory.now)
            free.append(free_memory(torch.device("pretend")))

        picture_jobs.run_plan, picture_jobs.empty_caches = noted, emptied
        result = UntilItFits(backbone, plan_for).upscale("picture", picture).rgb

    def smaller(height: int, width: int) -> UpscalePlan:
        return plan_upscale(backbone.descriptor, height, width, UpscaleSettings(scale=4, tile=128, overlap=32))

    expected = UntilItFits(backbone_on("cpu"), smaller).upscale("picture", picture).rgb
    return Outcome(result, expected, tried[:2], held, free)


@pytest.mark.long
@pytest.mark.parametrize("allocation", [0, 500])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_next_attempt_starts_with_the_memory_of_the_first(platform: Platform, allocation: int) -> None:
    found = apart(upscaled_after_a_lack, platform, allocation)
    assert found.tried == [256, 128]
    assert len(found.held) == 2
    # Constants of a few bytes each stay on the device from their first use on.
    assert found.held[1] <= found.held[0] + 16_384, "tensors of the failed attempt are still held"
    assert found.free == [BUDGET - held for held in found.held]
    assert np.abs(found.result - found.expected).max() <= 0.5 / 255
