"""A mask with the embedded model: the inside is as without one."""

import pytest
import torch

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.masking import plan_mask
from icmsr_core.upscale.one_step import run_plan
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import embedded_generator
from tests.support.pictures import photo


@pytest.fixture(scope="module")
def nano() -> DiffusersBackbone:
    return load_backbone(Recipe(generator=embedded_generator()))


@pytest.mark.parametrize(("vae", "levels"), [("exact", 1.0), ("bounded", 6.0)])
def test_with_real_networks_the_inside_is_as_without_a_mask(nano: DiffusersBackbone, vae: str, levels: float) -> None:
    """Exact within 1 of 255; bounded within its own error, the tiles' and that of the statistics (performance.md)."""
    image, mask = photo(96, 96), torch.zeros(1, 1, 96, 96)
    mask[:, :, 36:60, 40:68] = 1
    settings = UpscaleSettings(scale=4, tile=128, overlap=32, vae=vae)
    plan = plan_upscale(nano.descriptor, 96, 96, settings)
    whole, part = run_plan(nano, image, plan), run_plan(nano, image, plan, mask=mask)
    masked = plan_mask(nano.descriptor, plan, mask)
    assert masked is not None
    assert bool(masked.regions) == (vae == "bounded")
    difference = 255 * (part - whole)[..., 144:240, 160:272].abs()
    print(f"{vae}: largest {float(difference.max()):.3f}, mean {float(difference.mean()):.4f} of 255")
    assert float(difference.max()) < levels
    assert float(difference.mean()) < levels / 10
    assert torch.equal(part[..., :64, :64], resize(image, 384, 384)[..., :64, :64])
