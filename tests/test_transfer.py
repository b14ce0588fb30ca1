"""Copies to a device."""

import pytest
import torch

from icmsr_core.transfer import pins_memory, to_device


@pytest.mark.parametrize("name", ["cpu", "mps", "meta"])
def test_memory_is_not_pinned_for_devices_without_a_memory_of_their_own(name):
    assert pins_memory(torch.device(name)) is False


def test_a_tensor_that_is_there_already_is_not_copied():
    tensor = torch.ones(2)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor, torch.device("meta")).device.type == "meta"
