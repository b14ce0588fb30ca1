"""Colour correction of a result against its input, which has been enlarged to the same size.

The decoder shifts colours, and the input's low frequencies are right. `wavelet` takes them from the input and the
detail from the result; `adain` changes only the mean and the spread of each channel. Pictures are [N, C, H, W], float,
RGB in [0, 1]. Each channel runs in stripes of rows, so the work needs two buffers of some hundred rows and the output,
which may be the result itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import IcmsrError
from .settings import COLOR_FIXES

LEVELS = 5
"""Blurs of the wavelet correction, as in StableSR and OSEDiff. Together they reach 2^5 - 1 = 31 pixels."""
STRIPE_ROWS = 512
"""Rows of a stripe. The blurs also read 31 rows above and below it, an eighth more work."""


def wavelet_color_fix(result: Tensor, reference: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The high frequencies of `result` plus the low frequencies of `reference`: [N, C, H, W], in the type of `result`.

    The low frequencies are what `LEVELS` a-trous blurs leave: 3x3 kernels [1 2 1] x [1 2 1] / 16 whose taps are 1, 2,
    4, ... pixels apart, with replicated edges. The sum is not clamped: detail may overshoot [0, 1].
    `result` and `reference` are [N, C, H, W], float, in [0, 1], of one shape. It is written into `out`, which may be
    `result`, or into a new tensor. Raises IcmsrError for other shapes. Source: StableSR (arXiv 2305.07015), as in
    OSEDiff.
    """
    output = _check(result, reference, out)
    reach = 2**LEVELS - 1
    height, width = result.shape[2:]
    size = min(height, max(STRIPE_ROWS, reach) + 2 * reach) * width
    buffers = torch.empty((2, size), dtype=_work_dtype(result), device=result.device)
    for target, mine, right in zip(output.flatten(0, 1), result.flatten(0, 1), reference.flatten(0, 1)):
        above = buffers.new_empty((0, width))
        for first, last in _stripes(height, max(STRIPE_ROWS, reach)):
            low, high = first - above.shape[0], min(height, last + reach)
            plane, spare = (buffer[: (high - low) * width].view(high - low, width) for buffer in buffers)
            # The blur is linear: result - low(result) + low(reference) = result + low(reference - result). That is one
            # blur instead of two, and where the pictures agree nothing changes at all.
            plane[: first - low].copy_(above)
            plane[first - low :].copy_(right[first:high]).sub_(mine[first:high])
            # The next stripe needs these rows, and they are overwritten below if `out` is `result`.
            above = plane[max(0, last - reach - low) : last - low].clone()
            for level in range(LEVELS):
                _smooth_rows(plane, 2**level, spare)
                _smooth_rows(spare.T, 2**level, plane.T)
            own = plane[first - low : last - low]
            target[first:last].copy_(own.add_(mine[first:last]))
    return output


def adain_color_fix(result: Tensor, reference: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`result` with the mean and the standard deviation of `reference`, for each picture and channel: [N, C, H, W].

    Type, clamping, arguments and errors are those of `wavelet_color_fix`.
    Source: adaptive instance normalisation (arXiv 1703.06868), as in StableSR and OSEDiff.
    """
    output = _check(result, reference, out)
    # One buffer for all stripes: the allocator may keep what each stripe would free, four stripes' worth and more.
    height, width = result.shape[2:]
    buffer = torch.empty((min(height, STRIPE_ROWS), width), dtype=_work_dtype(result), device=result.device)
    for target, mine, right in zip(output.flatten(0, 1), result.flatten(0, 1), reference.flatten(0, 1)):
        (right_mean, right_var), (mine_mean, mine_var) = _moments(right, buffer), _moments(mine, buffer)
        # 1e-5 is about one grey level squared (1/255 = 3.9e-3): it keeps a flat result from becoming amplified noise.
        gain = ((right_var + 1e-5) / (mine_var + 1e-5)) ** 0.5
        for first, last in _stripes(height, STRIPE_ROWS):
            own = buffer[: last - first].copy_(mine[first:last])
            target[first:last].copy_(own.sub_(mine_mean).mul_(gain).add_(right_mean))
    return output


def apply_color_fix(mode: str, result: Tensor, reference: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`result` corrected against `reference` by `mode`: wavelet, adain, or none (returns `result`, ignores `out`).

    Shapes, ranges and `out` are those of `wavelet_color_fix`. Raises IcmsrError for another mode or unequal shapes.
    """
    if mode == "wavelet":
        return wavelet_color_fix(result, reference, out=out)
    if mode == "adain":
        return adain_color_fix(result, reference, out=out)
    if mode == "none":
        return result
    raise IcmsrError(f"unknown colour correction {mode!r}: choose from {', '.join(COLOR_FIXES)}")


def _check(result: Tensor, reference: Tensor, out: Tensor | None) -> Tensor:
    """The tensor to write into. Raises IcmsrError for tensors that cannot be corrected."""
    if result.ndim != 4 or result.shape != reference.shape or not result.is_floating_point() or result.numel() == 0:
        raise IcmsrError(
            "colour correction takes two float pictures [N, C, H, W] of one shape, got "
            f"{result.dtype} {list(result.shape)} and {list(reference.shape)}: resize the reference first"
        )
    if out is not None and (out.shape != result.shape or out.dtype != result.dtype):
        raise IcmsrError(
            f"out must be {result.dtype} {list(result.shape)} like the result, got {out.dtype} {list(out.shape)}"
        )
    return torch.empty_like(result, memory_format=torch.contiguous_format) if out is None else out


def _work_dtype(result: Tensor) -> torch.dtype:
    return torch.promote_types(result.dtype, torch.float32)  # sums over a picture do not fit into half precision


def _stripes(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, height, rows):
        yield first, min(height, first + rows)


def _moments(plane: Tensor, buffer: Tensor) -> tuple[float, float]:
    """Mean and variance of `plane` [H, W], computed in `buffer`, which holds a stripe of it in the type of the work."""
    stripes = list(_stripes(plane.shape[0], STRIPE_ROWS))
    found = buffer.new_empty(len(stripes), 2)
    for index, (first, last) in enumerate(stripes):
        part = buffer[: last - first].copy_(plane[first:last])
        found[index] = torch.stack(torch.var_mean(part, correction=0))
    count, mean, squares = 0, 0.0, 0.0
    for (first, last), (variance, middle) in zip(stripes, found.tolist()):  # one copy from the device
        size, shift, before = (last - first) * plane.shape[1], middle - mean, count
        count += size
        squares += size * (variance + shift * shift * before / count)
        mean += shift * size / count
    return mean, squares / count


def _smooth_rows(plane: Tensor, step: int, out: Tensor) -> None:
    """Blurs `plane` [H, W] along its first axis into `out`: [1 2 1] / 4, taps `step` rows apart, edges replicated."""
    inside = max(0, plane.shape[0] - step)  # rows that have a neighbour `step` rows away on a given side
    edge = plane.shape[0] - inside
    torch.mul(plane, 0.5, out=out)
    out[:inside].add_(plane[edge:], alpha=0.25)
    out[inside:].add_(plane[-1:], alpha=0.25)
    out[edge:].add_(plane[:inside], alpha=0.25)
    out[:edge].add_(plane[:1], alpha=0.25)
