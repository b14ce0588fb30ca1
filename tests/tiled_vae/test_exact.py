"""Exact mode against the untiled VAE: small random networks of diffusers' classes."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icmsr_core.backbone.vae_steps import Pointwise, UnknownLayer, VaeHalf
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from icmsr_core.tiled_vae import stream as tiled_vae_stream
from icmsr_core.tiled_vae.stream import FEWEST_ROWS, STRIPE_BYTES
from icmsr_core.tiled_vae.tiled import plan_stripes
from tests.support.stripes import decode_in_stripes, encode_in_stripes
from tests.support.vaes import TOLERANCE, backbone_of, decoded, own_statistics, random_vae, run_bounded, uneven_picture


@pytest.mark.parametrize(("cells", "tile"), [((13, 9), 4), ((7, 17), 5), ((6, 11), 1)])
@torch.inference_mode()
def test_exact_is_the_untiled_result(backbone, cells: tuple[int, int], tile: int) -> None:
    """Stripes along either axis, the last one narrower, one cell wide at the least."""
    factor = backbone.descriptor.latent_factor
    image = uneven_picture(cells[0] * factor, cells[1] * factor)
    assert plan_stripes(*cells, tile).number > 2
    latent = backbone.encode(2 * image - 1)
    assert latent.std() > 0.05
    got = encode_in_stripes(backbone, image, tile=tile)
    torch.testing.assert_close(got, latent, rtol=0, atol=TOLERANCE)
    assert got.dtype == torch.float32
    whole = backbone.decode(latent)
    assert whole.std() > 0.05
    torch.testing.assert_close(decoded(backbone, latent, tile=tile), whole, rtol=0, atol=TOLERANCE)


@pytest.fixture
def narrow_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts these small maps as those of large pictures are cut on a CPU."""
    monkeypatch.setitem(STRIPE_BYTES, "cpu", 5000)
    monkeypatch.setattr(tiled_vae_stream, "FEWEST_ROWS", 2)


@pytest.mark.usefixtures("narrow_stripes")
@pytest.mark.parametrize(("cells", "tile"), [((13, 9), 4), ((7, 17), 5), ((12, 10), 0)])
@torch.inference_mode()
def test_stripes_cut_for_the_cache_are_exact_too(backbone, cells: tuple[int, int], tile: int) -> None:
    factor = backbone.descriptor.latent_factor
    image = uneven_picture(cells[0] * factor, cells[1] * factor)
    latent = backbone.encode(2 * image - 1)
    torch.testing.assert_close(encode_in_stripes(backbone, image, tile=tile), latent, rtol=0, atol=TOLERANCE)
    whole = backbone.decode(latent)
    torch.testing.assert_close(decoded(backbone, latent, tile=tile), whole, rtol=0, atol=TOLERANCE)


class Inputs(TorchDispatchMode):
    """The sizes in bytes and the memory layouts of what convolutions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.last: list[bool] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.convolution.default:
            maps = arguments[0]
            self.bytes.append(maps.numel() * maps.element_size())
            if maps.shape[1] > 4:  # the picture and the latent come as they are
                self.last += [values.is_contiguous(memory_format=torch.channels_last) for values in arguments[:2]]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("shape", [(32, 12), (12, 32)])
@torch.no_grad()
def test_on_a_cpu_a_single_picture_runs_in_stripes_of_few_bytes_in_channels_last(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One map in the other layout and every map after it is copied for its convolution: slower, and nobody is told."""
    backbone = backbone_of(random_vae(3, True, True))
    image = uneven_picture(4 * shape[0], 4 * shape[1])
    biggest = []
    for limit in (STRIPE_BYTES["cpu"], 8192):
        monkeypatch.setitem(STRIPE_BYTES, "cpu", limit)
        with Inputs() as seen:
            latent = encode_in_stripes(backbone, image, tile=0)
            decoded(backbone, latent, tile=0)
        assert len(seen.last) > 40
        assert all(seen.last)
        biggest.append(max(seen.bytes))
    kernels = [weight for weight in backbone.vae.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert kernels
    assert all(kernel.is_contiguous() for kernel in kernels), "the VAE itself is as it was"
    # FEWEST_ROWS, two held back and one of padding; 16 channels across the shorter side and its padding.
    assert biggest[1] <= 4 * 16 * (48 + 1) * (FEWEST_ROWS + 3) < biggest[0] / 3


@torch.inference_mode()
def test_a_single_picture_with_unknown_layers_runs_untiled() -> None:
    vae = random_vae(3, False, True)
    backbone, image = backbone_of(vae), uneven_picture(24, 20)
    expected = backbone.encode(2 * image - 1), backbone.decode(torch.ones(1, 4, 6, 5))
    for half in (vae.encoder, vae.decoder):
        old = half.conv_in
        half.conv_in = torch.nn.Conv2d(old.in_channels, old.out_channels, 5, padding=2)
        half.conv_in.weight.zero_()
        half.conv_in.weight[:, :, 1:4, 1:4] = old.weight
        half.conv_in.bias.copy_(old.bias)
    torch.testing.assert_close(encode_in_stripes(backbone, image, tile=0), expected[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(decoded(backbone, torch.ones(1, 4, 6, 5), tile=0), expected[1], rtol=0, atol=TOLERANCE)
    with pytest.raises(UnknownLayer, match="cannot run in tiles"):
        encode_in_stripes(backbone, image, tile=2)


@torch.inference_mode()
def test_two_layers_a_level_and_a_picture_that_ends_before_the_latent() -> None:
    backbone = backbone_of(random_vae(3, False, True, layers=2))
    latent = torch.randn(1, 4, 9, 12, generator=torch.Generator().manual_seed(1))
    whole = (backbone.decode(latent) + 1) / 2
    for height, width in ((36, 48), (33, 48), (36, 41), (1, 1)):
        out = torch.empty(1, 3, height, width)
        decode_in_stripes(backbone, latent, out, tile=4)
        torch.testing.assert_close(out, whole[:, :, :height, :width], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_statistics_of_one_part_would_not_do(backbone) -> None:
    """What the tests above would miss if each stripe were normalised on its own: a hundred times their tolerance."""
    factor = backbone.descriptor.latent_factor
    image = 2 * uneven_picture(16 * factor, 8 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    whole = backbone.encode(image)
    parts = torch.cat(
        [run_bounded(half, part, 4 * factor, own_statistics(half, part)) for part in image.split(4 * factor, 2)], 2
    )
    assert (parts - whole).abs().max() > 100 * TOLERANCE
    latent = whole * torch.linspace(0.2, 2, 16)[:, None]
    half = backbone.vae_half("decoder", 0)
    parts = torch.cat([run_bounded(half, part, 4, own_statistics(half, part)) for part in latent.split(4, 2)], 2)
    assert (parts - backbone.decode(latent)).abs().max() > 100 * TOLERANCE


@torch.inference_mode()
def test_half_precision_rounds_as_the_untiled_one_does() -> None:
    vae = random_vae(3, True, True)
    precise, coarse = backbone_of(vae), None
    image = uneven_picture(40, 52)
    latent = encode_in_stripes(precise, image, tile=4)
    whole = precise.decode(latent)
    coarse = backbone_of(vae, torch.bfloat16)
    tiled, untiled = decoded(coarse, latent, tile=4), coarse.decode(latent)
    error = (untiled - whole).square().mean().sqrt()
    assert 0 < (tiled - whole).square().mean().sqrt() < 1.2 * error
    error = (coarse.encode(2 * image - 1) - latent).square().mean().sqrt()
    assert 0 < (encode_in_stripes(coarse, image, tile=4) - latent).square().mean().sqrt() < 1.2 * error


class OtherUnetDevice:
    """A backbone whose encoder hands its latent over to another device, as in ComfyUI with --cpu-vae."""

    def __init__(self, backbone: DiffusersBackbone) -> None:
        self.backbone, self.descriptor = backbone, backbone.descriptor

    def vae_half(self, part: str, pixels: int) -> VaeHalf:
        half = self.backbone.vae_half(part, pixels)
        return replace(half, steps=(*half.steps, Pointwise(lambda latent: latent.to("meta"))))


@pytest.mark.parametrize("exact", [True, False])
def test_a_latent_is_on_the_device_where_the_encoder_leaves_it(exact: bool) -> None:
    backbone = backbone_of(random_vae(2, attention=True, quant=True))
    image = uneven_picture(64, 48)
    latent = encode_in_stripes(OtherUnetDevice(backbone), image, tile=8, exact=exact)
    expected = encode_in_stripes(backbone, image, tile=8, exact=exact)
    assert latent.device.type == "meta"
    assert (latent.shape, latent.dtype) == (expected.shape, expected.dtype)


@torch.inference_mode()
def test_a_nearly_flat_picture_is_exact_too() -> None:
    backbone = backbone_of(random_vae(3, True, True))
    image = 0.5 + 1e-3 * uneven_picture(48, 40)
    latent = backbone.encode(2 * image - 1)
    spread = float((latent - latent.mean((2, 3), keepdim=True)).abs().max())
    torch.testing.assert_close(encode_in_stripes(backbone, image, tile=0), latent, rtol=0, atol=1e-3 * spread)
