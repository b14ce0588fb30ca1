"""Conversions between pixel ranges."""

import pytest
import torch

from icmsr_core.pictures.ranges import bytes_to_signed, bytes_to_unit, signed_to_unit, unit_to_signed

BYTES = torch.arange(256, dtype=torch.uint8)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def test_bytes_reach_both_ends_of_either_range_exactly() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8)
    assert bytes_to_unit(ends).tolist() == [0, 1]
    assert bytes_to_signed(ends).tolist() == [-1, 1]


def test_the_way_from_bytes_by_the_unit_range_differs_from_the_direct_one_by_rounding_alone() -> None:
    assert torch.allclose(unit_to_signed(bytes_to_unit(BYTES)), bytes_to_signed(BYTES), rtol=0, atol=2**-23)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unit_and_signed_convert_in_the_type_of_the_picture_without_changing_it(dtype: torch.dtype) -> None:
    picture = torch.linspace(-0.5, 1.5, 41, dtype=torch.float64).to(dtype)
    before = picture.clone()
    signed, unit = unit_to_signed(picture), signed_to_unit(picture)
    assert signed.dtype == unit.dtype == dtype
    assert torch.equal(picture, before)
    assert torch.equal(signed, picture * 2 - 1)
    assert torch.equal(unit, (picture + 1) / 2)


@pytest.mark.parametrize(("convert", "slope"), [(unit_to_signed, 2.0), (signed_to_unit, 0.5)])
def test_gradients_pass_through(convert, slope: float) -> None:
    picture = torch.rand(1, 3, 4, 4, requires_grad=True)
    convert(picture * 1).sum().backward()
    assert torch.equal(picture.grad, torch.full_like(picture, slope))
