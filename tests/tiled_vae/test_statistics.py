"""Mean and variance of a map from those of its stripes, where it is kept, and what measuring it costs."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from icmsr_core.backbone.vae_steps import VaeHalf
from icmsr_core.tiled_vae.modes import ExactStream, combine, moments
from icmsr_core.tiled_vae.stream import Flow
from tests.support.script_process import ROOT


def test_whole_maps_go_where_there_is_room() -> None:
    for room, place in ((1e9, "meta"), (2 * 4 * 60 * 4.0, "meta"), (2 * 4 * 60 * 4 - 1.0, "cpu")):
        stream = ExactStream(VaeHalf((), torch.device("meta"), partial(float, room)), 2)
        chunk = torch.empty(1, 4, 3, 6, device="meta")
        assert stream._place(Flow(iter(()), 10, 3), chunk).type == place


@torch.inference_mode()
def test_parts_combine_to_the_variance_of_the_whole() -> None:
    whole = 5 + torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 50)
    parts = whole.double().split((11, 30, 9), 1)
    mean, variance = combine(
        torch.tensor([11, 30, 9]).double() / 50,
        torch.stack([part.mean(1) for part in parts]),
        torch.stack([part.var(1, correction=0) for part in parts]),
    )
    torch.testing.assert_close(mean, whole.double().mean(1))
    torch.testing.assert_close(variance, whole.double().var(1, correction=0))


def test_moments_are_group_norms_mean_and_variance() -> None:
    maps = 20 + 3 * torch.randn(2, 6, 40, 30, generator=torch.Generator().manual_seed(0))
    maps[1, :2] = 7.0
    grouped = maps.double().reshape(2, 3, -1)
    for given in (maps, torch.cat([maps, maps], 2)[:, :, 20:60].roll(20, 2), maps.transpose(2, 3)):
        mean, variance = moments(3, given)
        torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-6, atol=0)
        torch.testing.assert_close(variance.double(), grouped.var(2, correction=0), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_of_a_flat_picture_are_not_a_difference_of_squares(layout: torch.memory_format) -> None:
    """torch's GroupNorm is 7% off here in channels_last, on a CPU: its variance is E[x^2] - E[x]^2."""
    maps = (100 + torch.randn(1, 8, 64, 256, generator=torch.Generator().manual_seed(0))).contiguous(
        memory_format=layout
    )
    grouped = maps.double().reshape(1, 4, -1)
    mean, variance = moments(4, maps)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), grouped.var(2, correction=0), rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
def test_measuring_a_map_takes_memory_for_a_stripe() -> None:
    """The map is 256 MiB, a stripe 1 MiB. Small tensors kept from every stripe cost 130 MB, in glibc's heap."""
    program = """
import torch
from icmsr_core.tiled_vae.held_map import HeldMap
from icmsr_core.tiled_vae.modes import ExactStream
from icmsr_core.backbone.vae_steps import VaeHalf
from tests.support.process_memory import memory
torch.set_num_threads(1)
held = HeldMap(axis=2)
stripe = torch.ones(1, 64, 8, 1024, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
for _ in range(256): held.keep(stripe, 2048)
before = memory("VmHWM")
ExactStream(VaeHalf((), torch.device("cpu")), 2).measure(32, held)
print((memory("VmHWM") - before) / stripe.nbytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert float(done.stdout) < 32
