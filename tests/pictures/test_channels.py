"""Maps as pictures."""

import pytest
import torch

from icmsr_core.pictures.channels import as_rgb


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_three_channels_are_shown_or_the_first_in_grey(channels: int, shown: list[int]) -> None:
    maps = torch.rand(2, channels, 5, 7)
    picture = as_rgb(maps)
    assert torch.equal(picture, maps[:, shown])
    assert picture.data_ptr() == maps.data_ptr()
