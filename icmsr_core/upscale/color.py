"""Colour correction of a result against its input, which has the same size by then.

The decoder shifts colours; the input's own low frequencies are right. `wavelet` takes them from the input and the
detail from the result, `adain` moves only each channel's mean and spread. Pictures are [N, C, H, W], float, RGB in
[0, 1]. Everything runs over stripes of rows of one channel: beyond the output, which may be the result itself, memory
is two buffers of some hundred rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import IcmsrError
from .settings import COLOR_FIXES

STRIPE_ROWS = 512
"""Rows at a time: the blur's 31 rows above and below them then cost an eighth more."""


def wavelet_color_fix(result: Tensor, reference: Tensor, levels: int = 5, *, out: Tensor | None = None) -> Tensor:
    """The high frequencies of `result` on the low frequencies of `reference`: [N, C, H, W], type of `result`.

    The low frequencies are what `levels` a-trous blurs leave: 3x3 kernels [1 2 1] x [1 2 1] / 16 with taps 1, 2, 4,
    ... pixels apart and replicated edges. Not clamped: detail may overshoot [0, 1].
    `result` and `reference` are [N, C, H, W], float, in [0, 1], of one shape; `out`, to write into, may be `result`.
    Raises IcmsrError for other shapes and for levels outside 1..16. Source: StableSR (arXiv 2305.07015), as in OSEDiff.
    """
    output = _check(result, reference, out)
    if not 1 <= levels <= 16:
        raise IcmsrError(f"levels must be a whole number from 1 to 16, got {levels}: try 5")
    reach = 2**levels - 1
    height, width = result.shape[2:]
    size = min(height, max(STRIPE_ROWS, reach) + 2 * reach) * width
    buffers = torch.empty((2, size), dtype=_work_dtype(result), device=result.device)
    for target, mine, right in zip(output.flatten(0, 1), result.flatten(0, 1), reference.flatten(0, 1)):
        above = buffers.new_empty((0, width))
        for first, last in _stripes(height, max(STRIPE_ROWS, reach)):
            low, high = first - above.shape[0], min(height, last + reach)
            plane, spare = (buffer[: (high - low) * width].view(high - low, width) for buffer in buffers)
            # The blur is linear: result - low(result) + low(reference) = result + low(reference - result), one blur for
            # two and nothing at all where the pictures agree.
            plane[: first - low].copy_(above)
            plane[first - low :].copy_(right[first:high]).sub_(mine[first:high])
            # The rows that the next stripe needs and that are about to be written over, if `out` is `result`.
            above = plane[max(0, last - reach - low) : last - low].clone()
            for level in range(levels):
                _smooth_rows(plane, 2**level, spare)
                _smooth_rows(spare.T, 2**level, plane.T)
            own = plane[first - low : last - low]
            target[first:last].copy_(own.add_(mine[first:last]))
    return output


def adain_color_fix(result: Tensor, reference: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`result` with the mean and the standard deviation of `reference`, per picture and channel: [N, C, H, W].

    `result` and `reference` are [N, C, H, W], float, in [0, 1], of one shape; the type is that of `result`, and the
    values are not clamped; `out`, to write into, may be `result`. Raises IcmsrError for other shapes.
    Source: adaptive instance normalisation (arXiv 1703.06868), as in StableSR and OSEDiff.
    """
    output = _check(result, reference, out)
    dtype = _work_dtype(result)
    for target, mine, right in zip(output.flatten(0, 1), result.flatten(0, 1), reference.flatten(0, 1)):
        (right_mean, right_var), (mine_mean, mine_var) = _moments(right), _moments(mine)
        # About one grey level squared (1/255 = 3.9e-3) keeps a flat result from being amplified into noise.
        gain = ((right_var + 1e-5) / (mine_var + 1e-5)) ** 0.5
        for first, last in _stripes(mine.shape[0], STRIPE_ROWS):
            target[first:last].copy_(mine[first:last].to(dtype).sub(mine_mean).mul_(gain).add_(right_mean))
    return output


def apply_color_fix(mode: str, result: Tensor, reference: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`result` corrected against `reference` by `mode`: wavelet, adain, or none (which returns `result` itself).

    Shapes, ranges and `out` are those of `wavelet_color_fix`; none leaves `out` alone. Raises IcmsrError for another
    mode and for unequal shapes.
    """
    if mode == "wavelet":
        return wavelet_color_fix(result, reference, out=out)
    if mode == "adain":
        return adain_color_fix(result, reference, out=out)
    if mode == "none":
        return result
    raise IcmsrError(f"unknown colour correction {mode!r}: choose from {', '.join(COLOR_FIXES)}")


def _check(result: Tensor, reference: Tensor, out: Tensor | None) -> Tensor:
    """Where to write. Raises IcmsrError for tensors that cannot be corrected."""
    if result.ndim != 4 or result.shape != reference.shape or not result.is_floating_point() or result.numel() == 0:
        raise IcmsrError(
            "colour correction takes two float pictures [N, C, H, W] of one shape, got "
            f"{result.dtype} {list(result.shape)} and {list(reference.shape)}: resize the reference first"
        )
    if out is not None and (out.shape != result.shape or out.dtype != result.dtype):
        raise IcmsrError(
            f"out must be {result.dtype} {list(result.shape)} as the result, got {out.dtype} {list(out.shape)}"
        )
    return torch.empty_like(result, memory_format=torch.contiguous_format) if out is None else out


def _work_dtype(result: Tensor) -> torch.dtype:
    return torch.promote_types(result.dtype, torch.float32)  # sums over a picture do not fit half precision


def _stripes(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, height, rows):
        yield first, min(height, first + rows)


def _moments(plane: Tensor) -> tuple[float, float]:
    """Mean and variance of `plane` [H, W]."""
    count, mean, squares = 0, 0.0, 0.0
    for first, last in _stripes(plane.shape[0], STRIPE_ROWS):
        part = plane[first:last].to(_work_dtype(plane)).contiguous()
        variance, middle = (float(value) for value in torch.var_mean(part, correction=0))
        shift, before = middle - mean, count
        count += part.numel()
        squares += part.numel() * (variance + shift * shift * before / count)
        mean += shift * part.numel() / count
    return mean, squares / count


def _smooth_rows(plane: Tensor, step: int, out: Tensor) -> None:
    """[1 2 1] / 4 along the first axis with taps `step` rows apart, edges replicated: plane [H, W] into out [H, W]."""
    inside = max(0, plane.shape[0] - step)  # how many rows have a neighbour that far inside the picture
    edge = plane.shape[0] - inside
    torch.mul(plane, 0.5, out=out)
    out[:inside].add_(plane[edge:], alpha=0.25)
    out[inside:].add_(plane[-1:], alpha=0.25)
    out[edge:].add_(plane[:inside], alpha=0.25)
    out[:edge].add_(plane[:1], alpha=0.25)
