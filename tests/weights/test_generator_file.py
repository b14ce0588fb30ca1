"""Generator files and base folders: round trips, peft's own merge as the reference, and every rejection."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.cli.inspection import file_report
from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.bases import NetworkConfig
from icmsr_core.weights.base import BaseInfo, open_base, write_base_info
from icmsr_core.weights.embedded import embedded_generator
from icmsr_core.weights.generator_file import (
    Generator,
    GeneratorInfo,
    LoraPair,
    PartWeights,
    holds_two_sets,
    load_generator,
    save_generator,
)
from icmsr_core.weights.tensor_files import write_tensors
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.merging import merged_part, merged_set
from tests.support.model_files import random_generator, write_base

TINY = NetworkConfig(latent_channels=4, vae_channels=(32, 32), unet_channels=(32, 32))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base", TINY)


@pytest.fixture
def generator(base) -> Generator:
    return random_generator(base)


@pytest.fixture
def two_sets(base) -> Generator:
    return random_generator(base, two_sets=True)


def flat(generator: Generator) -> dict[str, torch.Tensor]:
    tensors = {"prompt_embedding": generator.prompt_embedding}
    realistic = [(f"realistic.{part}", weights) for part, weights in generator.realistic.items()]
    for part, weights in (("unet", generator.unet), ("vae", generator.vae), *realistic):
        for module, pair in weights.lora.items():
            tensors[f"{part}.{module}.A"], tensors[f"{part}.{module}.B"] = pair
        tensors |= {f"{part}.{name}": tensor for name, tensor in weights.tensors.items()}
    return tensors


# --- round trip ------------------------------------------------------------------------------------------------------


def test_float32_round_trip_is_bitwise(tmp_path, generator: Generator) -> None:
    path = tmp_path / "deep" / "folder" / "generator.safetensors"
    info = replace(generator.info, training={"lr": 0.1, "steps": 3, "data": {"folders": ["a"]}}, base_hash="ab")
    generator = replace(generator, info=info)
    save_generator(path, generator, torch.float32)
    loaded = load_generator(path)
    assert loaded.info == info
    old, new = flat(generator), flat(loaded)
    assert old.keys() == new.keys()
    assert len(loaded.unet.lora) > 10
    assert len(loaded.unet.tensors) == 2
    assert len(loaded.vae.lora) > 5
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_files_are_written_in_float16_unless_told_otherwise(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    old, new = flat(generator), flat(load_generator(path))
    assert old.keys() == new.keys()
    for key in old:
        assert new[key].dtype == torch.float16
        torch.testing.assert_close(new[key].float(), old[key], rtol=6e-4, atol=1e-7)
    save_generator(tmp_path / "full.safetensors", generator, torch.float32)
    assert path.stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size


def test_the_file_keeps_its_tensor_names_and_its_description(tmp_path, generator: Generator) -> None:
    """The contract with other readers: names of tensors and the description in the metadata."""
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    with safe_open(str(path), framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for key in (f"{attention}.lora_A.weight", f"{attention}.lora_B.weight", "unet.conv_in.weight", "prompt_embedding"):
        assert key in keys
    assert metadata["format"] == "icmsr-generator"
    description = json.loads(metadata["icmsr"])
    assert description["family"] == "nano"
    assert description["timestep"] == 200
    assert description["prediction"] == "residual"
    assert description["format_version"] == 1
    assert len(description["base_hash"]) == 64
    assert description.keys() == {
        "family",
        "timestep",
        "prediction",
        "base",
        "base_hash",
        "rank",
        "alpha",
        "licence",
        "training",
        "format_version",
    }  # as the first release wrote it: no word of a second set
    assert not holds_two_sets(path)


def test_the_embedded_file_is_written_again_as_it_is(tmp_path) -> None:
    """Files that are out keep their bytes, whatever this version can do beyond them."""
    save_generator(tmp_path / "again.safetensors", load_generator(embedded_generator()))
    old, new = embedded_generator().read_bytes(), (tmp_path / "again.safetensors").read_bytes()
    data = 8 + int.from_bytes(old[:8], "little")
    assert json.loads(new[8:data]) == json.loads(old[8:data])  # the order within the metadata is safetensors' own
    assert new[:8] == old[:8]
    assert new[data:] == old[data:]


def test_two_sets_round_trip(tmp_path, two_sets: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    # What made it does not know the version of the layout: the weights decide it.
    save_generator(path, replace(two_sets, info=replace(two_sets.info, format_version=1)), torch.float32)
    assert holds_two_sets(path)
    loaded = load_generator(path)
    assert loaded.info == two_sets.info
    assert (loaded.info.realistic_rank, loaded.info.realistic_alpha) == (2, 3.0)
    assert loaded.info.realistic_training == {"loss": "icm"}
    assert loaded.has_two_sets
    old, new = flat(two_sets), flat(loaded)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    with safe_open(str(path), framework="pt") as file:
        keys, description = set(file.keys()), json.loads(file.metadata()["icmsr"])
    assert {
        "unet.conv_in.weight",
        "realistic.unet.conv_in.weight",
        "realistic.unet.conv_in.lora_A.weight",
        "realistic.vae.quant_conv.lora_B.weight",
        "vae.quant_conv.lora_B.weight",
    } <= keys
    assert description["format_version"] == 2
    assert description["realistic_alpha"] == 3.0
    assert "realistic_default" not in description  # files of before it was there are read the same


def test_a_file_says_its_own_fidelity(tmp_path, two_sets: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    for value in (0.0, 0.25, 2.0):
        save_generator(path, replace(two_sets, info=replace(two_sets.info, realistic_default=value)))
        info = load_generator(path).info
        assert info.realistic_default == value
        assert f"; default {value:g}" in file_report(path)
    for value in (-0.1, 2.5):
        save_generator(path, replace(two_sets, info=replace(two_sets.info, realistic_default=value)))
        with pytest.raises(IcmsrError, match=f"realistic_default in its description must be from 0 to 2, got {value}"):
            load_generator(path)


def test_an_empty_second_set_is_none(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, replace(generator, realistic={"unet": PartWeights(), "vae": PartWeights()}))
    loaded = load_generator(path)
    assert (loaded.info.format_version, loaded.realistic) == (1, {})


def test_a_second_set_for_one_network(tmp_path, two_sets: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, replace(two_sets, realistic={"vae": two_sets.realistic["vae"]}))
    loaded = load_generator(path)
    assert loaded.has_two_sets
    assert not loaded.sets("unet")[1]
    assert loaded.sets("vae")[1].lora


def test_inspection_tells_both_sets(tmp_path, two_sets: Generator, generator: Generator) -> None:
    def shown(held: Generator) -> dict[str, str]:
        save_generator(tmp_path / "generator.safetensors", held)
        lines = file_report(tmp_path / "generator.safetensors").splitlines()
        return dict(re.split(" {2,}", line, maxsplit=1) for line in lines)

    rows = shown(two_sets)
    assert rows["kind"] == "generator file, format version 2"
    assert "faithful" in rows["fidelity"]
    assert rows["faithful LoRA"] == "rank 4, alpha 4"
    assert rows["realistic LoRA"] == "rank 2, alpha 3"
    assert rows["realistic unet"].startswith("5 replaced tensors")
    assert "LoRA on 5 modules" in rows["realistic unet"]
    assert "LoRA on 2 modules" in rows["realistic vae"]
    assert rows["realistic training"] == '{"loss": "icm"}'
    rows = shown(generator)
    assert {"unet", "vae", "LoRA"} <= rows.keys()
    assert not [name for name in rows if "realistic" in name or name == "fidelity"]


def test_a_generator_may_have_neither_lora_nor_embedding(tmp_path) -> None:
    path = tmp_path / "generator.safetensors"
    weights = PartWeights(tensors={"a": torch.ones(2)})
    save_generator(path, Generator(GeneratorInfo("nano", 0, "eps"), weights, PartWeights()))
    loaded = load_generator(path)
    assert loaded.prompt_embedding is None
    assert loaded.info.rank == 0
    assert not loaded.vae
    assert loaded.unet.tensors["a"].tolist() == [1, 1]


def test_unknown_keys_of_the_description_are_left_out(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    rewrite(path, description=lambda values: values | {"colour": "blue"})
    assert load_generator(path).info == replace(generator.info, training={})


# --- merging ---------------------------------------------------------------------------------------------------------


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
def test_unet_merge_equals_pefts(base: Path, alpha: float) -> None:
    unet, _ = build_networks(open_base(base))
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
        ours, _ = build_networks(open_base(base))
        before = ours(latent, 200, encoder_hidden_states=context).sample
        ours.load_state_dict({**original, **merged})
        output = ours(latent, 200, encoder_hidden_states=context).sample
    scale = live.abs().max()
    assert (output - live).abs().max() < 1e-5 * scale
    assert (output - before).abs().max() > 1e-2 * scale


def test_vae_merge_equals_pefts(base: Path) -> None:
    _, vae = build_networks(open_base(base))
    original = {key: value.clone() for key, value in vae.state_dict().items()}
    wrapped, weights = with_peft(vae, ["conv1", "conv_in", "quant_conv", "conv"], 2.0)
    merged = merged_set(weights, original, 2.0)
    for key, value in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, merged.get(key, original[key]), rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_moves_along_a_line(base: Path, generator: Generator, strength: float) -> None:
    state = open_base(base).unet_state()
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
def test_both_sets_in_float64(base: Path, two_sets: Generator, part: str, fidelity: float) -> None:
    folder = open_base(base)
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


def test_fidelity_zero_is_the_faithful_file_bit_for_bit(tmp_path, two_sets: Generator, base: Path) -> None:
    save_generator(tmp_path / "two.safetensors", two_sets)
    save_generator(tmp_path / "one.safetensors", replace(two_sets, realistic={}))
    one = load_backbone(Recipe(base, tmp_path / "one.safetensors"))
    faithful, default, realistic = (
        load_backbone(Recipe(base, tmp_path / "two.safetensors", fidelity=fidelity)) for fidelity in (0.0, None, 1.0)
    )
    for part in ("unet", "vae"):
        states = [getattr(backbone, part).state_dict() for backbone in (one, faithful, default, realistic)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert all(torch.equal(value, states[3][name]) for name, value in states[2].items())
        assert sum(not torch.equal(value, states[2][name]) for name, value in states[0].items()) >= 4


@pytest.mark.parametrize("fidelity", [-0.05, 2.05, float("nan"), float("inf")])
def test_a_fidelity_out_of_range_is_refused(base: Path, two_sets: Generator, fidelity: float) -> None:
    with pytest.raises(IcmsrError, match=f"fidelity must be a number from 0 to 2, got {fidelity}"):
        load_backbone(Recipe(base, two_sets, fidelity=fidelity))
    with pytest.raises(IcmsrError, match="fidelity must be a number"):
        two_sets.at_fidelity(fidelity)


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_fidelity_needs_two_sets(base: Path, generator: Generator, fidelity: float, monkeypatch) -> None:
    monkeypatch.setattr("icmsr_core.runtime.ingredients.open_base", lambda *_: pytest.fail("a base was opened"))
    words = "needs a generator with a faithful and a realistic set of weights, this one holds a single set"
    for held in (generator, None):
        with pytest.raises(IcmsrError, match=rf"{words}: omit fidelity .*, got {fidelity:g}"):
            load_backbone(Recipe(base, held, fidelity=fidelity))


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


def test_a_generator_is_called_by_its_file_in_errors(tmp_path, base: Path, generator: Generator) -> None:
    path = tmp_path / "some name.safetensors"
    save_generator(path, replace(generator, unet=PartWeights(tensors={"attic": torch.ones(1)})))
    for name, called in (("", str(path)), ("mine", "mine")):
        loaded = load_generator(path, name)
        assert loaded.name == called
        with pytest.raises(IcmsrError, match=f"^{re.escape(called)}: the generator does not fit this base model"):
            build_networks(open_base(base), generator=loaded)
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


def test_load_backbone_merges_both_networks(tmp_path, base: Path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator, torch.float32)
    backbone = load_backbone(Recipe(base, path))
    folder = open_base(base)
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


# --- rejections ------------------------------------------------------------------------------------------------------


def rewrite(
    path: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    metadata: dict[str, str] | None = None,
    description: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Changes a generator file by hand."""
    with safe_open(str(path), framework="pt") as file:
        old = dict(file.metadata())
    content = load_file(path)
    if tensors is not None:
        tensors(content)
    if description is not None:
        old["icmsr"] = json.dumps(description(json.loads(old["icmsr"])))
    save_file(content, path, metadata={**old, **(metadata or {})})


LORA = "unet.mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"metadata": {"format": "pt"}}, r"not an ICM-SR generator file \(.*its format is 'pt', expected 'icmsr-gen"),
        ({"metadata": {"icmsr": "{"}}, "its description cannot be read as JSON .*: download or export it again"),
        ({"metadata": {"icmsr": "[1, 2]"}}, "its description must be a JSON object, got list"),
        ({"description": lambda values: values | {"format_version": 3}}, "format version 3, .* reads 1 and 2: upd"),
        ({"description": lambda values: {"format_version": 7, "new": 1}}, "format version 7"),
        ({"description": lambda values: {"timestep": 1, "prediction": "eps"}}, "cannot be read .*'family'"),
        ({"description": lambda values: values | {"prediction": "x"}}, "one of eps, v, residual, got 'x'"),
        ({"description": lambda values: values | {"prediction": ["eps"]}}, r"prediction .* got \['eps'\]"),
        ({"description": lambda values: values | {"timestep": "200"}}, "timestep .* must be a int, got '200'"),
        ({"description": lambda values: values | {"timestep": True}}, "timestep .* got True"),
        ({"description": lambda values: values | {"rank": None}}, "rank in its description must be a int, got None"),
        (
            {"description": lambda values: values | {"rank": 0}},
            "holds LoRA matrices, but its description gives the rank 0",
        ),
        ({"description": lambda values: values | {"alpha": float("nan")}}, "alpha .* must be a float, got nan"),
        ({"description": lambda values: values | {"training": "none"}}, "training in its description"),
        ({"tensors": lambda held: held[f"{LORA}.lora_A.weight"].fill_(float("nan"))}, rf"NaN .*{LORA}\.lora_A"),
        ({"tensors": lambda held: held["unet.conv_in.bias"].fill_(float("inf"))}, r"infinite .*unet\.conv_in\.bias"),
        ({"tensors": lambda held: held["prompt_embedding"].fill_(float("nan"))}, "NaN .*prompt_embedding"),
        ({"tensors": lambda held: held.pop(f"{LORA}.lora_A.weight")}, rf"missing tensor {LORA}\.lora_A\.weight"),
        ({"tensors": lambda held: held.pop(f"{LORA}.lora_B.weight")}, rf"missing tensor {LORA}\.lora_B\.weight"),
        ({"tensors": lambda held: held.update(optimizer=torch.ones(1))}, "unexpected tensors optimizer"),
        ({"tensors": lambda held: held.update({"text.a": torch.ones(1)})}, r"unexpected tensors text\.a"),
        ({"tensors": lambda held: held.update(unet=torch.ones(1))}, "unexpected tensors unet"),
        ({"tensors": lambda held: held.clear()}, "the file holds no weights"),
        (
            {"tensors": lambda held: held.update({"realistic.unet.a": torch.ones(1)})},
            r"unexpected tensors realistic\.unet\.a: keys must begin with unet\. or vae\.",
        ),
        ({"description": lambda values: values | {"format_version": 2}}, "the realistic set holds no weights"),
        ({"tensors": lambda held: held.update({f"{LORA}.lora_B.weight": torch.ones(32, 5, 1, 1)})}, "do not multiply"),
        ({"tensors": lambda held: held.update({f"{LORA}.lora_B.weight": torch.ones(32, 4)})}, "do not multiply"),
        ({"tensors": lambda held: held.update({f"{LORA}.lora_B.weight": torch.ones(32, 4, 3, 3)})}, "do not multiply"),
        (
            {
                "tensors": lambda held: held.update(
                    {f"{LORA}.lora_A.weight": torch.ones(0, 32, 3, 3), f"{LORA}.lora_B.weight": torch.ones(32, 0, 1, 1)}
                )
            },
            "do not multiply",
        ),
        ({"tensors": lambda held: held.update(prompt_embedding=torch.ones(1, 1, 32))}, r"width\], got \(1, 1"),
    ],
)
def test_damaged_contents_are_refused_by_name(
    tmp_path, generator: Generator, change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "some name.safetensors"
    save_generator(path, generator)
    load_generator(path)
    rewrite(path, **change)
    with pytest.raises(IcmsrError, match=text) as caught:
        load_generator(path)
    if "one of" not in str(caught.value):
        assert "some name.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


SECOND = "realistic.unet.mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"description": lambda values: values | {"realistic_rank": 0}}, "the realistic set holds LoRA .* the rank 0"),
        ({"description": lambda values: values | {"realistic_rank": "2"}}, "realistic_rank .* must be a int, got '2'"),
        ({"description": lambda values: values | {"realistic_alpha": float("inf")}}, "realistic_alpha .* got inf"),
        ({"description": lambda values: values | {"realistic_training": []}}, "realistic_training in its description"),
        (
            {"description": lambda values: values | {"format_version": 1}},
            r"unexpected tensors realistic\..* and \d+ more",
        ),
        ({"description": lambda values: values | {"rank": 0}}, "the faithful set holds LoRA .* the rank 0"),
        ({"tensors": lambda held: held[f"{SECOND}.lora_A.weight"].fill_(float("nan"))}, rf"NaN .*{SECOND}\.lora_A"),
        (
            {"tensors": lambda held: held["realistic.vae.decoder.conv_in.bias"].fill_(float("inf"))},
            r"infinite .*realistic\.vae\.decoder\.conv_in\.bias",
        ),
        ({"tensors": lambda held: held.pop(f"{SECOND}.lora_A.weight")}, rf"missing tensor {SECOND}\.lora_A\.weight"),
        ({"tensors": lambda held: held.pop(f"{SECOND}.lora_B.weight")}, rf"missing tensor {SECOND}\.lora_B\.weight"),
        (
            {"tensors": lambda held: held.update({f"{SECOND}.lora_B.weight": torch.ones(32, 5, 1, 1)})},
            rf"{SECOND}: LoRA matrices .* do not multiply",
        ),
        (
            {"tensors": lambda held: held.update({"realistic.text.a": torch.ones(1)})},
            r"unexpected tensors realistic\.text\.a: keys must begin with unet\., vae\., realistic\.unet\. or",
        ),
        (
            {"tensors": lambda held: [held.pop(key) for key in list(held) if key.startswith("realistic")]},
            r"the realistic set holds no weights \(realistic\.unet\. or realistic\.vae\.\)",
        ),
        (
            {"tensors": lambda held: [held.pop(key) for key in list(held) if key.startswith(("unet", "vae"))]},
            "the faithful set holds no weights",
        ),
    ],
)
def test_damaged_second_sets_are_refused_by_name(
    tmp_path, two_sets: Generator, change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "some name.safetensors"
    save_generator(path, two_sets)
    load_generator(path)
    rewrite(path, **change)
    with pytest.raises(IcmsrError, match=f"some name.safetensors.*{text}"):
        load_generator(path)


def test_files_that_are_not_safetensors_are_refused(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"this is a text file\n" * 50, b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(IcmsrError, match=r"not a readable .safetensors file .*: download or export it again"):
            load_generator(path)
        with pytest.raises(IcmsrError, match=r"not a readable .safetensors file"):
            holds_two_sets(path)
    with pytest.raises(IcmsrError, match=r"missing\.safetensors: no such file"):
        load_generator(tmp_path / "missing.safetensors")
    with pytest.raises(IcmsrError, match=r"is a folder: name the \.safetensors file"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "pickle",
            r"\(a pickle, which can run code .* no code in it was run\): choose the \.safetensors .*`icmsr import`",
        ),
        ("old pickle", r"\(a pickle, which can run code .* no code in it was run\): choose the \.safetensors"),
        ("pointer", r"\(a Git LFS pointer in the file's place\): fetch the file itself with `git lfs pull`"),
        ("page", r"\(a web page in the file's place\): download the file itself"),
        ("lora", r"\(a LoRA; its format .*\): a one-step model's LoRA becomes one with `icmsr import lora`"),
        ("checkpoint", r"\(a checkpoint; .*\): it can be the base"),
        ("adapter", r"\(a T2I-Adapter; .*\): it goes into ICM-SR Load Adapter"),
        ("vae", r"\(a VAE alone; .*\): foreign weights go through `icmsr import`"),
        ("unknown", r"generator file \(its format is 'not stated', expected 'icmsr-generator'\): foreign weights"),
    ],
)
def test_what_lies_in_a_generator_s_place_is_named(tmp_path, kind: str, text: str) -> None:
    path, mark = tmp_path / "model.safetensors", tmp_path / "ran"
    keys = {
        "lora": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "checkpoint": "model.diffusion_model.out.2.weight",
        "adapter": "body.0.block1.weight",
        "vae": "decoder.conv_in.weight",
        "unknown": "a",
    }
    if kind in keys:
        save_file({keys[kind]: torch.zeros(1)}, path)
    elif "pickle" in kind:
        torch.save({"a": HostileValue(mark)}, path, _use_new_zipfile_serialization=kind == "pickle")
        assert_runs_code(path, mark)
    else:
        page = "<!DOCTYPE html><html><body>Not found</body></html>"
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4265146304\n"
        path.write_text(page if kind == "page" else pointer)
    for read in (load_generator, holds_two_sets):
        with pytest.raises(IcmsrError, match=rf"model\.safetensors: not .*{text}") as refused:
            read(path)
        assert "\n" not in str(refused.value)
    assert not mark.exists()


def test_values_that_leave_float16_are_not_written(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    weights = PartWeights(tensors={"conv_in.bias": torch.tensor([1.0, 7e4])})
    large = replace(generator, unet=weights)
    with pytest.raises(IcmsrError, match=r"generator\.safetensors: NaN or infinite values in unet\.conv_in\.bias"):
        save_generator(path, large)
    assert list(tmp_path.iterdir()) == []
    save_generator(path, large, torch.float32)


@pytest.mark.parametrize(
    ("lora", "tensors", "text"),
    [
        ({"attic.stairs": ((4, 32), (32, 4))}, {}, r"attic\.stairs\.weight \[32, 32\] \(no such parameter\)"),
        ({}, {"attic.door": (3,)}, r"attic\.door \[3\] \(no such parameter\)"),
        ({}, {"conv_in.bias": (3,)}, r"conv_in\.bias \[3\] \(the base has \[32\]\)"),
        ({"conv_in": ((4, 5, 3, 3), (32, 4, 1, 1))}, {}, r"conv_in\.weight \[32, 5, 3, 3\] \(the base has \[32, 4"),
        ({"conv_in": ((4, 4, 1, 1), (32, 4, 1, 1))}, {}, r"conv_in\.weight \[32, 4, 1, 1\] \(the base has"),
        ({"conv_in": ((4, 4), (32, 4))}, {}, r"conv_in\.weight \[32, 4\] \(the base has"),
        ({"conv_norm_out": ((4, 32), (32, 4))}, {}, r"conv_norm_out\.weight \[32, 32\] \(the base has \[32\]\)"),
        ({}, dict.fromkeys("abcdef", (1,)), r"a \[1\].*d \[1\] \(no such parameter\) and 2 more"),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused(
    base: Path, generator: Generator, lora: Any, tensors: Any, text: str
) -> None:
    weights = PartWeights(
        {name: LoraPair(torch.ones(down), torch.ones(up)) for name, (down, up) in lora.items()},
        {name: torch.ones(shape) for name, shape in tensors.items()},
    )
    with pytest.raises(IcmsrError, match=f"does not fit this base model: unet\\.{text}"):
        load_backbone(Recipe(base, replace(generator, unet=weights)))
    with pytest.raises(IcmsrError, match=f"does not fit this base model: realistic\\.unet\\.{text}"):
        load_backbone(Recipe(base, replace(generator, realistic={"unet": weights}), fidelity=0.0))


def test_generators_of_another_base_are_refused(tmp_path, base: Path, generator: Generator, caplog) -> None:
    other = write_base(tmp_path / "other", TINY, family="sd21", seed=5)
    with pytest.raises(IcmsrError, match="family 'nano', the base 'random' is 'sd21': choose files of one family"):
        load_backbone(Recipe(other, generator))
    retrained = write_base(tmp_path / "retrained", TINY, seed=6)
    with caplog.at_level(logging.WARNING):
        load_backbone(Recipe(base, generator))
        assert caplog.text == ""
        load_backbone(Recipe(retrained, generator))
    assert "was trained on other base weights" in caplog.text


def test_timestep_and_embedding_must_fit_the_base(base: Path, generator: Generator) -> None:
    with pytest.raises(IcmsrError, match="timestep must be between 0 and 999, got 1000"):
        load_backbone(Recipe(base, replace(generator, info=replace(generator.info, timestep=1000))))
    with pytest.raises(IcmsrError, match=r"prompt embedding has width 64, the base .* takes 32"):
        load_backbone(Recipe(base, replace(generator, prompt_embedding=torch.ones(1, 64))))


# --- atomic writing --------------------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    before = path.read_bytes()
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared}, {})
    assert path.read_bytes() == before
    with pytest.raises(TypeError):
        write_tensors(path, {"a": shared}, {"number": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path) -> None:
    target = tmp_path / "generator.safetensors"
    (target / "a folder of that name").mkdir(parents=True)
    with pytest.raises(OSError, match=r"generator\.safetensors"):
        write_tensors(target, {"a": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == [target]


def test_writing_replaces_the_old_file(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    for value in (1.0, 2.0):
        write_tensors(path, {"a": torch.full((3, 2), value).T}, {"k": "v"})
        assert load_file(path)["a"].unique().item() == value
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


# --- base folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_base(tmp_path) -> Path:
    """A base folder that a test may spoil."""
    return write_base(tmp_path / "base", TINY)


def test_base_folder_describes_itself(own_base: Path) -> None:
    folder = open_base(own_base)
    assert folder.info == BaseInfo("random", "nano", licence="CC0-1.0")
    assert folder.schedule.alphas_cumprod[-1].sqrt().item() == pytest.approx(0.06826, abs=1e-5)
    weights = (own_base / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert folder.hash() == hashlib.sha256(weights).hexdigest()
    assert folder.prompt_embedding().shape == (1, 32)
    bare = folder.descriptor()
    assert (bare.family, bare.latent_channels, bare.latent_factor, bare.multiple_of) == ("nano", 4, 2, 4)
    assert (bare.timestep, bare.prediction) == (0, "eps")
    info = BaseInfo("other", "sd15", "v", 0.001, 0.02, 500, "MIT")
    write_base_info(own_base, info)
    assert open_base(own_base).info == info
    assert len(open_base(own_base).schedule.alphas_cumprod) == 500


def test_the_bare_prior_loads_without_a_generator(own_base: Path) -> None:
    backbone = load_backbone(Recipe(own_base))
    state = open_base(own_base).unet_state()
    assert all(torch.equal(value, state[key]) for key, value in backbone.unet.state_dict().items())
    (own_base / "prompt_embedding.safetensors").unlink()
    with pytest.raises(IcmsrError, match=r"neither the generator nor the base .* holds a prompt embedding"):
        load_backbone(Recipe(own_base))


@pytest.mark.parametrize(
    "missing",
    [
        "icmsr_base.json",
        "unet/config.json",
        "vae/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_missing_files_of_a_base_are_named(own_base: Path, missing: str) -> None:
    (own_base / missing).unlink()
    with pytest.raises(IcmsrError, match=f"not a base folder of ICM-SR, {missing} is missing"):
        open_base(own_base)


def test_what_is_not_a_base_is_refused(tmp_path) -> None:
    with pytest.raises(IcmsrError, match="nothing: no such file or folder"):
        open_base(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(IcmsrError, match="file: neither a base folder nor a"):
        open_base(tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("icmsr_base.json", "{", r"icmsr_base\.json: the file cannot be read as JSON"),
        ("icmsr_base.json", "[]", r"icmsr_base\.json: the file must be a JSON object, got list"),
        ("icmsr_base.json", b"\xff\xfe\x00", r"icmsr_base\.json: the file cannot be read as JSON"),
        ("icmsr_base.json", '{"name": "x"}', r"icmsr_base\.json: .*'family'"),
        ("icmsr_base.json", '{"name": "x", "family": 3}', r"icmsr_base\.json: family .* must be a str, got 3"),
        ("icmsr_base.json", '{"name": "x", "family": "y", "steps": "9"}', "steps .* must be a int, got '9'"),
        ("icmsr_base.json", '{"name": "x", "family": "y", "prediction": "z"}', "eps, v, residual, got 'z'"),
        ("unet/config.json", "no json", r"unet/config\.json: the file cannot be read as JSON"),
        ("vae/config.json", "{}", r"vae/config\.json: block_out_channels, latent_channels missing"),
        ("unet/config.json", '{"block_out_channels": [32]}', r"unet/config\.json: cross_attention_dim missing"),
    ],
)
def test_damaged_descriptions_of_a_base_are_refused(own_base: Path, file: str, content: str | bytes, text: str) -> None:
    (own_base / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(IcmsrError, match=text):
        open_base(own_base)


def test_weights_that_do_not_fit_their_configuration_are_refused(own_base: Path) -> None:
    path = own_base / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if key != "decoder.conv_in.bias"}, path)
    with pytest.raises(IcmsrError, match=r"base/vae: the weights do not fit .*decoder\.conv_in\.bias"):
        load_backbone(Recipe(own_base))
    path.write_bytes(b"text")
    with pytest.raises(IcmsrError, match=r"not a readable \.safetensors"):
        load_backbone(Recipe(own_base))


def test_a_prompt_file_without_the_embedding_is_refused(own_base: Path) -> None:
    for content in ({"other": torch.ones(1, 32)}, {"prompt_embedding": torch.ones(32)}):
        save_file(content, own_base / "prompt_embedding.safetensors")
        with pytest.raises(IcmsrError, match=r"must hold the tensor prompt_embedding \[tokens, width\]"):
            open_base(own_base).prompt_embedding()
