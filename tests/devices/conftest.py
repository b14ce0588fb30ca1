"""Tests on the pretend device (`tests/support/pretend_device.py`), each in a process of its own."""

import pytest
from torch.utils import backend_registration


@pytest.fixture(autouse=True, scope="session")
def torch_with_devices_in_python() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("a device in Python needs torch 2.9 or later")
