"""Convolutions with a stride whose result is one column wide, on a CPU.

In bfloat16 oneDNN computes them wrongly on CPUs with AMX (torch 2.11: unrelated numbers, infinities, NaN). With columns
of zeros at the right the result has a second column and a right first one. Source: ours, measured.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def widened(convolution: nn.Conv2d, given: Tensor) -> Tensor | None:
    """`given` [N, C, H, W] with more columns of zeros, where the first column of the result is all of it without them.

    None where the result has several columns, or there is no stride, and on other devices. The convolution must pad
    with zeros.
    """
    stride, kernel = convolution.stride[1], convolution.kernel_size[1]
    if stride == 1 or given.device.type != "cpu":
        return None
    columns = (given.shape[-1] + 2 * int(convolution.padding[1]) - kernel) // stride + 1
    return F.pad(given, (0, stride)) if columns == 1 else None


def mend_narrow_maps(network: nn.Module) -> None:
    """Makes the convolutions with a stride in `network` right in maps that they make one column wide."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.stride[1] > 1 and module.padding_mode == "zeros":
            module.register_forward_hook(_mended)


def _mended(convolution: nn.Module, given: tuple[Any, ...], _result: Tensor) -> Tensor | None:
    assert isinstance(convolution, nn.Conv2d)
    wide = widened(convolution, given[0])
    if wide is None:
        return None
    result: Tensor = convolution(wide)  # two columns: this hook leaves them alone
    return result[..., :1]
