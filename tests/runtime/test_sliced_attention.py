"""Self-attention of diffusers' networks where torch has no fused kernel."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from icmsr_core.backbone import attention as slices
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from icmsr_core.runtime.sliced_attention import SlicedProcessor
from tests.support.vaes import backbone_of, random_vae, uneven_picture

SIDE = 160
"""Of the picture in pixels: 20 x 20 latent cells."""


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        self.found |= {tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        return output


def processors(backbone: DiffusersBackbone) -> dict[bool, set[str]]:
    """The names of the attention processors, by whether they attend to the context."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for network in (backbone.unet, backbone.vae):
        for module in network.modules():
            if isinstance(module, Attention):
                found[module.is_cross_attention].add(type(module.processor).__name__)
    return found


def no_choice(*_: object) -> int:
    raise NotImplementedError("aten::_fused_sdp_choice is not implemented for the MPS device")


@torch.inference_mode()
@pytest.mark.parametrize("choice", [no_choice, lambda *_: 0])
def test_without_fused_kernels_results_are_the_same_and_no_scores_are_held(
    choice: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = 2 * uneven_picture(SIDE, SIDE) - 1
    plain = backbone_of(random_vae(4, True, True))
    latent = plain.encode(picture)
    expected = latent, plain.decode(latent), plain.predict_noise(latent, 200)
    assert processors(plain) == {True: {"AttnProcessor2_0"}, False: {"AttnProcessor2_0"}}

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    monkeypatch.setattr(slices, "SCORE_BYTES", 4 * 400 * 30)
    backbone = backbone_of(random_vae(4, True, True))
    backbone.unet.load_state_dict(plain.unet.state_dict())
    assert processors(backbone) == {True: {"AttnProcessor2_0"}, False: {SlicedProcessor.__name__}}
    with Shapes() as shapes:
        found = backbone.encode(picture), backbone.decode(latent), backbone.predict_noise(latent, 200)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))
    assert (400, 400) not in {shape[-2:] for shape in shapes.found}
    assert (1, 1, 30, 400) in shapes.found  # the VAE's one head
