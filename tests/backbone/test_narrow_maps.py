"""Maps that a convolution with a stride makes one column wide, which bfloat16 on a CPU with AMX computes wrongly."""

import pytest
import torch
from torch import nn

from icmsr_core.backbone.narrow_maps import mend_narrow_maps, widened
from icmsr_core.tiled_vae.striped_layers import StripedConvolution


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("padding", "widths"), [(1, (1, 2, 3, 4)), ((0, 1), (1, 2, 3)), (0, (3, 4, 5)), ((1, 0), (3, 5))]
)
@torch.inference_mode()
def test_a_convolution_with_a_stride_is_right_in_every_map(layout, padding, widths):
    torch.manual_seed(0)
    convolution = nn.Conv2d(32, 32, 3, stride=2, padding=padding)
    rounded = nn.Conv2d(32, 32, 3, stride=2, padding=padding).bfloat16()
    rounded.load_state_dict(convolution.state_dict())
    mended = nn.Conv2d(32, 32, 3, stride=2, padding=padding)
    mended.load_state_dict(convolution.state_dict())
    for network in (rounded, mended):
        mend_narrow_maps(network)
    for width in widths:
        given = torch.randn(2, 32, 40, width).contiguous(memory_format=layout)
        wanted = convolution(given)
        assert mended(given).shape == wanted.shape
        assert error(mended(given), wanted) < 1e-6
        assert error(rounded(given.bfloat16()), wanted) < 0.02
        with torch.autocast("cpu", torch.bfloat16):
            assert error(mended(given), wanted) < 0.02


class Faulty(nn.Conv2d):
    """As on a CPU with AMX in bfloat16: a result of one column is none."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        result = super().forward(given)
        return torch.full_like(result, float("nan")) if result.shape[-1] == 1 else result


@torch.inference_mode()
def test_the_fault_is_mended_in_networks_and_in_stripes():
    torch.manual_seed(0)
    whole, faulty = nn.Conv2d(4, 4, 3, stride=2), Faulty(4, 4, 3, stride=2)
    faulty.load_state_dict(whole.state_dict())
    given = torch.randn(1, 4, 10, 6)
    layer = StripedConvolution(faulty, 2, 3, 6, False)
    columns = [found for stripe in given.split(2, 3) if (found := layer.feed(stripe)) is not None]
    assert [column.shape[-1] for column in columns] == [1, 2]
    assert error(torch.cat(columns, 3), whole(nn.functional.pad(given, (0, 1, 0, 1)))) < 1e-6
    assert faulty(given[..., :3]).isnan().all()
    mend_narrow_maps(faulty)
    assert error(faulty(given[..., :3]), whole(given[..., :3])) < 1e-6


def test_gradients_of_a_narrow_map_are_those_of_float32():
    torch.manual_seed(0)
    exact, mended = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
    mended.load_state_dict(exact.state_dict())
    mend_narrow_maps(mended)
    given, weights = torch.randn(2, 16, 40, 2), torch.randn(2, 16, 20, 1)
    found = []
    for network, precision in ((exact, False), (mended, True)):
        image = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            result = network(image)
        found.append(torch.autograd.grad((result.float() * weights).sum(), [image, *network.parameters()]))
    assert all(error(ours, theirs) < 0.02 for theirs, ours in zip(*found))


def test_maps_that_stay_wide_are_left_alone():
    convolution = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    assert widened(convolution, torch.zeros(1, 4, 8, 3)) is None
    assert widened(nn.Conv2d(4, 4, 3, padding=1), torch.zeros(1, 4, 8, 1)) is None
    assert widened(convolution, torch.zeros(1, 4, 8, 2, device="meta")) is None
    assert widened(convolution, torch.zeros(1, 4, 8, 2)).shape == (1, 4, 8, 4)
