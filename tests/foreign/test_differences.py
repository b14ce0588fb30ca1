"""How much what is done otherwise than by the relatives' own programs changes a picture, measured on nano.

nano stands in for Stable Diffusion, whose weights are not at hand: kernel, tiles and padding are around the networks.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from icmsr_core.pictures.files import read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.color import wavelet_color_fix
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import demo_picture, embedded_generator

pytestmark = pytest.mark.long


def decibels(one: torch.Tensor, other: torch.Tensor) -> float:
    """PSNR of two pictures in [0, 1]."""
    return -10 * math.log10(float((one - other).square().mean()))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(Recipe(generator=embedded_generator()))


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return to_tensor(read_picture(demo_picture()).rgb)[:, :, 20:116, 30:126].contiguous()


def test_kernel_overlap_padding_and_the_order_of_the_colours_change_little(backbone, picture):
    plain = upscale(backbone, picture, UpscaleSettings())
    found = {"kernel": decibels(plain, upscale(backbone, picture, UpscaleSettings(resize="bicubic")))}
    tiles = [UpscaleSettings(tile=256, overlap=overlap) for overlap in (64, 128)]
    found["overlap"] = decibels(*(upscale(backbone, picture, one) for one in tiles))
    # 90 x 90 to 360 x 360, which is padded by reflection; a program that pads with black gives the networks this.
    odd = picture[:, :, :90, :90]
    whole = resize(odd, 360, 360)
    black = F.pad(whole, (0, 24, 0, 24), value=0.5)  # zero in [-1, 1]
    same_size = UpscaleSettings(scale=1, color_fix="none")
    ours = wavelet_color_fix(upscale(backbone, whole, same_size), whole)
    theirs = wavelet_color_fix(upscale(backbone, black, same_size)[:, :, :360, :360].contiguous(), whole)
    found["padding"] = decibels(ours, theirs)
    # A result of 128 px made at 256: colours corrected there, or once it is resized.
    small = picture[:, :, :32, :32]
    before = upscale(backbone, small, UpscaleSettings(smallest=256))
    raw = upscale(backbone, small, UpscaleSettings(smallest=256, color_fix="none"))
    found["colours"] = decibels(before, wavelet_color_fix(raw, resize(small, 128, 128)).clamp(0, 1))
    print(", ".join(f"{name} {value:.1f} dB" for name, value in found.items()))
    assert min(found.values()) > 25
    assert max(found.values()) < 110  # each of them is a change
