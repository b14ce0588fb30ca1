"""Colour correction against a dense float64 implementation, and what it does to tints, detail and memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from icmsr_core.errors import IcmsrError
from icmsr_core.upscale import color
from icmsr_core.upscale.color import adain_color_fix, apply_color_fix, wavelet_color_fix
from icmsr_core.upscale.settings import COLOR_FIXES
from tests.support.pictures import random_picture
from tests.support.places import ROOT


def dense_low_pass(plane: np.ndarray, levels: int = 5) -> np.ndarray:
    """The a-trous low-pass with whole 2-D kernels in float64; scipy's "nearest" replicates the edge."""
    small = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=np.float64) / 16
    plane = plane.astype(np.float64)
    for level in range(levels):
        step = 2**level
        kernel = np.zeros((2 * step + 1, 2 * step + 1))
        kernel[::step, ::step] = small
        plane = ndimage.correlate(plane, kernel, mode="nearest")
    return plane


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 57, 2), (1, 80, 1, 1), (70, 2)])
@pytest.mark.parametrize("levels", [1, 3, 5])
def test_wavelet_equals_the_dense_form(shape: tuple[int, ...], levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "LEVELS", levels)
    result, reference = random_picture(*shape, seed=1), random_picture(*shape, seed=2)
    fixed = wavelet_color_fix(result, reference)
    for n in range(result.shape[0]):
        for c in range(result.shape[1]):
            mine, right = result[n, c].double().numpy(), reference[n, c].double().numpy()
            expected = mine - dense_low_pass(mine, levels) + dense_low_pass(right, levels)
            assert np.abs(fixed[n, c].numpy() - expected).max() < 1e-6


def test_wavelet_in_float64_is_exact() -> None:
    result, reference = random_picture(48, 33, 1, 1, seed=1).double(), random_picture(48, 33, 1, 1, seed=2).double()
    mine, right = result[0, 0].numpy(), reference[0, 0].numpy()
    expected = mine - dense_low_pass(mine) + dense_low_pass(right)
    assert np.abs(wavelet_color_fix(result, reference)[0, 0].numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("mode", COLOR_FIXES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 2), (64, 48)])
def test_equal_pictures_stay_as_they_are(mode: str, shape: tuple[int, ...]) -> None:
    image = random_picture(*shape)
    assert torch.allclose(apply_color_fix(mode, image, image.clone()), image, atol=1e-6)


def test_wavelet_removes_a_tint_and_a_slow_gradient_of_tint() -> None:
    truth = random_picture(160, 200) * 0.5 + 0.25
    tint = torch.tensor([0.08, -0.05, 0.02]).view(1, 3, 1, 1)
    ramp = torch.linspace(-0.06, 0.06, 200).view(1, 1, 1, 200) * torch.linspace(0.5, 1, 160).view(1, 1, 160, 1)
    for error in (tint, ramp, tint + ramp):
        fixed = wavelet_color_fix(truth + error, truth)
        assert (fixed.mean((2, 3)) - truth.mean((2, 3))).abs().max() < 1 / 255
        inner = (fixed - truth)[..., 40:-40, 40:-40]
        assert inner.abs().max() < 1e-3
        assert (fixed - truth).abs().mean() < 0.1 * error.abs().mean()


def test_wavelet_keeps_the_detail_of_the_result() -> None:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    detail = (0.2 * torch.sin(2 * torch.pi * x / 4) * torch.sin(2 * torch.pi * y / 5)).expand(1, 3, 128, 128)
    fixed = wavelet_color_fix(0.7 + detail, torch.full((1, 3, 128, 128), 0.4))
    difference = fixed - (0.4 + detail)
    assert difference[..., 8:-8, 8:-8].abs().max() < 0.01
    # Detail of the reference does not come through.
    other = wavelet_color_fix(torch.full((1, 3, 128, 128), 0.4), 0.4 + detail)
    assert (other - 0.4)[..., 8:-8, 8:-8].abs().max() < 0.01


def test_adain_gives_the_reference_s_statistics() -> None:
    result = random_picture(50, 60, 2, seed=3) * 0.6 + 0.3
    reference = random_picture(50, 60, 2, seed=4) * torch.tensor([0.2, 0.9, 0.5]).view(1, 3, 1, 1) + 0.05
    fixed = adain_color_fix(result, reference)
    assert torch.allclose(fixed.mean((2, 3)), reference.mean((2, 3)), atol=1e-5)
    assert torch.allclose(fixed.std((2, 3)), reference.std((2, 3)), rtol=2e-3)
    centred = (result - result.mean((2, 3), keepdim=True)).double().flatten(2)
    shifted = (fixed - fixed.mean((2, 3), keepdim=True)).double().flatten(2)
    assert torch.allclose(torch.nn.functional.cosine_similarity(centred, shifted, dim=2), torch.ones(2, 3).double())


def test_adain_does_not_amplify_a_flat_result() -> None:
    flat = torch.full((1, 3, 32, 32), 0.5) + 1e-4 * random_picture(32, 32)
    fixed = adain_color_fix(flat, random_picture(32, 32, seed=1))
    assert fixed.std() < 0.05
    assert adain_color_fix(random_picture(1, 1), torch.full((1, 3, 1, 1), 0.25)).flatten().tolist() == [0.25] * 3


@pytest.mark.parametrize("function", [wavelet_color_fix, adain_color_fix])
def test_batch_equals_one_by_one_and_inputs_stay(function) -> None:  # type: ignore[no-untyped-def]
    result, reference = random_picture(33, 41, 3, seed=1), random_picture(33, 41, 3, seed=2)
    kept = result.clone(), reference.clone()
    whole = function(result, reference)
    assert torch.equal(whole, torch.cat([function(result[i : i + 1], reference[i : i + 1]) for i in range(3)]))
    assert torch.equal(result, kept[0])
    assert torch.equal(reference, kept[1])


@pytest.mark.parametrize("function", [wavelet_color_fix, adain_color_fix])
def test_channels_last_and_half_precision(function) -> None:  # type: ignore[no-untyped-def]
    result, reference = random_picture(33, 41, 2, seed=1), random_picture(33, 41, 2, seed=2)
    expected = function(result, reference)
    last = function(result.to(memory_format=torch.channels_last), reference.to(memory_format=torch.channels_last))
    assert torch.equal(last, expected)
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        half = function(result.to(dtype), reference.to(dtype))
        assert half.dtype == dtype
        assert (half.float() - expected).abs().max() < bound


@pytest.mark.parametrize("levels", [1, 5, 8, 10])
def test_stripes_leave_no_trace(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripes have 64 rows, or as many as the blurs reach; `test_wavelet_equals_the_dense_form` has one stripe."""
    monkeypatch.setattr(color, "LEVELS", levels)
    result, reference = random_picture(1300, 9, 1, 1, seed=1), random_picture(1300, 9, 1, 1, seed=2)
    monkeypatch.setattr(color, "STRIPE_ROWS", 2000)
    whole = wavelet_color_fix(result, reference)
    monkeypatch.setattr(color, "STRIPE_ROWS", 64)
    torch.testing.assert_close(wavelet_color_fix(result, reference), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["wavelet", "adain"])
@pytest.mark.parametrize("height", [30, 1300])
def test_result_may_be_written_over(mode: str, height: int) -> None:
    result, reference = random_picture(height, 17, 2, seed=1), random_picture(height, 17, 2, seed=2)
    expected, kept = apply_color_fix(mode, result, reference), reference.clone()
    assert apply_color_fix(mode, result, reference, out=result) is result
    assert torch.equal(result, expected)
    assert torch.equal(reference, kept)
    with pytest.raises(IcmsrError, match=r"out must be torch.float32 \[2, 3, .*got torch.float16"):
        apply_color_fix(mode, result, reference, out=result.half())


def test_the_name_chooses_the_correction() -> None:
    result, reference = random_picture(20, 20, seed=1), random_picture(20, 20, seed=2)
    assert torch.equal(apply_color_fix("wavelet", result, reference), wavelet_color_fix(result, reference))
    assert torch.equal(apply_color_fix("adain", result, reference), adain_color_fix(result, reference))
    assert apply_color_fix("none", result, reference) is result
    with pytest.raises(IcmsrError, match=r"'lab'.*wavelet, adain, none"):
        apply_color_fix("lab", result, reference)


@pytest.mark.parametrize(
    ("result", "reference"),
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8)),
    ],
)
@pytest.mark.parametrize("mode", ["wavelet", "adain"])
def test_wrong_pictures_are_named(mode: str, result: torch.Tensor, reference: torch.Tensor) -> None:
    with pytest.raises(IcmsrError, match="colour correction takes"):
        apply_color_fix(mode, result, reference)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("mode", ["wavelet", "adain"])
def test_memory_beyond_the_output_is_stripes(mode: str) -> None:
    """A process of its own, because its peak memory is what is measured."""
    program = f"""
import torch
from icmsr_core.upscale.color import apply_color_fix
from tests.support.process_memory import memory
apply_color_fix("{mode}", torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
result, reference = torch.rand(1, 3, 2000, 2000), torch.rand(1, 3, 2000, 2000)
before = memory("VmHWM")
apply_color_fix("{mode}", result, reference, out=result)
in_place = memory("VmHWM")
fixed = apply_color_fix("{mode}", result, reference)
print((in_place - before) / (4 * 2000 * 2000), (memory("VmHWM") - before) / (4 * 2000 * 2000))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    in_place, fresh = map(float, done.stdout.split())
    assert in_place < 0.9  # of one channel
    assert 2.5 < fresh < 3 + 0.9  # 3 are the output
