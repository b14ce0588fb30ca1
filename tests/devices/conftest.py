"""Tests on the pretend device (`tests/support/pretend_device.py`), each in a process of its own."""

import pytest
from torch.utils import backend_registration

from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import save_generator
from tests.support.device_models import condition_well
from tests.support.sd_files import complete_generator, write_sd_folder


@pytest.fixture(autouse=True, scope="session")
def torch_with_devices_in_python() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("a device in Python needs torch 2.9 or later")


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """SD2.1 with a tenth of its channels and random weights, and a generator for it."""
    folder = tmp_path_factory.mktemp("reduced_sd")
    base = write_sd_folder(folder / "base", "sd21", width_divisor=10)
    condition_well(base)
    generator = complete_generator(open_base(base), "residual", timestep=200)
    save_generator(folder / "generator.safetensors", generator)
    return Recipe(base, folder / "generator.safetensors")
