"""The nodes inside ComfyUI against diffusers: same weights, same pictures, float32."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.bases import NetworkConfig
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import pad_to_multiple
from icmsr_core.weights.generator_file import PartWeights, load_generator, save_generator
from tests.support.comfy_harness import run_script
from tests.support.merging import merged_part
from tests.support.model_files import random_generator, write_base, write_generator

pytestmark = pytest.mark.comfy

SETTINGS = UpscaleSettings(tile=128, overlap=32)
TOLERANCE = 1e-4
"""Largest difference that two correct implementations may show, over the scale of the output."""


class Outcome(NamedTuple):
    job: Path
    results: dict[str, torch.Tensor]
    report: dict
    adapter: torch.nn.Module


def write_adapter(path: Path, channels: list[int]):
    """A diffusers T2IAdapter with random weights, saved as diffusers saves it."""
    from diffusers import T2IAdapter

    adapter = T2IAdapter(4, channels, 2, downscale_factor=8, adapter_type="full_adapter")
    save_file(adapter.state_dict(), path)
    return adapter


@pytest.fixture(scope="module")
def outcome(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    """One ComfyUI process that does everything these tests look at."""
    job = tmp_path_factory.mktemp("native")
    weights = job / "models" / "icmsr"
    weights.mkdir(parents=True)
    base = write_base(job / "base")
    write_base(job / "four channels", NetworkConfig(latent_channels=4))
    convolutions = NetworkConfig(8, (32, 32, 64), unet_channels=(64, 128), unet_self_attention=False, context_tokens=3)
    write_generator(weights / "factor 4.safetensors", write_base(job / "factor 4", convolutions))
    shutil.copytree(base, job / "missing")
    unet_file = job / "missing" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(unet_file).items() if key != "conv_out.bias"}, unet_file)
    write_generator(weights / "a.safetensors", base)
    two_sets = random_generator(base, two_sets=True)
    save_generator(weights / "two sets.safetensors", two_sets, torch.float32)
    tensors = {**two_sets.realistic["unet"].tensors, "conv_in.wrong": torch.zeros(3)}
    above = {**two_sets.realistic, "unet": PartWeights(two_sets.realistic["unet"].lora, tensors)}
    save_generator(weights / "surplus above.safetensors", replace(two_sets, realistic=above), torch.float32)
    only_vae = replace(two_sets, vae=PartWeights(), realistic={"vae": two_sets.realistic["vae"]})
    save_generator(weights / "vae above.safetensors", only_vae, torch.float32)
    write_generator(weights / "b.safetensors", base, prediction="eps", timestep=50, seed=2)
    generator = random_generator(base)
    tensors = {**generator.unet.tensors, "conv_in.wrong": torch.zeros(3)}
    surplus = replace(generator, unet=PartWeights(generator.unet.lora, tensors))
    save_generator(weights / "surplus.safetensors", surplus, torch.float32)
    torch.manual_seed(7)
    adapter = write_adapter(weights / "adapter.safetensors", [64, 128])
    write_adapter(weights / "wide.safetensors", [96, 192])
    write_adapter(weights / "four levels.safetensors", [32, 64, 128, 128])
    inputs = {
        "image": torch.rand(2, 3, 64, 96) * 2 - 1,
        "latent": torch.randn(2, 12, 8, 12),
        "picture": torch.rand(1, 50, 61, 3),
        "hint": torch.rand(1, 100, 122, 4),
    }
    save_file(inputs, job / "inputs.safetensors")
    run_script(comfy_python, comfyui, "native_checks.py", job)
    results = {**load_file(job / "results.safetensors"), **inputs}
    return Outcome(job, results, json.loads((job / "report.json").read_text()), adapter)


def library(outcome: Outcome, name: str = "a.safetensors"):
    return load_backbone(Recipe(outcome.job / "base", outcome.job / "models" / "icmsr" / name))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    print(f"largest difference {difference:.2e} at scale {scale:.2f}")
    assert got.shape == expected.shape
    assert scale > 0.1  # or there would be nothing to compare
    assert difference <= TOLERANCE * scale


def test_native_networks_agree_with_diffusers(outcome):
    backbone, results = library(outcome), outcome.results
    with torch.inference_mode():
        assert_same(results["encode"], backbone.encode(results["image"]))
        assert_same(results["unet"], backbone.predict_noise(results["latent"], backbone.descriptor.timestep))
        assert_same(results["decode"], backbone.decode(results["latent"]))


def test_factor_4_without_self_attention_agrees_with_diffusers(outcome):
    """Core would attend over the picture and only cross-attend to the context unless it is told, without a word."""
    backbone = load_backbone(
        Recipe(outcome.job / "factor 4", outcome.job / "models" / "icmsr" / "factor 4.safetensors")
    )
    assert backbone.descriptor.latent_factor == 4
    results, latent = outcome.results, outcome.results["latent"][:, :8]
    with torch.inference_mode():
        assert_same(results["factor 4 encode"], backbone.encode(results["image"]))
        assert_same(results["factor 4 unet"], backbone.predict_noise(latent, backbone.descriptor.timestep))
        assert_same(results["factor 4 decode"], backbone.decode(latent))
    assert_same(results["factor 4"].movedim(-1, 1), upscale(backbone, results["picture"].movedim(-1, 1), SETTINGS))


@pytest.mark.parametrize(("result", "name"), [("upscale", "a.safetensors"), ("upscale b", "b.safetensors")])
def test_upscale_agrees_with_the_library(outcome, result, name):
    expected = upscale(library(outcome, name), outcome.results["picture"].movedim(-1, 1), SETTINGS)
    assert_same(outcome.results[result].movedim(-1, 1), expected)


def test_generators_of_one_base_do_not_mix(outcome):
    assert float((outcome.results["upscale"] - outcome.results["upscale b"]).abs().max()) > 0.05
    assert outcome.report["first again"] == 0


def test_the_base_stays_as_it_was(outcome):
    assert outcome.report["base unchanged"] == [0, 0, 0]
    assert outcome.report["patches on the base"] == 0


@pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0, 2.0])
def test_fidelity_agrees_with_the_library(outcome, fidelity):
    """Both sets, LoRA and whole tensors, over each other in every way: `random_generator`."""
    weights = outcome.job / "models" / "icmsr" / "two sets.safetensors"
    expected = upscale(
        load_backbone(Recipe(outcome.job / "base", weights, fidelity=fidelity)),
        outcome.results["picture"].movedim(-1, 1),
        SETTINGS,
    )
    assert_same(outcome.results[f"fidelity {fidelity}"].movedim(-1, 1), expected)
    others = [outcome.results[f"fidelity {other}"] for other in (0.0, 0.5, 1.0, 2.0) if other != fidelity]
    assert all(float((outcome.results[f"fidelity {fidelity}"] - other).abs().max()) > 0.01 for other in others)


def test_fidelity_zero_is_the_generator_of_one_set(outcome):
    assert outcome.report["fidelity 0 and one set"] == 0
    assert outcome.report["one set at fidelity 1"] == 0
    assert outcome.report["default fidelity"] == 0


def test_strength_scales_both_sets(outcome):
    """Merged weights are W + strength * (W' - W), whatever lies over what."""
    from icmsr_core.weights.base import open_base

    folder = open_base(outcome.job / "base")
    generator = load_generator(outcome.job / "models" / "icmsr" / "two sets.safetensors")
    for part, state in (("unet", folder.unet_state()), ("vae", folder.vae_state())):
        merged = merged_part(generator.at_fidelity(0.5), part, state)
        squares = sum(float((value.double() - state[name].double()).square().sum()) for name, value in merged.items())
        whole, half = (outcome.report["distances"][f"{part} {strength}"] for strength in (1.0, 0.5))
        assert whole == pytest.approx(squares**0.5, rel=1e-5)
        assert half == pytest.approx(0.5 * squares**0.5, rel=1e-5)
    assert outcome.report["half way"] < 1e-6


def test_a_second_set_may_change_the_vae_alone(outcome):
    assert outcome.report["vae above"] > 0.01


def test_strength_scales_the_generator(outcome):
    from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, build_networks
    from icmsr_core.weights.base import open_base

    folder = open_base(outcome.job / "base")
    generator = load_generator(outcome.job / "models" / "icmsr" / "a.safetensors")
    networks, merged = build_networks(folder), build_networks(folder, generator=generator)
    with torch.no_grad():
        for network, whole in zip(networks, merged):
            for parameter, target in zip(network.parameters(), whole.parameters()):
                parameter.lerp_(target, 0.5)
    half = DiffusersBackbone(
        *networks, folder.descriptor(generator), generator.prompt_embedding, torch.device("cpu"), torch.float32
    )
    expected = upscale(half, outcome.results["picture"].movedim(-1, 1), SETTINGS)
    assert_same(outcome.results["upscale half"].movedim(-1, 1), expected)
    assert float((outcome.results["upscale half"] - outcome.results["upscale"]).abs().max()) > 0.01


def test_adapter_agrees_with_diffusers(outcome):
    picture, hint = outcome.results["picture"], outcome.results["hint"].movedim(-1, 1)
    large = torch.nn.functional.interpolate(hint, (200, 244), mode="nearest-exact")
    large = pad_to_multiple(large, 16)

    def features(boxes):
        crops = [large[:, :, box.slices(8)[0], box.slices(8)[1]] for box in boxes]
        return [0.7 * level for level in outcome.adapter(torch.cat(crops))]

    pair = torch.cat([picture, picture.flip(1)]).movedim(-1, 1)
    expected = upscale(library(outcome), pair, SETTINGS, features=features)
    assert_same(outcome.results["upscale adapter"].movedim(-1, 1), expected)
    without = upscale(library(outcome), pair, SETTINGS)
    assert float((expected - without).abs().max()) > 0.01  # the condition does act
    assert outcome.report["adapter class"] == "T2IAdapter"


def test_core_would_misread_the_adapter(outcome):
    """The reason for ICMSR_LoadAdapter: core takes 4 channels at 8 for 1 channel at 16, without a word."""
    assert outcome.report["core's adapter"] == [1, 16, 4]
    assert outcome.report["our adapter"] == [4, 8, 4]


def test_tiles_may_run_together(outcome):
    assert outcome.report["batched tiles"] < TOLERANCE


def test_user_lora_acts_before_and_after_both_sets(outcome):
    assert_same(outcome.results["two sets, lora before"], outcome.results["two sets, lora after"])
    assert outcome.report["lora survives both sets"] > 0.01


def test_user_lora_acts_before_and_after_the_generator(outcome):
    assert outcome.report["lora survives"] > 0.01
    assert_same(outcome.results["lora before"], outcome.results["lora after"])


def test_conditioning_replaces_the_embedding(outcome):
    assert outcome.report["same conditioning"] == 0
    assert outcome.report["other conditioning"] > 1e-3


def test_out_of_memory_goes_on_with_smaller_tiles(outcome):
    expected = upscale(
        library(outcome), outcome.results["picture"].movedim(-1, 1), UpscaleSettings(tile=128, overlap=32)
    )
    assert outcome.report["attempts"][0] > 16 >= outcome.report["attempts"][1]
    assert_same(outcome.results["after oom"].movedim(-1, 1), expected)
    assert outcome.report["errors"]["out of memory"] is None
    assert "always" in outcome.report["errors"]["always out of memory"]


def test_the_card_of_each_network_is_the_current_one_until_the_next(outcome):
    """Encoder, UNet, decoder: each is left before the next, and the last one at the end."""
    cards = outcome.report["cards"]
    assert len(cards) >= 6
    assert cards == ["cpu", "left"] * (len(cards) // 2)


def test_no_file_of_weights_stays_mapped(outcome):
    """Or nobody could replace it, or update the pack, while ComfyUI runs under Windows."""
    assert [name for name in outcome.report["mapped"] if not name.endswith("/inputs.safetensors")] == []


def test_nodes_run_without_diffusers(outcome):
    assert outcome.report["modules"] == []


def test_the_bare_base_has_no_fidelity(outcome):
    assert outcome.report["errors"]["bare base at any fidelity"] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no generator", "ICM-SR Apply Generator"),
        ("second generator", "already carries the generator 'a.safetensors'"),
        ("base's vae", "changes the VAE too: connect the VAE output of the same node"),
        ("other vae", "4 latent channels, the MODEL takes 12"),
        ("surplus", "base model: unet.conv_in.wrong [3] (no such parameter)"),
        ("surplus above", "base model: realistic.unet.conv_in.wrong [3] (no such parameter)"),
        ("fidelity of one set", "faithful and a realistic set of weights, this one holds a single set"),
        ("fidelity of the embedded", "nano (embedded): fidelity needs a generator with a faithful and a realistic set"),
        ("fidelity beyond", "fidelity must be a number from 0 to 2, got 2.5"),
        ("other shape", "conv_in.weight [64, 12, 3, 3] (the base has [64, 4, 3, 3])"),
        ("conditioning", "768 values per token, this MODEL takes 32"),
        ("control_net alone", "control_net is connected but hint is not"),
        ("hint of 3 channels", "hint has 3 channels, this control_net takes 4"),
        ("hint batch", "hint must hold 1 picture"),
        ("adapter of another family", "choose an adapter made for this MODEL"),
        ("no adapter", "not a T2I-Adapter, full or light: found "),
        ("a controlnet", "must be a T2I-Adapter, got a ControlNet: take it from ICM-SR Load Adapter"),
        ("tile", "try 128"),
        ("integers", "image: holds uint8 values, an IMAGE has floating-point values from 0 to 1"),
        ("integers as hint", "hint: holds uint8 values"),
        ("integers to extract", "image: holds uint8 values"),
        ("integers to inspect", "image: holds uint8 values"),
        ("no picture", "image: holds no picture ([0, 50, 61, 3])"),
        ("a mask", "image: must be an IMAGE [pictures, height, width, 3 or 4 channels], got [1, 50, 61]"),
        ("a number as model", "model: must be a MODEL, got float: connect a node's MODEL output"),
        ("a number as vae", "vae: must be a VAE, got float"),
        ("a number as clip", "clip: must be a CLIP, got int"),
        ("a number as mask", "mask: must be a MASK, got float"),
        ("a text as vae", "vae: must be a VAE, got str"),
        ("empty conditioning", "the conditioning is empty: connect CLIP Text Encode"),
        ("two prompts", "the conditioning holds 2 prompts, the one step takes one"),
        ("a masked prompt", "the conditioning holds a mask, which the one step cannot use"),
        (
            "a weak prompt with a net",
            "an adapter from ICM-SR Load Adapter), a strength, which",
        ),
        ("an early prompt", "holds a range of steps, which"),
        ("nan in the unet", "the UNet gave NaN"),
        ("base with a missing tensor", "out.2.bias is missing"),
    ],
)
def test_refusals_say_what_to_do(outcome, name, words):
    message = outcome.report["errors"][name]
    assert message is not None
    assert message.startswith("IcmsrError: ")
    assert words in message
    assert "\n" not in message


def test_a_fourth_channel_is_kept_and_hidden_colours_do_not_matter(outcome):
    results = outcome.results
    opaque = results["upscale opaque"]
    assert opaque.shape[-1] == 4
    assert torch.equal(opaque[..., :3], results["upscale"])
    assert float((opaque[..., 3] - 1).abs().max()) < 1e-6
    hidden = results["upscale hidden"]
    assert torch.equal(hidden, results["upscale hidden too"])
    assert float(hidden[:, :70, :70, 3].max()) == 0
    assert float(hidden[:, 90:, 90:, 3].min()) > 1 - 1e-6


def test_a_prompt_with_neutral_options_is_taken(outcome):
    assert outcome.report["errors"]["a neutral prompt"] is None
