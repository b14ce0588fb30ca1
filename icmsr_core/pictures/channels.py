"""Maps of any number of channels as pictures to look at."""

from __future__ import annotations

from torch import Tensor


def as_rgb(maps: Tensor) -> Tensor:
    """`maps` [N, C, H, W] as pictures [N, 3, H, W]: the first three channels, or the first one in grey if C is below 3.

    A view: nothing is copied.
    """
    return maps[:, :3] if maps.shape[1] >= 3 else maps[:, :1].expand(-1, 3, -1, -1)
