"""What the library asks of a machine with an accelerator."""

import pytest
import torch

from icmsr_core.measures.manifold import latent_error
from icmsr_core.runtime.device import pick_device
from icmsr_core.transfer import pins_memory
from tests.support.apart import apart
from tests.support.platform_rules import PLATFORMS, Platform
from tests.support.pretend_device import pretend_device

pytestmark = pytest.mark.long


def automatic_choice() -> tuple[str, bool]:
    with pretend_device("cuda"):
        return str(pick_device("auto")), pins_memory(torch.device("pretend"))


def test_auto_finds_the_accelerator_and_batches_can_be_pinned_for_it() -> None:
    assert apart(automatic_choice) == ("pretend", True)


def errors_of_latents(platform: Platform) -> list[float]:
    random = torch.Generator().manual_seed(0)
    latent, estimate = (torch.randn(2, 4, 5, 5, generator=random) for _ in range(2))
    expected = latent_error(estimate, latent)
    with pretend_device(platform):
        found = latent_error(estimate.to("pretend"), latent.to("pretend"))
    assert found.dtype == torch.float64
    return (found - expected).abs().tolist()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_errors_of_latents_are_measured_in_float64_on_any_device(platform: Platform) -> None:
    assert apart(errors_of_latents, platform) == [0, 0]
