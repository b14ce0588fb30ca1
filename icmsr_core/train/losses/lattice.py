"""A loss that sees the lattice of the latent's cells: weaves in textures, staircases on slanted edges (ours).

Other losses hardly do: each pixel is a little off, at places that repeat with the period of the cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import IcmsrError


def lattice_l1(result: Tensor, truth: Tensor, period: int, window: int = 32, floor: float = 0.004) -> Tensor:
    """How differently the contrast of neighbours is spread over the positions inside a cell, place by place.

    `result` and `truth` are [N, C, H, W] in [-1, 1], a cell has `period` x `period` pixels. In every window of
    `window` x `window` pixels, the absolute differences of horizontal neighbours are averaged by column modulo
    `period`, those of vertical neighbours by row. The share of each average in their sum says where in a cell the
    contrast lies: about ``1 / period`` everywhere in a natural texture, more at the cell's border in a staircase. The
    loss is the L1 distance between the two pictures' shares, averaged over windows and directions: 0 to 2. `floor`, in
    the pictures' unit, is added to each average, so that areas flatter than half a grey level of 255 do not count. The
    amount of contrast has no influence.

    Raises IcmsrError for pictures smaller than a window, and for a window that is no multiple of the period.
    """
    if window % period:
        raise IcmsrError(f"the window must be a multiple of the period, got {window} and {period}")
    if min(result.shape[-2:]) < window:
        raise IcmsrError(f"the lattice needs pictures of at least {window} pixels a side, got {tuple(result.shape)}")
    across = _shares(result, period, window, floor) - _shares(truth, period, window, floor)
    along = _shares(result.mT, period, window, floor) - _shares(truth.mT, period, window, floor)
    return (across.abs().sum(1).mean() + along.abs().sum(1).mean()) / 2


def _shares(picture: Tensor, period: int, window: int, floor: float) -> Tensor:
    """Shares [N, period, rows, columns] of the positions in the horizontal contrast of each window."""
    contrast = F.pad(picture.float().diff(dim=-1).abs().mean(1), (0, 1))  # the last column has no neighbour
    contrast = contrast[..., : contrast.shape[-1] // period * period]
    with torch.autocast(contrast.device.type, enabled=False):
        by_position = contrast.unflatten(-1, (-1, period)).movedim(-1, 1)  # [N, period, H, W / period]
        energy = F.avg_pool2d(by_position, (window, window // period)) + floor
        return energy / energy.sum(1, keepdim=True)
