"""Sizes of pictures: resizing, and padding to what the networks take."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..backbone.protocol import BackboneDescriptor
from .framing import Framing


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """`image` [N, C, H, W] resized to height x width: bicubic (a = -0.5) with antialiasing, as Pillow's.

    A new tensor, float32, clamped to [0, 1]. On the CPU where the device has no kernel for it: MPS before torch 2.8.
    """
    image = image.float()
    if image.shape[-2:] == (height, width):
        return image.clamp(0, 1)
    try:
        enlarged = _antialiased(image, height, width)
    except NotImplementedError:  # MPS has it in newer versions of torch only
        enlarged = _antialiased(image.cpu(), height, width).to(image.device)
    return enlarged.clamp_(0, 1)


def _antialiased(image: Tensor, height: int, width: int) -> Tensor:
    if width == 1:  # torch (2.11, CPU) mixes up the pixels of a picture that becomes one pixel wide, but not high
        return F.interpolate(image.mT, (width, height), mode="bicubic", antialias=True).mT
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True)


def at_work_size(image: Tensor, frame: Framing, kernel: str) -> Tensor:
    """The part of `image` [N, C, H, W] that `frame` uses, at its `work`, by the `kernel` of `RESIZES`; float32.

    ``antialiased`` is `resize`. ``bicubic`` is torch's plain one (a = -0.75), not clamped, to the size of the result;
    where the networks work at a larger size, antialiased bicubic to that. So HYPIR does it.
    """
    part = cut(image, frame).float()
    if kernel == "antialiased" or any(goal < own for goal, own in zip(frame.work, part.shape[-2:])):
        return resize(part, *frame.work)
    plain = frame.scaled if frame.work > frame.scaled else frame.work
    larger = F.interpolate(part, plain, mode="bicubic", align_corners=False)
    return larger if plain == frame.work else _antialiased(larger, *frame.work)


def cut(image: Tensor, frame: Framing) -> Tensor:
    """The part of `image` [N, C, H, W] that `frame` uses, a view. `image` covers the picture, in any size."""
    rows, columns = frame.crop_in(*image.shape[-2:]).slices()
    return image[:, :, rows, columns]


def fitted(worked: Tensor, frame: Framing) -> Tensor:
    """`worked` [N, C, h, w], at the frame's `work`, at its `target`: resized, cut to the middle, zeros around it."""
    if frame.work != frame.scaled:
        worked = resize(worked, *frame.scaled)
    (height, width), (rows, columns) = frame.target, frame.scaled
    top, left = max(0, rows - height) // 2, max(0, columns - width) // 2
    worked = worked[:, :, top : top + height, left : left + width]
    above, before = max(0, height - rows) // 2, max(0, width - columns) // 2
    around = (before, max(0, width - columns) - before, above, max(0, height - rows) - above)
    return F.pad(worked, around) if any(around) else worked


def resized_into(image: Tensor, frame: Framing) -> Tensor:
    """`image` [N, C, H, W] of the frame's source at its `target`, by `resize` alone: opacity, for example."""
    return fitted(resize(cut(image, frame), *frame.work), frame)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """`image` [N, C, H, W] extended at the bottom and the right to multiples of `multiple`.

    Pads by reflection, or by replication along an axis that is too short to reflect. The picture itself stays as it is:
    the caller crops the result.
    """
    height, width = image.shape[-2:]
    down, right = -height % multiple, -width % multiple
    for amounts, room in (((0, 0, 0, down), height), ((0, right, 0, 0), width)):
        if any(amounts):
            image = F.pad(image, amounts, mode="reflect" if max(amounts) < room else "replicate")
    return image


def padded_size(height: int, width: int, descriptor: BackboneDescriptor) -> tuple[int, int]:
    """(height, width) of a result after `pad_to_multiple` with the multiple that the family's networks need."""
    multiple = descriptor.multiple_of
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple
