"""Tiny VAEs in the layouts they are published in: diffusers' AutoencoderTiny and TAESD's own pair, random weights."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.tiled_vae.tiled import plan_stripes
from icmsr_core.train.networks.bases import make_unet
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.generator_file import PartWeights, save_generator
from icmsr_core.weights.tiny_vae_file import read_tiny_vae
from tests.support.model_files import TINY, random_generator
from tests.support.pictures import random_picture
from tests.support.stripes import decode_in_stripes, encode_in_stripes
from tests.support.tiny_vae_files import write_tiny_folder, write_tiny_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def theirs(folder) -> AutoencoderTiny:
    """diffusers' own reading of the folder."""
    return AutoencoderTiny.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def generator(base, tmp_path_factory) -> Path:
    """One that leaves the VAE as it is."""
    path = tmp_path_factory.mktemp("models") / "generator.safetensors"
    save_generator(path, replace(random_generator(base), vae=PartWeights()), torch.float32)
    return path


def backbone_of(vae: AutoencoderTiny) -> DiffusersBackbone:
    descriptor = BackboneDescriptor("toy", vae.config.latent_channels, 8, 16, 200, "residual")
    unet = make_unet(replace(TINY, latent_channels=vae.config.latent_channels))
    return DiffusersBackbone(unet, vae, descriptor, torch.zeros(1, 32), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("cells", "tile"), [((13, 9), 4), ((7, 17), 5), ((6, 11), 1), ((4, 4), 0)])
@pytest.mark.parametrize("exact", [True, False])
@torch.inference_mode()
def test_stripes_give_diffusers_untiled_result(base, folder, theirs, cells, tile: int, exact: bool) -> None:
    """Along either axis, one cell wide at the least, in either mode: there is no GroupNorm to estimate."""
    backbone = load_backbone(Recipe(base, tiny_vae=folder))
    image = random_picture(8 * cells[0], 8 * cells[1])
    assert (plan_stripes(*cells, tile).number > 2) == (tile > 0)
    expected = theirs.encode(2 * image - 1).latents
    assert expected.std() > 0.05
    latent = encode_in_stripes(backbone, image, tile=tile, exact=exact)
    torch.testing.assert_close(latent, expected, rtol=0, atol=2e-5)
    expected = theirs.decode(latent).sample / 2 + 0.5
    assert expected.std() > 0.02
    out = torch.empty_like(image)
    decode_in_stripes(backbone, latent, out, tile=tile, exact=exact)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_a_block_that_widens_has_a_shortcut() -> None:
    torch.manual_seed(1)
    vae = AutoencoderTiny(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4).eval()
    block = vae.encoder.layers[1]
    block.skip = torch.nn.Conv2d(32, 32, 1, bias=False)
    backbone, image = backbone_of(vae), random_picture(96, 64)
    got = encode_in_stripes(backbone, image, tile=4)
    torch.testing.assert_close(got, vae.encode(2 * image - 1).latents, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_memory_holds_stripes_only(theirs) -> None:
    """No map of the whole picture's height exists, which exact mode has with a GroupNorm."""
    seen: list[int] = []
    for layer in theirs.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, result: seen.append(result.shape[2]))
    backbone = backbone_of(theirs)
    decode_in_stripes(backbone, torch.randn(1, 4, 40, 8), torch.empty(1, 3, 320, 64), tile=8)
    assert 0 < max(seen) <= 3 * 64


def forms(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """The same weights in every form that is taken."""
    pair = write_tiny_pair(tmp_path / "pair", folder)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", alone)
    return {
        "folder": folder,
        "file": folder / "diffusion_pytorch_model.safetensors",
        "alone": alone,
        "pair": pair,
        "encoder": pair / "taesd_encoder.safetensors",
        "decoder": pair / "taesd_decoder.safetensors",
    }


def test_every_form_is_the_same_vae(folder, theirs, tmp_path) -> None:
    expected = theirs.state_dict()
    for name, path in forms(folder, tmp_path).items():
        tiny = read_tiny_vae(path)
        assert sorted(tiny.state) == sorted(expected), name
        assert all(torch.equal(tiny.state[key], value) for key, value in expected.items()), name
        assert (tiny.latent_channels, tiny.latent_factor) == (4, 8)


def test_what_is_no_tiny_vae_is_refused(folder, base, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    pair = write_tiny_pair(tmp_path / "pair", folder)
    (pair / "taesd_decoder.safetensors").unlink()
    pickled = tmp_path / "taesd.pth"
    pickled.write_bytes(b"x")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    named = tmp_path / "their_encoder.safetensors"
    save_file({"layers.weight": torch.zeros(1)}, named)
    kl = shutil.copytree(base / "vae", tmp_path / "vae")
    for path, words in (
        (tmp_path / "none", "no such file"),
        (tmp_path / "empty", "no tiny VAE in this folder"),
        (pair, "taesd_decoder.safetensors: not found next to"),
        (pickled, "never opened"),
        (other, "not a tiny VAE"),
        (named, "not in TAESD's layout"),
        (kl, "AutoencoderTiny, got 'AutoencoderKL'"),
    ):
        with pytest.raises(IcmsrError, match=words):
            read_tiny_vae(path)
    for change, words in (("drop", "do not fit an AutoencoderTiny"), ("channels", "4 latent channels and 8 pixels")):
        broken = shutil.copytree(folder, tmp_path / change)
        if change == "drop":
            state = load_file(broken / "diffusion_pytorch_model.safetensors")
            state.pop("encoder.layers.3.conv.0.weight")
            save_file(state, broken / "diffusion_pytorch_model.safetensors")
        else:
            write_tiny_folder(broken, latent_channels=16)
        with pytest.raises(IcmsrError, match=words if change == "drop" else "16 latent channels and 8 pixels"):
            load_backbone(Recipe(base, tiny_vae=broken))
    with pytest.raises(IcmsrError, match="TAESD is for sd15 and sd21"):
        load_backbone(Recipe(tiny_vae=folder))  # nano's latent is another


def test_the_command_writes_what_the_library_computes(folder, base, generator, tmp_path) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    pixels = (random_picture(20, 28)[0].movedim(0, -1) * 255).byte().numpy()
    Image.fromarray(pixels).save(source)
    run = [
        "upscale",
        str(source),
        str(target),
        "--base",
        str(base),
        "--model",
        str(generator),
        "--tile",
        "64",
        "--overlap",
        "16",
    ]
    assert main([*run, "--tiny-vae", str(write_tiny_pair(tmp_path / "pair", folder))]) == 0
    written = to_tensor(read_picture(target).rgb)
    settings = UpscaleSettings(tile=64, overlap=16)
    image = to_tensor(read_picture(source).rgb)
    expected = upscale(load_backbone(Recipe(base, generator, tiny_vae=folder)), image, settings)
    assert (written - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert (expected - upscale(load_backbone(Recipe(base, generator)), image, settings)).abs().max() > 2 / 255


def test_a_step_runs_in_the_latents_of_the_unet(folder, base, generator, theirs) -> None:
    """Encoder, UNet, closed form, decoder, by hand: TAESD's latents are the scaled ones, whatever the base's factor."""
    backbone, image = load_backbone(Recipe(base, generator, tiny_vae=folder)), random_picture(64, 48)
    with torch.inference_mode():
        latent = theirs.encode(2 * image - 1).latents
        output = backbone.predict_noise(latent, backbone.descriptor.timestep)
        expected = (theirs.decode(latent - output).sample / 2 + 0.5).clamp(0, 1)
    got = upscale(backbone, image, UpscaleSettings(scale=1, tile=0, overlap=0, color_fix="none"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_generator_that_changes_the_vae_loses_that_with_a_warning(folder, base, generator, caplog, tmp_path) -> None:
    path = tmp_path / "changes the vae.safetensors"
    save_generator(path, random_generator(base), torch.float32)
    with caplog.at_level(logging.WARNING):
        load_backbone(Recipe(base, generator, tiny_vae=folder))
        assert not caplog.records
        load_backbone(Recipe(base, path, tiny_vae=folder))
    (record,) = caplog.records
    assert "changes the vae.safetensors also changes the VAE" in record.getMessage()


def test_a_tiny_vae_that_overflows_goes_on_in_float32(folder, base, generator, caplog) -> None:
    image, settings = random_picture(24, 16), UpscaleSettings(tile=64, overlap=16, color_fix="none")

    def overflowing(dtype: str) -> DiffusersBackbone:
        backbone = load_backbone(Recipe(base, generator, tiny_vae=folder, dtype=dtype))
        with torch.no_grad():  # 1e6 in, 1e6 out: activations too large for fp16, weights and result not
            backbone.vae.decoder.layers[0].weight.mul_(1e3)
            backbone.vae.decoder.layers[0].bias.mul_(1e3)
            backbone.vae.decoder.layers[0].register_forward_hook(lambda _m, _i, result: result * 1e3)
            last = backbone.vae.decoder.layers[-1]
            last.register_forward_pre_hook(lambda _m, inputs: (inputs[0] / 1e6,))
        return backbone

    expected = upscale(overflowing("fp32"), image, settings)
    got = upscale(overflowing("fp16"), image, settings)
    (record,) = caplog.records
    assert record.getMessage().startswith("the VAE's decoder gave NaN or infinite values in fp16")
    assert expected.std() > 0.02
    assert (got - expected).abs().max() < 0.02


def test_the_configuration_names_the_layers(base, tmp_path) -> None:
    """A narrower one with other numbers of blocks: what config.json says is what is built."""
    own = write_tiny_folder(
        tmp_path / "narrow",
        encoder_block_out_channels=[32] * 4,
        num_encoder_blocks=[1, 1, 2, 1],
        decoder_block_out_channels=[32] * 4,
        num_decoder_blocks=[1, 2, 1, 1],
    )
    assert json.loads((own / "config.json").read_text())["num_encoder_blocks"] == [1, 1, 2, 1]
    backbone = load_backbone(Recipe(base, tiny_vae=own))
    with torch.inference_mode():
        image = 2 * random_picture(16, 16) - 1
        expected = AutoencoderTiny.from_pretrained(own).eval().encode(image).latents
        torch.testing.assert_close(backbone.encode(image), expected)
