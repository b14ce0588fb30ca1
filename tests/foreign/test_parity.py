"""Each relative's published arithmetic, written out here in float64, against what this project computes with its file.

Reduced networks, random weights in the exact layouts. By design the posterior's mode takes the place of a sample, and
sizes are multiples of 64 so that nobody pads.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from icmsr_core.cli.main import main
from icmsr_core.foreign.conversion import load_any_generator
from icmsr_core.foreign.told import Told
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.base import PROMPT_FILE
from tests.support.foreign_files import (
    PEFT_ALPHA,
    hypir_checkpoint,
    load_unet,
    osediff_checkpoint,
    pisasr_checkpoint,
    write_omgsr,
)

# The peers' own use of PEFT, several adapters on one network, is what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

SCALING = 0.18215
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


class Case(NamedTuple):
    """A relative's file, and its arithmetic by hand."""

    path: Path
    unet: Mapping[str, torch.Tensor]
    """The LoRA of the UNet under its own names."""
    unet_scale: float | Mapping[str, float]
    """What B A is multiplied with, or that by the adapter in the name."""
    vae: Mapping[str, torch.Tensor]
    vae_scale: float
    timestep: int
    color_fix: str
    coeff_t: int | None = None


def write_case(kind: str, folder: Path, base: Path, shapes) -> Case:
    if kind == "hypir":
        state = hypir_checkpoint(shapes["unet"])
        torch.save(state, folder / "h.pth")
        return Case(folder / "h.pth", state, 1.0, {}, 1.0, 200, "wavelet", 100)
    if kind == "omgsr":
        path = write_omgsr(folder / "omgsr", **shapes)
        unet = load_file(path / "unet_lora_adapter/adapter_model.safetensors")
        vae = load_file(path / "vae_encoder_lora_adapter/adapter_model.safetensors")
        bare = {key.removeprefix("base_model.model."): value for key, value in unet.items()}
        encoder = {key.replace("base_model.model.", "encoder."): value for key, value in vae.items()}
        return Case(path, bare, 1.0, encoder, 1.0, 273, "adain")
    checkpoint = osediff_checkpoint(base) if kind == "osediff" else pisasr_checkpoint(base)
    torch.save(checkpoint, folder / f"{kind}.pkl")
    unet = checkpoint["state_dict_unet"]
    if kind == "osediff":
        scales = PEFT_ALPHA / checkpoint["rank_unet"], PEFT_ALPHA / checkpoint["rank_vae"]
        return Case(folder / "osediff.pkl", unet, scales[0], checkpoint["state_dict_vae"], scales[1], 999, "adain")
    ranks = {name: PEFT_ALPHA / checkpoint[f"lora_rank_unet_{name}"] for name in ("pix", "sem")}
    return Case(folder / "pisasr.pkl", unet, ranks, {}, 1.0, 1, "adain")


def merged(state: Mapping[str, torch.Tensor], lora: Mapping[str, torch.Tensor], scale) -> dict[str, torch.Tensor]:
    """float64: W + scale * B A for every pair in `lora`, and its whole tensors in place of the network's."""
    result = {key: value.double() for key, value in state.items()}
    for key, value in lora.items():
        if ".base_layer." in key:
            result[key.replace(".base_layer.", ".")] = value.double()
    for key, down in lora.items():
        module, mark, rest = key.partition(".lora_A.")
        if mark:
            factor = scale if isinstance(scale, float) else scale[rest.removesuffix(".weight")[-3:]]
            up = lora[f"{module}.lora_B.{rest}"].double()
            weight = result[f"{module}.weight"]
            result[f"{module}.weight"] = weight + factor * (up.flatten(1) @ down.double().flatten(1)).reshape(
                weight.shape
            )
    return result


def low(picture: torch.Tensor) -> torch.Tensor:
    """Five a-trous blurs with replicated edges, as StableSR's wavelet correction has them."""
    tap = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    kernel = (tap[:, None] * tap).expand(3, 1, 3, 3)
    for level in range(5):
        reach = 2**level
        picture = F.conv2d(F.pad(picture, [reach] * 4, mode="replicate"), kernel, dilation=reach, groups=3)
    return picture


def corrected(result: torch.Tensor, reference: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "wavelet":
        return (result - low(result) + low(reference)).clamp(0, 1)
    (mean, spread), (own, own_spread) = (
        (one.mean((2, 3), keepdim=True), (one.var((2, 3), keepdim=True) + 1e-5).sqrt()) for one in (reference, result)
    )
    return ((result - own) / own_spread * spread + mean).clamp(0, 1)


@pytest.mark.parametrize("kind", ["osediff", "pisasr", "hypir", "omgsr"])
def test_latent_and_picture_are_those_of_the_relative_s_own_arithmetic(kind, narrow, shapes, tmp_path):
    case = write_case(kind, tmp_path, narrow.path, shapes)
    random = torch.Generator().manual_seed(7)
    prompt = torch.randn(77, narrow.unet_config["cross_attention_dim"], generator=random)
    picture = F.interpolate(torch.rand(1, 3, 6, 6, generator=random), (32, 16), mode="bicubic").clamp(0, 1)

    unet, vae = load_unet(narrow.path), AutoencoderKL.from_pretrained(narrow.path / "vae")
    untouched = unet.state_dict(), vae.state_dict()
    unet.double().load_state_dict(merged(untouched[0], case.unet, case.unet_scale))
    vae.double().load_state_dict(merged(untouched[1], case.vae, case.vae_scale))
    plain = {"mode": "bicubic"} if kind == "hypir" else {"mode": "bicubic", "antialias": True}
    reference = F.interpolate(picture.double(), (128, 64), **plain)
    reference = reference if kind == "hypir" else reference.clamp(0, 1)
    with torch.inference_mode():
        z = vae.encode(reference * 2 - 1).latent_dist.mode() * SCALING
        output = unet(z, case.timestep, encoder_hidden_states=prompt[None].double()).sample
        abar = ABAR[case.timestep if case.coeff_t is None else case.coeff_t]
        clean = z - output if kind == "pisasr" else (z - (1 - abar).sqrt() * output) / abar.sqrt()
        expected = corrected((vae.decode(clean / SCALING).sample + 1) / 2, reference, case.color_fix)

    layouts = {"sd21": {part: narrow.shapes(part) for part in ("unet", "vae")}}
    generator, _ = load_any_generator(case.path, Told(coeff_t=case.coeff_t), layouts=layouts)
    backbone = load_backbone(Recipe(narrow.path, replace(generator, prompt_embedding=prompt)))
    # Beside its smallest size, which is for networks of full size.
    settings = UpscaleSettings().following(backbone.descriptor.recommended, ["smallest"])
    assert (settings.color_fix, settings.resize == "bicubic") == (case.color_fix, kind == "hypir")
    with torch.inference_mode():
        latent = backbone.encode(reference.float() * 2 - 1)
        got = backbone.descriptor.clean(latent, backbone.predict_noise(latent, backbone.descriptor.timestep))
        result = upscale(backbone, picture, settings)
    scale, spread = float(clean.abs().max()), float(expected.std())
    latent_error, picture_error = float((got - clean).abs().max()), float((result - expected).abs().max())
    print(f"{kind}: latent {latent_error / scale:.1e} of its scale {scale:.1f}, picture {picture_error * 255:.3f}/255")
    assert latent_error <= 1e-4 * scale
    assert spread > 0.02
    assert picture_error <= 1 / 255


def test_a_small_result_is_made_at_the_authors_smallest_size_and_resized(narrow, shapes, tmp_path):
    """HYPIR: the plain enlargement, then antialiased to the smallest side."""
    from icmsr_core.upscale.framing import at_least, scaled_frame
    from icmsr_core.upscale.sizes import at_work_size

    frame = at_least(scaled_frame((20, 16), 4), 128)
    assert (frame.work, frame.scaled, frame.target) == ((160, 128), (80, 64), (80, 64))
    assert "made at 128 x 160, resized to 64 x 80" in str(frame.remarks()[0])
    assert at_least(frame, 100) is frame
    picture = torch.rand(1, 3, 20, 16, generator=torch.Generator().manual_seed(1))
    plain = F.interpolate(picture, (80, 64), mode="bicubic")
    torch.testing.assert_close(
        at_work_size(picture, frame, "bicubic"), F.interpolate(plain, (160, 128), mode="bicubic", antialias=True)
    )
    case = write_case("hypir", tmp_path, narrow.path, shapes)
    layouts = {"sd21": {part: narrow.shapes(part) for part in ("unet", "vae")}}
    generator, _ = load_any_generator(case.path, Told(), layouts=layouts)
    prompt = torch.zeros(3, narrow.unet_config["cross_attention_dim"])
    backbone = load_backbone(Recipe(narrow.path, replace(generator, prompt_embedding=prompt)))
    small = UpscaleSettings(smallest=128, resize="bicubic")
    larger = upscale(backbone, picture, small)
    assert larger.shape == (1, 3, 80, 64)
    assert not torch.equal(larger, upscale(backbone, picture, UpscaleSettings()))


def test_a_user_s_choice_goes_before_the_authors():
    from icmsr_core.backbone.recommended import Recommended

    authors = Recommended("adain", 768, 256, 512, "bicubic")
    followed = UpscaleSettings().following(authors, [])
    assert (followed.color_fix, followed.tile, followed.overlap) == ("adain", 768, 256)
    assert (followed.smallest, followed.resize) == (512, "bicubic")
    chosen = UpscaleSettings(tile=256, color_fix="none").following(authors, ["tile", "color_fix"])
    assert (chosen.color_fix, chosen.tile, chosen.overlap, chosen.smallest) == ("none", 256, 128, 512)
    assert UpscaleSettings().following(Recommended(), []) == UpscaleSettings()


@pytest.mark.long
def test_the_command_line_says_what_it_found_and_follows_the_authors(narrow, shapes, tmp_path, caplog):
    case = write_case("hypir", tmp_path, narrow.path, shapes)
    base = shutil.copytree(narrow.path, tmp_path / "base")
    prompt = torch.randn(5, narrow.unet_config["cross_attention_dim"], generator=torch.Generator().manual_seed(2))
    save_file({"prompt_embedding": prompt}, base / PROMPT_FILE)
    levels = (torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(3)) * 255).byte().numpy()
    Image.fromarray(levels).save(tmp_path / "in.png")

    def upscaled(*options: str) -> bytes:
        files = ["--base", str(base), "--model", str(case.path), "--smallest", "0", "--device", "cpu"]
        assert main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *files, *options]) == 0
        return (tmp_path / "out.png").read_bytes()

    with caplog.at_level("INFO"):
        followed = upscaled()
    assert "h.pth: found HYPIR: rank 256 on 257 modules of the UNet" in caplog.text
    assert followed == upscaled("--color-fix", "wavelet", "--resize", "bicubic", "--coeff-t", "200")
    assert followed != upscaled("--resize", "antialiased")
