"""The choice of precision, and what happens where 16 bits are not enough: real networks that overflow them."""

import logging

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.precision import choose_dtype, computes_bf16, use_full_float32
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.steps import Steps
from icmsr_core.train.networks.bases import NetworkConfig
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.base import open_base
from icmsr_core.weights.embedded import embedded_base, embedded_generator
from tests.support.model_files import write_base, write_generator
from tests.support.pictures import random_picture

TOO_MUCH = 1e7
"""What a map is multiplied by to leave float16's range."""
NAMES = {"encoder": "the VAE's encoder", "unet": "the UNet", "decoder": "the VAE's decoder"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = NetworkConfig(latent_channels=4, vae_channels=(32, 32), unet_channels=(32, 32), vae_groups=4)
    return write_base(tmp_path_factory.mktemp("models") / "base", config)


@pytest.fixture(scope="module")
def generator(base):
    return write_generator(base.parent / "generator.safetensors", base)


@torch.no_grad()
def overflowing(base, generator, part: str, dtype: str) -> DiffusersBackbone:
    """A backbone with one convolution whose result is beyond float16, before a norm that takes the size out again."""
    backbone = load_backbone(Recipe(base, generator, dtype=dtype))
    layer = {
        "encoder": backbone.vae.encoder.conv_in,
        "unet": backbone.unet.conv_in,
        "decoder": backbone.vae.decoder.conv_in,
    }[part]
    # In two factors, since the weights themselves must fit.
    layer.weight.mul_(TOO_MUCH**0.5)
    layer.bias.mul_(TOO_MUCH**0.5)
    layer.register_forward_hook(lambda _module, _inputs, result: result * TOO_MUCH**0.5)
    return backbone


def rounded(base, generator, part: str) -> DiffusersBackbone:
    """The same networks with all weights rounded to float16, computed in float32 throughout."""
    exact = overflowing(base, generator, part, "fp32")
    half = overflowing(base, generator, part, "fp16")
    for name in ("unet", "vae"):
        getattr(exact, name).load_state_dict(getattr(half, name).state_dict())
    exact._context.copy_(half._context)
    return exact


def test_auto_is_a_function_of_device_family_and_hardware(tmp_path) -> None:
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for family in ("nano", "sd21", "sd15"):
        descriptor = open_base(write_base(tmp_path / family, family=family)).descriptor()
        assert choose_dtype("cuda", descriptor, True) == choose_dtype("xpu", descriptor, True) == brain
        assert choose_dtype("cuda", descriptor, False) == choose_dtype("mps", descriptor, False) == half
        assert choose_dtype("cpu", descriptor, False) == full
        assert choose_dtype("cpu", descriptor, True) == (full if family == "nano" else brain)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "mean"), [("fp16", 0.1), ("bf16", 1)])
def test_nano_s_results_agree_between_the_precisions(dtype, mean, caplog) -> None:
    """At most 4 grey levels apart, on average `mean`, and no part goes on in float32."""
    image = random_picture(16, 16)
    base, generator = embedded_base(), embedded_generator()
    expected = upscale(load_backbone(Recipe(base, generator)), image, UpscaleSettings(tile=0))
    half = load_backbone(Recipe(base, generator, dtype=dtype))
    with caplog.at_level(logging.WARNING):
        found = upscale(half, image, UpscaleSettings(tile=0))
    assert not caplog.records
    assert half.unet.conv_in.weight.dtype == half.vae.decoder.conv_in.weight.dtype == half.dtype
    difference = (found - expected).abs() * 255
    print(f"{dtype}: mean {difference.mean():.2f}, worst {difference.max():.2f} of 255")
    assert difference.mean() < mean
    assert difference.max() < 4


def test_bf16_is_computed_where_the_hardware_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for found, native in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert computes_bf16(cpu) is native
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert computes_bf16(cpu) is False
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert computes_bf16(torch.device("cuda")) is native
    assert computes_bf16(torch.device("mps")) is False


@pytest.mark.parametrize(
    ("family", "native", "dtype"),
    [
        ("nano", True, torch.float32),
        ("sd21", True, torch.bfloat16),
        ("sd21", False, torch.float32),
    ],
)
def test_load_backbone_takes_auto(tmp_path, monkeypatch, family, native, dtype) -> None:
    monkeypatch.setattr("icmsr_core.runtime.ingredients.computes_bf16", lambda _: native)
    backbone = load_backbone(Recipe(write_base(tmp_path / "base", family=family), dtype="auto"))
    assert backbone.dtype == dtype
    assert backbone.vae.decoder.conv_in.weight.dtype == backbone.unet.conv_in.weight.dtype == dtype


@pytest.mark.long
@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize(("tile", "vae"), [(0, "exact"), (64, "exact"), (64, "bounded")])
def test_a_part_that_overflows_goes_on_in_float32(base, generator, part: str, tile: int, vae: str, caplog) -> None:
    settings = UpscaleSettings(tile=tile, overlap=16 if tile else 0, vae=vae, color_fix="none")
    image = random_picture(24, 16)
    expected = upscale(rounded(base, generator, part), image, settings)
    backbone = overflowing(base, generator, part, "fp16")
    steps: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        first = upscale(backbone, image, settings, steps=Steps(lambda *done: steps.append(done)))
        second = upscale(backbone, image, settings) if vae == "bounded" else first
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith(f"{NAMES[part]} gave NaN or infinite values in fp16")
    weights = {
        "encoder": [*backbone.vae.encoder.parameters(), *backbone.vae.quant_conv.parameters()],
        "decoder": [*backbone.vae.decoder.parameters(), *backbone.vae.post_quant_conv.parameters()],
        "unet": list(backbone.unet.parameters()),
    }
    for name, tensors in weights.items():
        assert {tensor.dtype for tensor in tensors} == {torch.float32 if name == part else torch.float16}
    assert torch.equal(first, second)
    assert expected.std() > 0.02
    # The other parts still round to float16.
    assert (first - expected).abs().max() < 0.02
    assert steps[-1][0] == steps[-1][1]
    assert steps == sorted(set(steps)), "progress goes forward, and counts no stripe twice"


@torch.inference_mode()
@pytest.mark.parametrize("part", NAMES)
def test_the_part_itself_is_then_exactly_float32(base, generator, part: str) -> None:
    backbone, exact = overflowing(base, generator, part, "fp16"), rounded(base, generator, part)
    latent = torch.randn(1, backbone.descriptor.latent_channels, 8, 16, generator=torch.Generator().manual_seed(0))
    run = {
        "encoder": lambda it: it.encode(2 * random_picture(64, 32) - 1),
        "unet": lambda it: it.predict_noise(latent, it.descriptor.timestep),
        "decoder": lambda it: it.decode(latent),
    }[part]
    torch.testing.assert_close(run(backbone), run(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("tile", [0, 64])
def test_damaged_weights_are_an_error_that_names_the_part(base, generator, part: str, tile: int) -> None:
    for dtype in ("fp32", "bf16"):
        backbone = load_backbone(Recipe(base, generator, dtype=dtype))
        network = backbone.unet if part == "unet" else getattr(backbone.vae, part)
        with torch.no_grad():
            network.conv_out.weight[0, 0, 0, 0] = torch.nan
        with pytest.raises(IcmsrError, match=f"{NAMES[part]} gave NaN or infinite values in fp32"):
            upscale(backbone, random_picture(24, 16), UpscaleSettings(tile=tile, overlap=16 if tile else 0))


def test_finite_results_stay_in_16_bits(base, generator, caplog) -> None:
    backbone = load_backbone(Recipe(base, generator, dtype="fp16"))
    upscale(backbone, random_picture(24, 16), UpscaleSettings(tile=64, overlap=16))
    assert not caplog.records
    assert backbone.unet.conv_in.weight.dtype == backbone.vae.encoder.conv_in.weight.dtype == torch.float16


def test_float32_is_not_tf32() -> None:
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = True
        use_full_float32()
        assert [owner.allow_tf32 for owner in owners] == [False, False]
    finally:
        for owner, value in zip(owners, before):
            owner.allow_tf32 = value
