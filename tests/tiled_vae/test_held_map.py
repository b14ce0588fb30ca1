"""A whole map held as stripes: given back once, in blocks, and freed piece by piece."""

import weakref

import pytest
import torch

from icmsr_core.tiled_vae import held_map as tiled_vae_held
from icmsr_core.tiled_vae.held_map import HeldMap


def test_a_held_map_gives_what_it_was_given_once() -> None:
    whole = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    for axis in (2, 3):
        held = HeldMap(axis)
        size = whole.shape[axis]
        for piece in whole.split((3, size - 3), axis):
            held.append(piece)
        torch.testing.assert_close(torch.cat(list(held.read()), axis), whole, rtol=0, atol=0)
        torch.testing.assert_close(held.joined(slice(1, None)), whole[1:], rtol=0, atol=0)
        parts = [part for count in (2, 2) for part in held.take(count)]
        assert [part.shape[axis] for part in parts] == [2, 1, 1]
        parts += held.take_all()
        torch.testing.assert_close(torch.cat(parts, axis), whole, rtol=0, atol=0)
        assert not list(held.read())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_map_is_held_in_blocks(
    layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_vae_held, "BLOCK_BYTES", 250 * dtype.itemsize)
    whole = torch.randn(1, 3, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    held = HeldMap(2)
    for piece in whole.split((3, 5, 1, 11), 2):
        held.keep(piece.contiguous(memory_format=layout), 20)
    torch.testing.assert_close(held.joined(), whole, rtol=0, atol=0)
    stripes = list(held.take_all())
    assert all(stripe.is_contiguous(memory_format=layout) for stripe in stripes)
    places = [stripe.untyped_storage().data_ptr() for stripe in stripes]
    assert places[0] == places[1]
    small = HeldMap(2)
    small.keep(whole[:, :, :2], 2)
    assert next(small.read()).data_ptr() == whole.data_ptr(), "not copied"


def test_a_held_map_frees_what_was_taken() -> None:
    held = HeldMap(2)
    stripes = [torch.zeros(1, 1, 2, 2) for _ in range(3)]
    alive = [weakref.ref(stripe) for stripe in stripes]
    while stripes:
        held.append(stripes.pop(0))
    for left in (2, 1, 0):
        for part in held.take(2):
            del part
        assert sum(one() is not None for one in alive) == left
