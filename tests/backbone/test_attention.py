"""Attention: what torch's kernels are given, slices of queries, and the memory that the VAE's attention takes."""

import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Conv2d, Linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from icmsr_core.backbone import attention as module
from icmsr_core.backbone.attention import attend, attend_in_slices, has_fused_kernel
from icmsr_core.backbone.vae_steps import Attention, Sample
from icmsr_core.runtime.diffusers_vae_steps import _on_channels
from tests.support.apart import apart
from tests.support.process_memory import memory

LAYOUTS = ["core's, NCHW", "core's, channels_last", "diffusers'"]
MATH = 0
"""What torch._fused_sdp_choice answers where the scores would be held whole."""


def step(layout: str, channels: int, **options) -> Attention:
    """Attention as the two backbones make it: of 1 x 1 convolutions in ComfyUI, of linear layers in diffusers."""
    torch.manual_seed(0)
    if layout == "diffusers'":
        parts = [_on_channels(Linear(channels, channels).requires_grad_(False)) for _ in range(4)]
    else:
        parts = [Conv2d(channels, channels, 1).requires_grad_(False) for _ in range(4)]
    return Attention(*parts, **options)


def picture(layout: str, *shape: int) -> torch.Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return found.contiguous(memory_format=torch.channels_last) if "channels_last" in layout else found


def some_sample(channels: int) -> Sample:
    shares = torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.1
    places = torch.randn(1, channels, 9, generator=torch.Generator().manual_seed(3))
    return Sample(places, shares / shares.sum(), 500)


def plainly(attention: Attention, asking: torch.Tensor, asked: torch.Tensor | None, sample: Sample | None):
    """Attention by its definition, in float64."""
    maps, extra = [] if asked is None else [asked.flatten(2)], torch.zeros(0)
    near = 0 if asked is None else maps[0].shape[2]
    if sample is not None:
        maps.append(sample.places)
        extra = torch.cat([torch.zeros(near), (sample.shares * (sample.total - near)).log()])
    every = torch.cat(maps, 2)[..., None]
    query, key, value = (
        projected.flatten(2).double().unflatten(1, (attention.heads, -1))
        for projected in (attention.query(asking), attention.key(every), attention.value(every))
    )
    scores = torch.einsum("nhdq,nhdk->nhqk", query, key) / query.shape[2] ** 0.5
    weights = (scores + (extra.double() if len(extra) else 0)).softmax(-1)
    found = torch.einsum("nhqk,nhdk->nhdq", weights, value).flatten(1, 2)
    return attention.output(found.float().unflatten(2, asking.shape[2:]))


@torch.inference_mode()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_what_its_definition_says(layout: str, heads: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCORE_BYTES", 4 * 2 * 50 * 7)  # several slices, and one that is not full
    attention = step(layout, 8, heads=heads, fused=fused)
    asked = picture(layout, 1, 8, 12, 15)
    for asking, near, sample in (
        (asked, asked, None),
        (asked[:, :, 2:8, 3:9], asked[:, :, 1:10], some_sample(8)),
        (asked, None, some_sample(8)),
    ):
        expected = plainly(attention, asking, near, sample)
        torch.testing.assert_close(attention.run(asking, near, sample), expected, rtol=0, atol=2e-6)


@torch.inference_mode()
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_has_a_fused_kernel_for_what_it_gets(layout: str, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout that the two backbones give rise to on this device."""
    choices, real = [], F.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None):
        choices.append(torch._fused_sdp_choice(query, key, value, attn_mask))
        return real(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    asked = picture(layout, 1, 64, 20, 24)
    step(layout, 64).run(asked[:, :, :16], asked, some_sample(64) if sampled else None)
    assert len(choices) == 1
    assert choices[0] != MATH


def test_a_last_stride_above_1_has_no_fused_kernel() -> None:
    """Why rows are made contiguous: torch says nothing and holds the scores."""
    upright = torch.randn(1, 1, 8, 100).transpose(2, 3)
    assert not has_fused_kernel(upright, upright, upright, None)
    rows = upright.contiguous()
    assert has_fused_kernel(rows, rows, rows, None)


class LargestTensor(TorchDispatchMode):
    """The most bytes of a tensor that any function returned."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return output


@torch.inference_mode()
@pytest.mark.parametrize("error", [NotImplementedError("no such operator for the MPS device"), None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_fused_kernel_scores_are_held_for_a_slice(
    layout: str, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choice(*_: object) -> int:
        if error is not None:
            raise error
        return MATH

    asked = picture(layout, 1, 16, 40, 50)
    attention = step(layout, 16)
    expected = attention.run(asked, asked)
    limit = 100 * 2000 * 4
    monkeypatch.setattr(module, "SCORE_BYTES", limit)
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    with LargestTensor() as largest:
        found = attention.run(asked, asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert largest.size == limit < 2000 * 2000 * 4


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_slices_in_half_precision_round_only_their_ends(dtype: torch.dtype, bound: float) -> None:
    """Scores of 16 bits would not do: here they reach 150."""
    query, key, value = torch.randn(3, 1, 1, 300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = attend(5 * query.double(), key.double(), value.double())
    found = attend_in_slices(5 * query, key, value)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * bound)


@torch.inference_mode()
def test_another_attention_is_used_where_all_places_ask_for_all() -> None:
    calls = []

    def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append((query.shape, key.shape, value.shape))
        return value

    attention = step("core's, NCHW", 8, own=own)
    asked = picture("", 1, 8, 6, 5)
    assert torch.equal(attention.run(asked, asked), attention.output(attention.value(asked)))
    assert calls == [(asked.shape,) * 3]
    for asking, sample in ((asked[:, :, :3], None), (asked, some_sample(8))):
        attention.run(asking, asked, sample)
    assert len(calls) == 1


def peak_of(layout: str, channels: int, compute: bool) -> int:
    """Bytes that the attention of 256 x 256 cells takes at most above what there is before it.

    Without `compute`, the kernel only makes its result: for widths that would take minutes on a CPU.
    """
    torch.set_num_threads(1)
    if not compute:
        F.scaled_dot_product_attention = lambda query, key, value, attn_mask=None: torch.ones_like(query)
    attention, asked = step(layout, channels), picture(layout, 1, channels, 256, 256)
    with torch.inference_mode():
        attention.run(asked[:, :, :8, :8], asked[:, :, :8, :8])
        start = memory("VmRSS")
        # What holds the scores (17 GB) must fail, and not bring the machine to its knees.
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 3 * 2**30,) * 2)
        attention.run(asked, asked)
    return memory("VmHWM") - start


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "channels", "compute"),
    [
        *((layout, 512, False) for layout in LAYOUTS),
        *(
            pytest.param(layout, 16, True, marks=[pytest.mark.slow] if number else [])
            for number, layout in enumerate(LAYOUTS)
        ),
    ],
)
def test_the_attention_of_2048_pixels_takes_less_than_1_gb(layout: str, channels: int, compute: bool) -> None:
    """256 x 256 cells of Stable Diffusion's VAE. Held whole, the scores alone are 17 GB."""
    peak = apart(peak_of, layout, channels, compute)
    print(f"{layout}, {channels} channels: {peak / 1e6:.0f} MB")
    assert peak < 1e9
