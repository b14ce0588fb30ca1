"""How high stripes are on a device that `STRIPE_BYTES` does not list, shown on tensors with a device and no data."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from icmsr_core import transfer
from icmsr_core.backbone.vae_steps import VaeHalf
from icmsr_core.runtime.diffusers_vae_steps import decoder_steps, encoder_steps
from icmsr_core.tiled_vae.modes import ExactStream
from icmsr_core.tiled_vae.stream import STRIPE_BYTES
from icmsr_core.tiled_vae.tiled import plan_stripes
from icmsr_core.weights.base import open_base
from icmsr_core.weights.embedded import embedded_base

FACTOR, SIDE, TILE = 4, 1024, 512
"""Nano's pixels per latent cell; the picture and the tile in pixels."""


class ConvolvedRows(TorchDispatchMode):
    """Notes the height of what every convolution is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heights: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.convolution.default:
            self.heights.append(arguments[0].shape[2])
        return function(*arguments, **(options or {}))


def nano_vae(mode: FakeTensorMode, device: torch.device) -> AutoencoderKL:
    """The embedded model's VAE with parameters of its shapes on `device`."""
    with init_empty_weights():
        vae = AutoencoderKL.from_config(dict(open_base(embedded_base()).vae_config))
    shapes = {name: value.shape for name, value in vae.state_dict().items()}
    with mode:
        state = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    vae.load_state_dict(state, assign=True)
    return vae.eval()


@pytest.mark.parametrize(("part", "convolutions"), [("decoder", 88), ("encoder", 64)])
def test_stripes_on_an_accelerator_are_as_high_as_the_tiles_area_allows(
    part: str, convolutions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1024 px in tiles of 512. In stripes of four rows nano's decoder would run 2,934 convolutions."""
    mode, device = FakeTensorMode(), torch.device("cuda")
    monkeypatch.setattr(transfer, "pins_memory", lambda device: False)  # there is no data to be pinned
    assert device.type not in STRIPE_BYTES
    vae = nano_vae(mode, device)
    cells = SIDE // FACTOR
    stripes = plan_stripes(cells, cells, TILE // FACTOR)
    steps, unit, channels = {
        "decoder": (decoder_steps(vae), 1, vae.config.latent_channels),
        "encoder": (encoder_steps(vae), FACTOR, 3),
    }[part]
    with mode, torch.no_grad():
        stream = ExactStream(VaeHalf(steps, device), stripes.axis)
        source = torch.empty(1, channels, cells * unit, cells * unit, device=device)
        with ConvolvedRows() as seen:
            chunks = list(stream.through(steps, stream.source(source, stripes.cells * unit)).chunks)
    assert sum(chunk.shape[2] for chunk in chunks) == (SIDE if part == "decoder" else cells)
    assert chunks[0].device.type == device.type
    assert len(seen.heights) == convolutions
    # Up to two rows are held back from the stripe before; one is padding at the picture's edge; the last stripe has
    # what all layers held back, up to a quarter of a stripe.
    assert max(seen.heights) <= 1.25 * stripes.cells * FACTOR + 3
    layers = [module for module in getattr(vae, part).modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions < 1.5 * stripes.number * len(layers)
