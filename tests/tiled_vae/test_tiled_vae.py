"""The VAE in stripes against the untiled one: small random networks of diffusers' classes, and the embedded model."""

import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.backbone.vae_steps import (
    Norm,
    Pointwise,
    Residual,
    Sample,
    Step,
    UnknownLayer,
    VaeHalf,
    conv_step,
    down_step,
)
from icmsr_core.cli.demo import demo_picture
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.steps import Steps
from icmsr_core.tiled_vae import estimate as tiled_vae_statistics
from icmsr_core.tiled_vae import held_map as tiled_vae_held
from icmsr_core.tiled_vae import stream as tiled_vae_stream
from icmsr_core.tiled_vae.estimate import (
    FIELD,
    FIELD_MARGIN,
    Fields,
    Frame,
    calibrate,
    draw,
    draw_fields,
    drawn_windows,
    estimate_whole,
)
from icmsr_core.tiled_vae.held_map import HeldMap
from icmsr_core.tiled_vae.modes import BoundedStream, Estimate, ExactStream, Statistics, combine, moments
from icmsr_core.tiled_vae.stream import FEWEST_ROWS, STRIPE_BYTES, Flow
from icmsr_core.tiled_vae.tiled import is_exact, plan_stripes
from icmsr_core.train.networks.bases import NetworkConfig, make_unet
from icmsr_core.upscale import color
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.embedded import embedded_generator
from tests.support.script_process import ROOT
from tests.support.stripes import decode_in_stripes, encode_in_stripes

TOLERANCE = 2e-5
"""On [-1, 1], float32; the issue asks for 1e-4."""


def random_vae(levels: int, attention: bool, quant: bool, layers: int = 1, channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(levels)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 24, 32)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers,
        norm_num_groups=4,
        latent_channels=channels,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        scaling_factor=0.7,
    ).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if ".to_" in name:
                parameter.mul_(3)  # attention that tells places apart
    return vae


def backbone_of(vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> DiffusersBackbone:
    channels = vae.config.latent_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    descriptor = BackboneDescriptor("toy", channels, factor, 2 * factor, 200, "residual")
    unet = make_unet(NetworkConfig(latent_channels=channels, unet_channels=(32, 32)))
    return DiffusersBackbone(unet, vae, descriptor, torch.zeros(1, 32), torch.device("cpu"), dtype)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth at one end and rough at the other, so that no part has the statistics of the whole."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.linspace(0, 1, height)[:, None] * torch.linspace(0.2, 1, width)
    return 0.8 * rough * torch.rand(1, 3, height, width, generator=generator) + 0.1


def decoded(backbone: DiffusersBackbone, latent: torch.Tensor, **options) -> torch.Tensor:
    factor = backbone.descriptor.latent_factor
    out = torch.empty(1, 3, latent.shape[2] * factor, latent.shape[3] * factor)
    decode_in_stripes(backbone, latent, out, **options)
    return 2 * out - 1


VAES = [(3, True, True), (4, False, True), (4, True, False), (3, False, False)]


@pytest.fixture(scope="module", params=VAES, ids=lambda p: f"levels{p[0]}-{'attn' if p[1] else 'plain'}-{p[2]}")
def backbone(request) -> DiffusersBackbone:
    return backbone_of(random_vae(*request.param))


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "tile"), [((13, 9), 4), ((7, 17), 5), ((6, 11), 1)])
@torch.inference_mode()
def test_exact_is_the_untiled_result(backbone, cells: tuple[int, int], tile: int) -> None:
    """Stripes along either axis, the last one narrower, one cell wide at the least."""
    factor = backbone.descriptor.latent_factor
    image = picture(cells[0] * factor, cells[1] * factor)
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
    image = picture(cells[0] * factor, cells[1] * factor)
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
    image = picture(4 * shape[0], 4 * shape[1])
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
    backbone, image = backbone_of(vae), picture(24, 20)
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


def own_statistics(half: VaeHalf, source: torch.Tensor) -> dict[Norm, Statistics]:
    stream = ExactStream(half, 2)
    list(stream.through(half.steps, stream.source(source, source.shape[2])).chunks)
    return stream.statistics


def run_bounded(half: VaeHalf, source: torch.Tensor, nominal: int, known, axis=2, window=10**6, margin=0):
    estimate = known if isinstance(known, Estimate) else Estimate(known)
    stream = BoundedStream(half, axis, estimate, window, margin)
    return torch.cat(list(stream.through(half.steps, stream.source(source, nominal)).chunks), axis)


@torch.inference_mode()
def test_statistics_of_one_part_would_not_do(backbone) -> None:
    """What the tests above would miss if each stripe were normalised on its own: a hundred times their tolerance."""
    factor = backbone.descriptor.latent_factor
    image = 2 * picture(16 * factor, 8 * factor) - 1
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
    image = picture(40, 52)
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
    image = picture(64, 48)
    latent = encode_in_stripes(OtherUnetDevice(backbone), image, tile=8, exact=exact)
    expected = encode_in_stripes(backbone, image, tile=8, exact=exact)
    assert latent.device.type == "meta"
    assert (latent.shape, latent.dtype) == (expected.shape, expected.dtype)


def test_whole_maps_go_where_there_is_room() -> None:
    for room, place in ((1e9, "meta"), (2 * 4 * 60 * 4.0, "meta"), (2 * 4 * 60 * 4 - 1.0, "cpu")):
        stream = ExactStream(VaeHalf((), torch.device("meta"), partial(float, room)), 2)
        chunk = torch.empty(1, 4, 3, 6, device="meta")
        assert stream._place(Flow(iter(()), 10, 3), chunk).type == place


def test_a_held_map_gives_what_it_was_given_once() -> None:
    whole = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    for axis in (2, 3):
        held = HeldMap(axis)
        size = whole.shape[axis]
        for piece in whole.split((3, size - 3), axis):
            held.append(piece)
        torch.testing.assert_close(torch.cat(list(held.read()), axis), whole, rtol=0, atol=0)
        torch.testing.assert_close(held.joined(1), whole[1:], rtol=0, atol=0)
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


@torch.inference_mode()
def test_a_nearly_flat_picture_is_exact_too() -> None:
    backbone = backbone_of(random_vae(3, True, True))
    image = 0.5 + 1e-3 * picture(48, 40)
    latent = backbone.encode(2 * image - 1)
    spread = float((latent - latent.mean((2, 3), keepdim=True)).abs().max())
    torch.testing.assert_close(encode_in_stripes(backbone, image, tile=0), latent, rtol=0, atol=1e-3 * spread)


# --- bounded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [2, 3])
@torch.inference_mode()
def test_bounded_has_no_seams_beside_its_statistics(backbone, axis: int) -> None:
    """With the true statistics, and one window for the attention, it is the untiled result."""
    factor = backbone.descriptor.latent_factor
    image = 2 * picture(13 * factor, 11 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    latent = backbone.encode(image)
    got = run_bounded(half, image, 2 * factor, own_statistics(half, image), axis)
    torch.testing.assert_close(got, latent, rtol=0, atol=TOLERANCE)
    half = backbone.vae_half("decoder", 0)
    got = run_bounded(half, latent, 2, own_statistics(half, latent), axis)
    torch.testing.assert_close(got, backbone.decode(latent), rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_the_more_a_window_sees_around_itself_the_nearer_it_is_to_the_whole() -> None:
    """Windows whose margin reaches everywhere are the whole; with less margin they are near it, with none far."""
    backbone = backbone_of(random_vae(3, True, True))
    latent = torch.randn(1, 4, 20, 22, generator=torch.Generator().manual_seed(2))
    half, whole = backbone.vae_half("decoder", 0), backbone.decode(latent)
    known = own_statistics(half, latent)
    errors = []
    for margin in (22, 4, 0):  # without a sample of the rest
        got = run_bounded(half, latent, 3, known, window=6, margin=margin)
        errors.append(float((got - whole).square().mean().sqrt()))
    assert errors[0] < TOLERANCE
    assert 100 * TOLERANCE < errors[1] < 0.8 * errors[2]


@torch.inference_mode()
def test_a_sample_stands_for_what_a_window_does_not_see() -> None:
    """Exactly, if it is all of the map; nearly, if it is the fields that are drawn."""
    backbone = backbone_of(random_vae(3, True, True))
    latent = torch.randn(1, 4, 80, 72, generator=torch.Generator().manual_seed(2))
    half, whole = backbone.vae_half("decoder", 0), backbone.decode(latent)
    known = own_statistics(half, latent)
    drawn = estimate_whole(half, latent, 1, 4, 16)
    assert [sample.total for sample in drawn.samples.values()] == [80 * 72]
    attention = next(iter(drawn.samples))
    errors = []
    for samples in ({}, drawn.samples):
        got = run_bounded(half, latent, 8, Estimate(known, samples), window=16, margin=4)
        errors.append(float((got - whole).square().mean().sqrt()))
    print(errors)
    assert errors[1] < 0.8 * errors[0]
    field = torch.randn(1, 24, 6, 5, generator=torch.Generator().manual_seed(3))
    every = Sample(field.flatten(2), torch.full((30,), 1 / 30), 30)
    torch.testing.assert_close(attention.run(field, None, every), attention.run(field, field), rtol=0, atol=1e-5)
    # A place that stands for three is three places.
    doubled = torch.cat([field, field[:, :, :2], field[:, :, :2]], 2)
    shares = torch.tensor([3.0] * 10 + [1.0] * 20) / 50
    weighted = attention.run(field, None, Sample(field.flatten(2), shares, 50))
    torch.testing.assert_close(weighted, attention.run(field, doubled), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_no_place_is_computed_twice(backbone) -> None:
    """The operations of all stripes together are those of the whole."""
    factor = backbone.descriptor.latent_factor
    image = torch.rand(1, 3, 12 * factor, 10 * factor)
    half = backbone.vae_half("encoder", 0)
    known = own_statistics(half, image)

    def operations(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    whole = operations(lambda: backbone.encode(image))
    striped = operations(lambda: run_bounded(half, image, 2 * factor, known))
    assert whole > 0
    assert abs(striped / whole - 1) < 0.01


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are still referred to, views counted with what they view."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._now, self._users = 0, 0, Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tree_map_only(torch.Tensor, self._watch, result)
        return result

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._users[key] += 1
        if self._users[key] == 1:
            self._now += size
            self.peak = max(self.peak, self._now)
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._now -= size


def test_live_bytes_count_what_is_held() -> None:
    with LiveBytes() as memory:
        one = torch.zeros(1000)
        for _ in range(5):
            two = one + 1
            del two
        view = torch.zeros(500)[:10]
        del one
        three = torch.zeros(1000)
    assert memory.peak == 4 * 2000
    assert view.numel() + three.numel() == 1010


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@torch.no_grad()
def test_bounded_keeps_no_more_than_stripes(part: str) -> None:
    """Pictures two and four times as long take no more memory at all; the exact mode takes as much more."""
    backbone = backbone_of(random_vae(3, True, True))
    half = backbone.vae_half(part, 0)
    unit, channels = (4, 3) if part == "encoder" else (1, 4)
    known = own_statistics(half, torch.randn(1, channels, 8 * unit, 8 * unit))
    peaks: dict[str, list[int]] = {"bounded": [], "exact": []}
    for length in (40, 80, 160):
        source = torch.randn(1, channels, length * unit, 16 * unit)
        for name, stream in (
            ("bounded", BoundedStream(half, 2, Estimate(known), 8, 2)),
            ("exact", ExactStream(half, 2)),
        ):
            with LiveBytes() as memory:
                made = 0
                for chunk in stream.through(half.steps, stream.source(source, 4 * unit)).chunks:
                    made += chunk.shape[2]
                    del chunk
            assert made == (length if part == "encoder" else 4 * length)
            peaks[name].append(memory.peak - 4 * source.numel())  # which its first stripe counts with
    print(peaks)
    assert peaks["bounded"][0] == peaks["bounded"][1] == peaks["bounded"][2]
    assert peaks["exact"][2] > 2 * peaks["exact"][0]


@torch.no_grad()
def test_memory_of_a_long_picture_grows_by_the_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, enlarged input, result, latents; the fields are as many in both, and the colours run in stripes."""
    monkeypatch.setattr(color, "STRIPE_ROWS", 64)
    monkeypatch.setattr(tiled_vae_statistics, "FEWEST", 16)
    monkeypatch.setattr(tiled_vae_statistics, "LARGEST", 16 * ((FIELD + 2 * FIELD_MARGIN) * 4) ** 2)
    # As many windows whatever the picture: none is left out.
    monkeypatch.setattr(tiled_vae_statistics, "calibrate", lambda off, weights: weights / weights.sum())
    backbone = backbone_of(random_vae(3, False, True))
    settings = UpscaleSettings(scale=2, tile=64, overlap=16, vae="bounded")
    peaks = []
    for length in (512, 1024):
        with LiveBytes() as memory:
            upscale(backbone, torch.rand(1, 3, length, 32), settings)
        peaks.append(memory.peak)
    # In pictures of the result's size: the input is a fourth, each of at most three latents a twelfth.
    growth = (peaks[1] - peaks[0]) / (4 * 3 * 1024 * 64)
    print(growth)
    assert growth < 2 + 1 / 4 + 3 / 12 + 0.2


def test_the_statistics_cost_what_they_may() -> None:
    """The windows: an eighth of the picture or 3 * 2^18 pixels, whichever is less, unless 128 of them are more."""
    for factor, side, cost in ((4, 2056, 1 / 8), (4, 4096, 0.05), (8, 2056, 0.29), (8, 4096, 0.08)):
        assert not is_exact("auto", side, side)
        fields = draw_fields(torch.rand(1, 4, side // factor, side // factor), 1, factor)
        share = len(fields.corners) * ((FIELD + 2 * FIELD_MARGIN) * factor) ** 2 / side**2
        assert 0.8 * cost < share <= cost
        assert len(fields.corners) >= 128


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (5, 9), (64, 20), (256, 256), (514, 600)])
@pytest.mark.parametrize("factor", [4, 8])
def test_no_more_windows_are_drawn_than_memory_is_counted_for(rows: int, columns: int, factor: int) -> None:
    source = torch.rand(1, 4, rows, columns, generator=torch.Generator().manual_seed(0))
    fields = draw_fields(source, 1, factor)
    number, area = drawn_windows(rows, columns, factor)
    height, width = Frame(fields, (rows, columns), 1, FIELD_MARGIN).window
    assert area == height * width
    assert 0.8 * number <= len(fields.corners) <= number


def test_windows_show_the_picture_around_the_fields_and_end_where_it_ends() -> None:
    rows, columns = 31, 40
    source = torch.arange(rows * columns).float().reshape(1, 1, rows, columns)
    fields = Fields([(0, 0), (9, 14), (27, 35), (2, 20)], (4, 5), torch.full((4,), 0.25))
    wide = Frame(fields, (rows, columns), 1, 6)
    assert wide.window == (16, 17)
    assert [wide.start(corner) for corner in fields.corners] == [(0, 0), (3, 8), (15, 23), (0, 14)]
    windows = HeldMap(2)
    whole = torch.cat([source[:, :, y : y + 16, x : x + 17] for y, x in map(wide.start, fields.corners)])
    for band in whole.split(7, 2):
        windows.append(band)
    for margin in (0, 2, 5, 6):
        narrow = wide._replace(margin=margin)
        height, width = narrow.window
        assert (height, width) == (4 + 2 * margin, 5 + 2 * margin)
        for corner, part in zip(fields.corners, wide.cut(windows, margin), strict=True):
            y, x = narrow.start(corner)
            assert torch.equal(part, source[:, :, y : y + height, x : x + width])
            assert source[0, 0, corner[0], corner[1]] in part
            assert source[0, 0, corner[0] + 3, corner[1] + 4] in part
    # Four samples a cell, and windows that reach beyond the picture on both sides.
    assert Frame(fields, (rows, columns), 4, 6).start((9, 14)) == (30, 50)
    everything = Frame(fields, (rows, columns), 1, 50)
    assert everything.window == (rows, columns)
    assert everything.start((9, 14)) == (0, 0)


@torch.inference_mode()
def test_windows_as_large_as_the_picture_measure_it_exactly(backbone) -> None:
    """So its own border is in the estimate, and the picture around a field is what the networks see there."""
    factor = backbone.descriptor.latent_factor
    assert FIELD + 2 * FIELD_MARGIN >= 12, "the whole picture"
    image = 2 * picture(12 * factor, 8 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    truth = own_statistics(half, image)
    got = estimate_whole(half, image, factor, factor, 8).statistics
    for norm, (mean, variance) in truth.items():
        torch.testing.assert_close(got[norm].variance, variance, rtol=1e-3, atol=0)
        torch.testing.assert_close(got[norm].mean, mean, rtol=0, atol=1e-3 * float(variance.max()) ** 0.5)


@pytest.mark.parametrize("unit", [1, 4])
def test_fields_stand_for_the_picture(unit: int) -> None:
    """Their weighted features are the picture's, also where something rare is unlike all the rest."""
    random = torch.Generator().manual_seed(0)
    source = torch.randn(1, 3, 100 * unit, 170 * unit, generator=random) * torch.linspace(0.3, 1, 170 * unit)
    source[..., : 3 * unit] = 5.0  # a frame at one side
    source[:, :, 40 * unit : 44 * unit, 90 * unit : 96 * unit] = -4.0
    fields = draw_fields(source, unit, 8)
    rows, columns = fields.size
    assert len(fields.corners) <= 128 < 25 * 43  # of all there are
    assert fields.weights.min() >= 0
    assert float(fields.weights.sum()) == pytest.approx(1)
    crops = torch.cat(
        [source[:, :, y * unit : (y + rows) * unit, x * unit : (x + columns) * unit] for y, x in fields.corners]
    )
    assert crops.shape[2:] == (rows * unit, columns * unit), "inside the picture"
    for power, tolerance in ((1, 0.03), (2, 0.06)):
        estimate = (fields.weights * crops.double().pow(power).mean((1, 2, 3))).sum()
        assert abs(float(estimate - source.double().pow(power).mean())) < tolerance * float(source.std())
    plain = crops.double().square().mean()
    assert abs(float(plain - source.double().square().mean())) > 0.06 * float(source.std()), "weights matter here"


def test_small_and_narrow_pictures_have_fields_too() -> None:
    for height, width in ((3, 2), (8, 8), (5, 700), (9, 9), (1, 1)):
        fields = draw_fields(torch.rand(1, 4, height, width), 1, 8)
        assert fields.size == (min(FIELD, height), min(FIELD, width))
        assert float(fields.weights.sum()) == pytest.approx(1)
        for top, left in fields.corners:
            assert 0 <= top <= height - fields.size[0]
            assert 0 <= left <= width - fields.size[1]


def test_draw_gives_everything_its_chance() -> None:
    importance = torch.tensor([1.0, 1, 1, 1, 400, 1, 1, 1, 1, 9], dtype=torch.float64)
    chosen, chances = draw(importance, 4)
    assert 4 in chosen.tolist()
    assert len(chosen) == 4
    by_index = dict(zip(chosen.tolist(), chances.tolist()))
    assert by_index[4] == 1
    for index, chance in by_index.items():
        assert chance == pytest.approx(1 if index == 4 else 3 / 11 * (3 if index == 9 else 1))
    assert draw(importance, 50)[0].tolist() == list(range(10))
    assert draw(torch.ones(12, dtype=torch.float64), 3)[0].tolist() == [1, 5, 9]


def test_calibration_meets_the_features_without_negative_weights() -> None:
    off = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.4
    weights = calibrate(off, torch.ones(40, dtype=torch.float64))
    assert weights.min() >= 0
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights[:, None] * off).sum(0).abs().max()) < 0.25 * float(off.mean(0).abs().max())
    even = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(calibrate(torch.zeros(5, 2, dtype=torch.float64), torch.ones_like(even)), even)
    torch.testing.assert_close(
        calibrate(torch.tensor([[1e3], [1.0], [1.0]]).double(), torch.ones(3).double())[0], torch.tensor(0.0).double()
    )


@pytest.fixture(scope="module")
def nano() -> DiffusersBackbone:
    return load_backbone(Recipe(generator=embedded_generator()))


@torch.inference_mode()
def test_bounded_stays_close_to_exact_on_the_embedded_model(nano) -> None:
    """At least 45 dB on a photograph, encoder and decoder together."""
    image = to_tensor(read_picture(demo_picture()).rgb).float()
    factor = nano.descriptor.latent_factor
    image = torch.nn.functional.interpolate(image[:, :, :64, :96], scale_factor=4, mode="bicubic").clamp(0, 1)
    results = {}
    for exact in (True, False):
        latent = encode_in_stripes(nano, image, tile=256 // factor, exact=exact)
        results[exact] = decoded(nano, latent, tile=256 // factor, exact=exact)
    psnr = -10 * torch.log10(((results[True] - results[False]) / 2).square().mean())
    print(f"{psnr:.1f} dB")
    assert 45 < psnr < 120


def mosaic_of_the_demo(side: int) -> torch.Tensor:
    """Sixteen parts of the demo's photograph, each enlarged, darkened, faded and mirrored in its own way."""
    photograph = to_tensor(read_picture(demo_picture()).rgb).float()
    part = side // 16
    parts = []
    for index in range(16):
        y, x = (index * 37) % (photograph.shape[2] - part), (index * 53) % (photograph.shape[3] - part)
        crop = photograph[:, :, y : y + part, x : x + part].flip(2 + index % 2)
        contrast, light = (0.05, 1.0, 0.4, 0.8)[index % 4], (0.5, 0.0, 0.55, 0.1)[index % 4]
        parts.append(contrast * crop.roll(index, 1) + light)
    rows = [torch.cat(parts[index : index + 4], 3) for index in range(0, 16, 4)]
    whole = torch.nn.functional.interpolate(torch.cat(rows, 2), scale_factor=4, mode="bicubic")
    return whole.clamp(0, 1)


@torch.inference_mode()
def test_bounded_stays_close_to_exact_where_every_part_has_other_statistics(nano) -> None:
    """The aim of 45 dB, encoder and decoder together, on the hardest kind of picture; without windows it is missed."""
    image = mosaic_of_the_demo(768)
    results = {}
    for exact in (True, False):
        latent = encode_in_stripes(nano, image, tile=64, exact=exact)
        results[exact] = decoded(nano, latent, tile=64, exact=exact)
    psnr = -10 * torch.log10(((results[True] - results[False]) / 2).square().mean())
    print(f"{psnr:.1f} dB")
    assert 45 < psnr < 120


@torch.inference_mode()
def test_the_same_estimate_every_time(backbone) -> None:
    factor = backbone.descriptor.latent_factor
    image = picture(30 * factor, 26 * factor)
    half = backbone.vae_half("encoder", 0)
    first, second = (estimate_whole(half, image, factor, factor, 8) for _ in range(2))
    for norm, value in first.statistics.items():
        assert torch.equal(value.variance, second.statistics[norm].variance)
    assert len(first.statistics) == count(half.steps)


@torch.inference_mode()
def test_the_estimate_is_near_the_truth(backbone) -> None:
    """Nearer than the middle of the picture, or than all of it at a fourth of its size."""
    factor = backbone.descriptor.latent_factor
    image = 2 * picture(64 * factor, 56 * factor) - 1
    half = backbone.vae_half("encoder", 0)
    truth = own_statistics(half, image)

    def miss(known: dict[Norm, Statistics]) -> float:
        return max(float((known[norm].variance / truth[norm].variance).log().abs().max()) for norm in truth)

    middle = image[:, :, 20 * factor : 40 * factor, 20 * factor : 40 * factor]
    reduced = torch.nn.functional.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True)
    estimate = miss(estimate_whole(half, image, factor, factor, 8).statistics)
    print(estimate, miss(own_statistics(half, middle)), miss(own_statistics(half, reduced)))
    attends = backbone.vae.config.mid_block_add_attention  # random, it looks for single places, which a sample misses
    assert estimate < (0.2 if attends else 0.1)
    assert estimate < 0.2 * min(miss(own_statistics(half, middle)), miss(own_statistics(half, reduced)))


def count(steps: tuple[Step, ...]) -> int:
    return sum(count(step.main) if isinstance(step, Residual) else isinstance(step, Norm) for step in steps)


# --- plans, progress, errors -----------------------------------------------------------------------------------------


def test_stripes_run_across_the_shorter_side_with_a_tiles_area() -> None:
    assert plan_stripes(512, 512, 64) == (2, 8, 64, 64)
    assert plan_stripes(256, 2048, 64) == (3, 16, 128, 64)
    assert plan_stripes(64, 64, 64).number == plan_stripes(5, 800, 64).number == plan_stripes(999, 77, 0).number == 1
    assert plan_stripes(3000, 2000, 16) == (2, 1, 3000, 16)
    for height, width, tile in ((513, 511, 64), (37, 90, 12), (90, 37, 20), (1, 50, 3)):
        axis, cells, stripes, _ = plan_stripes(height, width, tile)
        length, across = max(height, width), min(height, width)
        assert axis == (2 if height >= width else 3)
        assert cells * across <= max(tile * tile, across)
        assert (stripes - 1) * cells < length <= stripes * cells


def test_auto_is_exact_up_to_the_area_of_2048_by_2048() -> None:
    assert is_exact("auto", 2048, 2048)
    assert is_exact("auto", 1, 2048)
    assert is_exact("auto", 4096, 1024)
    assert not is_exact("auto", 2064, 2048)
    assert is_exact("exact", 9000, 9000)
    assert not is_exact("bounded", 64, 64)


@pytest.mark.parametrize("exact", [True, False])
@torch.inference_mode()
def test_progress_counts_every_stripe_once(exact: bool) -> None:
    backbone = backbone_of(random_vae(3, False, True))
    seen: list[int] = []
    steps = Steps(lambda done, total: seen.append(done))
    latent = encode_in_stripes(backbone, picture(64, 40), tile=6, exact=exact, steps=steps)
    assert seen[-1] == plan_stripes(16, 10, 6).number == 6
    decoded(backbone, latent, tile=6, exact=exact, steps=steps)
    assert seen[-1] == 12
    assert seen == sorted(set(seen))
    assert len(seen) >= 8


@torch.inference_mode()
def test_a_stop_spoils_nothing() -> None:
    class Stop(BaseException):
        pass

    backbone = backbone_of(random_vae(3, False, True))
    image = picture(64, 40)
    expected = encode_in_stripes(backbone, image, tile=6)

    def stop(done: int, total: int) -> None:
        raise Stop

    for exact in (True, False):
        with pytest.raises(Stop):
            encode_in_stripes(backbone, image, tile=6, exact=exact, steps=Steps(stop))
    assert torch.equal(encode_in_stripes(backbone, image, tile=6), expected)


def test_layers_without_a_step_are_named() -> None:
    with pytest.raises(IcmsrError, match=r"cannot run in tiles: .*got Conv2d\(4, 4, kernel_size=\(5, 5\).*tile 0"):
        conv_step(torch.nn.Conv2d(4, 4, 5, padding=2))
    with pytest.raises(IcmsrError, match="stride 2 and padding 0 or 1, got AvgPool2d"):
        down_step(torch.nn.AvgPool2d(2))
    assert isinstance(conv_step(torch.nn.Conv2d(4, 8, 1)), Pointwise)
