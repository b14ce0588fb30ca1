"""Generators merged into a base's networks, with peft's own merge as the reference."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import Generator, LoraPair, PartWeights, load_generator, save_generator
from tests.support.merging import merged_part, merged_set


def with_peft(network: torch.nn.Module, targets: list[str], alpha: float, seed: int = 0) -> tuple[Any, PartWeights]:
    """`network` wrapped by peft with random A and B, and the same matrices as our `PartWeights`."""
    wrapped = get_peft_model(network, LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(wrapped).items()}
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    pairs = {name: LoraPair(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in modules}
    return wrapped, PartWeights(lora=pairs)


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_unet_merge_equals_pefts(small_base: Path, alpha: float) -> None:
    unet, _ = build_networks(open_base(small_base))
    original = {key: value.clone() for key, value in unet.state_dict().items()}
    targets = ["to_q", "to_out.0", "conv1", "conv_in", "conv_shortcut", "proj_in", "ff.net.0.proj"]
    wrapped, weights = with_peft(unet, targets, alpha)
    kinds = {original[f"{name}.weight"].ndim for name in weights.lora}
    assert kinds == {2, 4}
    assert any(original[f"{name}.weight"].shape[-1] == 1 for name in weights.lora if "conv_shortcut" in name)
    merged = merged_set(weights, original, alpha)
    assert merged.keys() == {f"{name}.weight" for name in weights.lora}

    random = torch.Generator().manual_seed(3)
    latent, context = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 1, 32, generator=random)
    with torch.no_grad():
        live = wrapped(latent, 200, encoder_hidden_states=context).sample
        theirs = wrapped.merge_and_unload()
        for key, value in theirs.state_dict().items():
            expected = merged.get(key, original[key])
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=key)
        ours, _ = build_networks(open_base(small_base))
        before = ours(latent, 200, encoder_hidden_states=context).sample
        ours.load_state_dict({**original, **merged})
        output = ours(latent, 200, encoder_hidden_states=context).sample
    scale = live.abs().max()
    assert (output - live).abs().max() < 1e-5 * scale
    assert (output - before).abs().max() > 1e-2 * scale


def test_vae_merge_equals_pefts(small_base: Path) -> None:
    _, vae = build_networks(open_base(small_base))
    original = {key: value.clone() for key, value in vae.state_dict().items()}
    wrapped, weights = with_peft(vae, ["conv1", "conv_in", "quant_conv", "conv"], 2.0)
    merged = merged_set(weights, original, 2.0)
    for key, value in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, merged.get(key, original[key]), rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_moves_along_a_line(small_base: Path, generator: Generator, strength: float) -> None:
    state = open_base(small_base).unet_state()
    merged = merged_set(generator.unet, state, 8.0, strength)
    assert merged.keys() == {f"{name}.weight" for name in generator.unet.lora} | set(generator.unet.tensors)
    for name, pair in generator.unet.lora.items():
        start = state[f"{name}.weight"]
        delta = torch.einsum("or...,ri...->oi...", pair.up.double(), pair.down.double())
        expected = start.double() + strength * 8.0 / 4 * delta
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)
    for name, new in generator.unet.tensors.items():
        expected = (1 - strength) * state[name] + strength * new
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    if strength == 0:
        assert all(torch.equal(value, state[key]) for key, value in merged.items())
    if strength == 1:
        assert all(torch.equal(merged[key], new) for key, new in generator.unet.tensors.items())


@pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_both_sets_in_float64(small_base: Path, two_sets: Generator, part: str, fidelity: float) -> None:
    folder = open_base(small_base)
    state = folder.unet_state() if part == "unet" else folder.vae_state()
    faithful, realistic = two_sets.sets(part)
    changed = set()
    expected = {name: tensor.double() for name, tensor in state.items()}
    for weights, rank, alpha, amount in ((faithful, 4, 4.0, 1.0), (realistic, 2, 3.0, fidelity)):
        for name, new in weights.tensors.items():
            expected[name] = expected[name] + amount * (new.double() - expected[name])
            changed.add(name)
        for module, pair in weights.lora.items():
            assert pair.down.shape[0] == rank
            delta = torch.einsum("or...,ri...->oi...", pair.up.double(), pair.down.double())
            expected[f"{module}.weight"] = expected[f"{module}.weight"] + amount * alpha / rank * delta
            changed.add(f"{module}.weight")
    merged = merged_part(two_sets.at_fidelity(fidelity), part, state)
    assert merged.keys() <= changed
    for name in changed:
        value = merged.get(name, state[name].float())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6, msg=name)
    if fidelity == 0:
        alone = merged_set(faithful, state, 4.0)
        assert merged.keys() == alone.keys()
        assert all(torch.equal(merged[name], alone[name]) for name in alone)
    elif fidelity == 1:
        whole = [name for name in realistic.tensors if name.removesuffix(".weight") not in realistic.lora]
        assert whole
        assert all(torch.equal(merged[name], realistic.tensors[name]) for name in whole)
        default = merged_part(two_sets, part, state)
        assert all(torch.equal(merged[name], default[name]) for name in merged)


def test_fidelity_zero_is_the_faithful_file_bit_for_bit(tmp_path, two_sets: Generator, small_base: Path) -> None:
    save_generator(tmp_path / "two.safetensors", two_sets)
    save_generator(tmp_path / "one.safetensors", replace(two_sets, realistic={}))
    one = load_backbone(Recipe(small_base, tmp_path / "one.safetensors"))
    faithful, default, realistic = (
        load_backbone(Recipe(small_base, tmp_path / "two.safetensors", fidelity=fidelity))
        for fidelity in (0.0, None, 1.0)
    )
    for part in ("unet", "vae"):
        states = [getattr(backbone, part).state_dict() for backbone in (one, faithful, default, realistic)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert all(torch.equal(value, states[3][name]) for name, value in states[2].items())
        assert sum(not torch.equal(value, states[2][name]) for name, value in states[0].items()) >= 4


@pytest.mark.parametrize("fidelity", [-0.05, 2.05, float("nan"), float("inf")])
def test_a_fidelity_out_of_range_is_refused(small_base: Path, two_sets: Generator, fidelity: float) -> None:
    with pytest.raises(IcmsrError, match=f"fidelity must be a number from 0 to 2, got {fidelity}"):
        load_backbone(Recipe(small_base, two_sets, fidelity=fidelity))
    with pytest.raises(IcmsrError, match="fidelity must be a number"):
        two_sets.at_fidelity(fidelity)


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_fidelity_needs_two_sets(small_base: Path, generator: Generator, fidelity: float, monkeypatch) -> None:
    monkeypatch.setattr("icmsr_core.runtime.ingredients.open_base", lambda *_: pytest.fail("a base was opened"))
    words = "needs a generator with a faithful and a realistic set of weights, this one holds a single set"
    for held in (generator, None):
        with pytest.raises(IcmsrError, match=rf"{words}: omit fidelity .*, got {fidelity:g}"):
            load_backbone(Recipe(small_base, held, fidelity=fidelity))


def test_a_generator_is_merged_at_the_fidelity_of_its_file_until_another_is_chosen(two_sets: Generator) -> None:
    own = replace(two_sets, info=replace(two_sets.info, realistic_default=0.25))
    assert own.fidelity == 0.25
    chosen = own.at_fidelity(1.5)
    assert (chosen.fidelity, own.fidelity) == (1.5, 0.25)
    assert chosen.at_fidelity(None).fidelity == 0.25


def test_the_faithful_generator_has_no_second_set(two_sets: Generator) -> None:
    alone = two_sets.at_fidelity(2.0).faithful()
    assert not alone.has_two_sets
    for part in ("unet", "vae"):
        assert alone.sets(part) == (two_sets.sets(part)[0], PartWeights())
    with pytest.raises(IcmsrError, match="holds a single set"):
        alone.at_fidelity(1.0)


def test_a_generator_is_called_by_its_file_in_errors(tmp_path, small_base: Path, generator: Generator) -> None:
    path = tmp_path / "some name.safetensors"
    save_generator(path, replace(generator, unet=PartWeights(tensors={"attic": torch.ones(1)})))
    for name, called in (("", str(path)), ("mine", "mine")):
        loaded = load_generator(path, name)
        assert loaded.name == called
        with pytest.raises(IcmsrError, match=f"^{re.escape(called)}: the generator does not fit this base model"):
            build_networks(open_base(small_base), generator=loaded)
        with pytest.raises(IcmsrError, match=f"^{re.escape(called)}: fidelity needs a generator with a faithful"):
            loaded.at_fidelity(0.5)


def test_an_unknown_part_of_the_second_set_is_refused(generator: Generator) -> None:
    with pytest.raises(IcmsrError, match="the realistic set has the parts unet and vae, got text"):
        replace(generator, realistic={"text": PartWeights()})


def test_lora_is_added_to_a_tensor_that_is_also_replaced(generator: Generator) -> None:
    state = {"a.weight": torch.zeros(2, 3)}
    pair = LoraPair(torch.ones(1, 3), torch.ones(2, 1))
    weights = PartWeights({"a": pair}, {"a.weight": torch.full((2, 3), 5.0)})
    assert merged_set(weights, state, 2.0)["a.weight"].unique().tolist() == [7]
    assert merged_set(weights, state, 2.0, 0.5)["a.weight"].unique().tolist() == [3.5]
    assert state["a.weight"].abs().max() == 0, "the base is left alone"
    assert weights.tensors["a.weight"].unique().tolist() == [5], "and so is the generator"


def test_merging_is_done_in_float32() -> None:
    """A small update of a float16 base would be lost if it were added in float16."""
    state = {"a.weight": torch.ones(1, 1, dtype=torch.float16)}
    tiny = PartWeights({"a": LoraPair(torch.full((1, 1), 1e-2).half(), torch.full((1, 1), 1e-2).half())})
    merged = merged_set(tiny, state, 1.0)["a.weight"]
    assert merged.dtype == torch.float32
    assert merged.item() == pytest.approx(1.0001, abs=1e-6)


def test_load_backbone_merges_both_networks(tmp_path, small_base: Path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator, torch.float32)
    backbone = load_backbone(Recipe(small_base, path))
    folder = open_base(small_base)
    for network, part, state in (
        (backbone.unet, generator.unet, folder.unet_state()),
        (backbone.vae, generator.vae, folder.vae_state()),
    ):
        expected = {**state, **merged_set(part, state, 4.0)}
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    assert backbone.descriptor.timestep == 200
    assert backbone.descriptor.prediction == "residual"
    assert backbone.descriptor.latent_factor == 2
    assert backbone.descriptor.multiple_of == 4
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())
