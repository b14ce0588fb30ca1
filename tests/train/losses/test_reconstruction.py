"""Losses and measures between a result and the truth."""

import pytest
import torch

from icmsr_core.train.losses.reconstruction import psnr


def test_psnr_takes_a_peak_of_two_and_clamps_the_result() -> None:
    truth = torch.ones(2, 3, 8, 8)
    assert psnr(truth - 0.2, truth).item() == pytest.approx(20, abs=1e-4)  # a tenth of the range
    assert psnr(truth + 5, truth).item() == torch.inf
    assert psnr(-truth - 5, truth).item() == pytest.approx(0, abs=1e-6)


def test_psnr_is_for_logs_and_has_no_gradient() -> None:
    result = torch.rand(1, 3, 8, 8, requires_grad=True)
    assert not psnr(result * 1, torch.rand(1, 3, 8, 8)).requires_grad
