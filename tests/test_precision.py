"""Which precision is chosen where, and what a NaN leads to."""

import logging

import pytest
import torch
from torch import nn

from icmsr_core import precision
from icmsr_core.errors import IcmsrError
from icmsr_core.precision import PrecisionGuard, fastest_dtype, measured_gain, weights_in

CPU = torch.device("cpu")
ALL = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("width", "allowed", "chosen"),
    [
        (128, ALL, torch.bfloat16), (96, ALL, torch.bfloat16), (64, ALL, torch.float32), (32, ALL, torch.float32),
        (128, (torch.float32, torch.float16), torch.float32),
    ],
)
def test_cpu(monkeypatch: pytest.MonkeyPatch, width: int, allowed: tuple, chosen: torch.dtype) -> None:
    monkeypatch.setattr(precision, "measured_gain", {128: 2.5, 96: 1.25, 64: 1.24, 32: 0.5}.__getitem__)
    assert fastest_dtype(CPU, width, allowed) == chosen


def test_gain_is_measured() -> None:
    assert 0.6 < measured_gain(32, torch.float32) < 1.7  # against itself
    gain = measured_gain(32)
    assert 0.01 < gain < 100
    assert measured_gain(32) == gain  # once, so that a process does not change its mind


@pytest.mark.parametrize(
    ("capability", "allowed", "chosen"),
    [
        ((9, 0), ALL, torch.bfloat16), ((8, 0), ALL, torch.bfloat16), ((7, 5), ALL, torch.float16),
        ((8, 6), (torch.float32, torch.float16), torch.float16), ((9, 0), (torch.float32,), torch.float32),
    ],
)
def test_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], allowed: tuple, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_dtype(torch.device("cuda"), 32, allowed) == chosen


def test_a_device_that_cannot_compute_stays_in_float32() -> None:
    """meta has no values to compare, as a device without bfloat16 has no product."""
    assert fastest_dtype(torch.device("meta"), 320) == torch.float32


def test_finite_results_pass(caplog: pytest.LogCaptureFixture) -> None:
    asked = []
    result = PrecisionGuard(torch.bfloat16).run("the UNet", lambda dtype: asked.append(dtype) or torch.ones(3))
    assert torch.equal(result, torch.ones(3))
    assert asked == [torch.bfloat16]
    assert not caplog.records


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_computed_again(caplog: pytest.LogCaptureFixture, bad: float) -> None:
    guard, asked = PrecisionGuard(torch.float16), []

    def compute(dtype: torch.dtype) -> torch.Tensor:
        asked.append(dtype)
        return torch.tensor([1.0, 2.0 if dtype == torch.float32 else bad])

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert guard.run("the VAE's decoder", compute).tolist() == [1.0, 2.0]
        guard.run("the UNet", compute)
    assert asked == [torch.float16, torch.float32] * 3
    assert [record.getMessage().split(" gave")[0] for record in caplog.records] == ["the VAE's decoder", "the UNet"]
    assert "float16" in caplog.text


@pytest.mark.parametrize("dtype", ALL)
def test_damaged_weights_are_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(IcmsrError, match="the UNet gave NaN or infinite values in float32: its weights are damaged"):
        PrecisionGuard(dtype).run("the UNet", lambda _: torch.tensor([float("nan")]))


class Overflowing(nn.Module):
    """A layer whose product leaves float16's range, with a buffer and an integer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.layer.weight.fill_(300.0)
        self.register_buffer("offset", torch.tensor(0.1))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.layer.weight.dtype)) + self.offset


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_real_overflow(context: type) -> None:
    module = Overflowing().half()
    before = {key: (value.data_ptr(), value.dtype) for key, value in module.state_dict().items()}
    x = torch.full((2, 4), 1000.0)

    def compute(dtype: torch.dtype) -> torch.Tensor:
        with weights_in(module, dtype):
            return module(x)

    with context():
        assert not bool(module(x).isfinite().any())
        result = PrecisionGuard(torch.float16).run("the layer", compute)
    assert result.dtype == torch.float32
    assert torch.allclose(result, torch.tensor(1_200_000.0))
    assert {key: (value.data_ptr(), value.dtype) for key, value in module.state_dict().items()} == before


def test_weights_come_back_after_an_error() -> None:
    module, seen = Overflowing().half(), []

    def fail() -> None:
        with weights_in(module, torch.float32):
            seen.extend([module.layer.weight.dtype, module.count.dtype])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [torch.float32, torch.int64]
    assert module.layer.weight.dtype == module.offset.dtype == torch.float16
