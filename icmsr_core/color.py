"""Colour correction of a result against its input, which has the same size by then.

The decoder shifts colours; the input's own low frequencies are right. `wavelet` takes them from the input and the
detail from the result, `adain` moves only each channel's mean and spread. Pictures are [N, C, H, W], float, RGB in
[0, 1]. Everything runs on one channel of one picture at a time: beyond the output, memory is two H x W buffers.
"""

import torch
from torch import Tensor

from .errors import IcmsrError

COLOR_FIXES = ("wavelet", "adain", "none")


def wavelet_color_fix(result: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """The high frequencies of `result` on the low frequencies of `reference`: [N, C, H, W], type of `result`.

    The low frequencies are what `levels` a-trous blurs leave: 3x3 kernels [1 2 1] x [1 2 1] / 16 with taps 1, 2, 4,
    ... pixels apart and replicated edges. Not clamped: detail may overshoot [0, 1].
    `result` and `reference` are [N, C, H, W], float, in [0, 1], of one shape.
    Raises IcmsrError for other shapes and for levels outside 1..16. Source: StableSR (arXiv 2305.07015), as in OSEDiff.
    """
    _check(result, reference)
    if not 1 <= levels <= 16:
        raise IcmsrError(f"levels must be a whole number from 1 to 16, got {levels}: try 5")
    output = torch.empty_like(result, memory_format=torch.contiguous_format)
    plane = torch.empty(result.shape[2:], dtype=_work_dtype(result), device=result.device)
    spare = torch.empty_like(plane)
    for target, mine, right in zip(output.flatten(0, 1), result.flatten(0, 1), reference.flatten(0, 1)):
        # The blur is linear: result - low(result) + low(reference) = result + low(reference - result), one blur for two
        # and nothing at all where the pictures agree.
        plane.copy_(right).sub_(mine)
        for level in range(levels):
            _smooth_rows(plane, 2**level, spare)
            _smooth_rows(spare.T, 2**level, plane.T)
        target.copy_(plane.add_(mine))
    return output


def adain_color_fix(result: Tensor, reference: Tensor) -> Tensor:
    """`result` with the mean and the standard deviation of `reference`, per picture and channel: [N, C, H, W].

    `result` and `reference` are [N, C, H, W], float, in [0, 1], of one shape; the type is that of `result`, and the
    values are not clamped. Raises IcmsrError for other shapes.
    Source: adaptive instance normalisation (arXiv 1703.06868), as in StableSR and OSEDiff.
    """
    _check(result, reference)
    output = torch.empty_like(result, memory_format=torch.contiguous_format)
    plane = torch.empty(result.shape[2:], dtype=_work_dtype(result), device=result.device)
    for target, mine, right in zip(output.flatten(0, 1), result.flatten(0, 1), reference.flatten(0, 1)):
        right_var, right_mean = torch.var_mean(plane.copy_(right), correction=0)
        mine_var, mine_mean = torch.var_mean(plane.copy_(mine), correction=0)
        # About one grey level squared (1/255 = 3.9e-3) keeps a flat result from being amplified into noise.
        gain = ((right_var + 1e-5) / (mine_var + 1e-5)).sqrt()
        target.copy_(plane.sub_(mine_mean).mul_(gain).add_(right_mean))
    return output


def apply_color_fix(mode: str, result: Tensor, reference: Tensor) -> Tensor:
    """`result` corrected against `reference` by `mode`: wavelet, adain, or none (which returns `result` itself).

    Shapes and ranges are those of `wavelet_color_fix`. Raises IcmsrError for another mode and for unequal shapes.
    """
    if mode == "wavelet":
        return wavelet_color_fix(result, reference)
    if mode == "adain":
        return adain_color_fix(result, reference)
    if mode == "none":
        return result
    raise IcmsrError(f"unknown colour correction {mode!r}: choose from {', '.join(COLOR_FIXES)}")


def _check(result: Tensor, reference: Tensor) -> None:
    if result.ndim != 4 or result.shape != reference.shape or not result.is_floating_point() or result.numel() == 0:
        raise IcmsrError(
            "colour correction takes two float pictures [N, C, H, W] of one shape, got "
            f"{result.dtype} {list(result.shape)} and {list(reference.shape)}: resize the reference first"
        )


def _work_dtype(result: Tensor) -> torch.dtype:
    return torch.promote_types(result.dtype, torch.float32)  # sums over a picture do not fit half precision


def _smooth_rows(plane: Tensor, step: int, out: Tensor) -> None:
    """[1 2 1] / 4 along the first axis with taps `step` rows apart, edges replicated: plane [H, W] into out [H, W]."""
    inside = max(0, plane.shape[0] - step)  # how many rows have a neighbour that far inside the picture
    edge = plane.shape[0] - inside
    torch.mul(plane, 0.5, out=out)
    out[:inside].add_(plane[edge:], alpha=0.25)
    out[inside:].add_(plane[-1:], alpha=0.25)
    out[edge:].add_(plane[:inside], alpha=0.25)
    out[:edge].add_(plane[:1], alpha=0.25)
