"""bfloat16 in training: who computes in it, and the layout of the weights."""

import pytest
import torch
from torch import nn

from icmsr_core.runtime.precision import autocast, lay_out


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_named_precision(precision, dtype):
    layer = nn.Conv2d(3, 4, 3)
    with autocast(torch.device("cpu"), precision):
        assert layer(torch.rand(1, 3, 5, 5)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(("precision", "last"), [("bf16", True), ("fp32", False)])
def test_the_layout_changes_for_bf16_alone_and_no_value_with_it(precision, last):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    parameters, values = list(network.parameters()), [value.clone() for value in network.parameters()]
    lay_out(network, precision)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) is last
    assert network[0].weight.is_contiguous() is not last
    assert all(now is before for now, before in zip(network.parameters(), parameters))  # an optimizer may hold them
    assert all(torch.equal(now, before) for now, before in zip(network.parameters(), values))
