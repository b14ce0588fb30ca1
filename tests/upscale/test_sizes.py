"""Resizing as Pillow does it, and padding that only adds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icmsr_core.upscale.sizes import pad_to_multiple, resize
from tests.support.pictures import photo, random_picture


@pytest.mark.parametrize("layout", ["channels first", "channels last", "one channel"])
@pytest.mark.parametrize("size", [(300, 217), (100, 96), (64, 48), (40, 1), (300, 1), (1, 48), (9, 2)])
def test_resize_is_pillows_bicubic(size: tuple[int, int], layout: str) -> None:
    """Pillow's float mode to rounding, its 8-bit mode to one grey level; an IMAGE of ComfyUI is channels last."""
    image, (height, width) = photo(128, 96), size
    if layout == "channels last":
        image = image.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "one channel":
        image = image[:, :1].contiguous()
    result = resize(image, height, width)
    for channel in range(image.shape[1]):
        pixels = image[0, channel].numpy()
        exact = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        assert exact.mode == "F"
        np.testing.assert_allclose(result[0, channel].numpy(), np.asarray(exact).clip(0, 1), atol=2e-6)
        levels = Image.fromarray((pixels * 255).round().astype(np.uint8)).resize((width, height), Image.BICUBIC)
        ours = (result[0, channel] * 255).round().numpy()
        assert np.abs(ours - np.asarray(levels)).max() <= 1
    assert resize(image, 128, 96) is not image
    assert torch.equal(resize(image, 128, 96), image)
    assert resize(3 * image - 1, 50, 50).aminmax() == (0, 1)


@given(height=st.integers(1, 70), width=st.integers(1, 70), multiple=st.sampled_from([1, 8, 16, 64]))
@settings(deadline=None, max_examples=60)
def test_padding_adds_reflected_pixels_and_changes_none(height: int, width: int, multiple: int) -> None:
    image = random_picture(height, width)
    padded = pad_to_multiple(image, multiple)
    assert padded.shape[-2] == math.ceil(height / multiple) * multiple
    assert padded.shape[-1] == math.ceil(width / multiple) * multiple
    assert torch.equal(padded[:, :, :height, :width], image), "never squeezed"
    expected = image[0].numpy()
    for axis, length in ((1, height), (2, width)):
        amount = padded.shape[axis + 1] - length
        widths = [(0, amount if index == axis else 0) for index in range(3)]
        expected = np.pad(expected, widths, mode="reflect" if amount < length else "edge")
    np.testing.assert_array_equal(padded[0].numpy(), expected)


def test_resizing_without_a_kernel_on_the_device_runs_on_the_cpu(monkeypatch) -> None:
    """As with MPS before torch 2.8, which has no antialiased bicubic."""
    image = torch.rand(1, 3, 7, 9)
    expected, interpolate, devices = resize(image, 20, 30), F.interpolate, []

    def without_kernel(given: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        devices.append(given.device)
        if len(devices) == 1:
            raise NotImplementedError("aten::_upsample_bicubic2d_aa.out is not implemented for the MPS device")
        return interpolate(given, *arguments, **options)

    monkeypatch.setattr(F, "interpolate", without_kernel)
    assert torch.equal(resize(image, 20, 30), expected)
    assert devices == [torch.device("cpu")] * 2
