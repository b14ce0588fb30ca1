"""The weighted average of generators: its parameters and pictures, what it records, which ones it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.averaging import averaged, with_realistic
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import Generator, load_generator, save_generator
from tests.support.model_files import random_generator, write_base, write_generator
from tests.support.script_process import ScriptProcess


def parameters(base: Path, generator: Path, fidelity: float | None = None) -> dict[str, torch.Tensor]:
    """Every parameter of the networks with `generator` merged in, float64."""
    backbone = load_backbone(Recipe(base=base, generator=generator, fidelity=fidelity))
    states = {"unet": backbone.unet.state_dict(), "vae": backbone.vae.state_dict()}
    return {f"{part}.{name}": value.double() for part, state in states.items() for name, value in state.items()}


def test_the_parameters_are_the_average_of_the_merged_ones(small_base, tmp_path) -> None:
    one = write_generator(tmp_path / "one.safetensors", small_base, seed=1)
    two = write_generator(tmp_path / "two.safetensors", small_base, seed=2, two_sets=True)
    generators = [load_generator(one), load_generator(two).at_fidelity(0.5)]
    made = tmp_path / "made.safetensors"
    save_generator(made, averaged(generators, [0.3, 0.7], open_base(small_base)), torch.float32)
    first, second, average = parameters(small_base, one), parameters(small_base, two, 0.5), parameters(small_base, made)
    assert average.keys() == first.keys()
    for name, value in average.items():
        torch.testing.assert_close(value, 0.3 * first[name] + 0.7 * second[name], rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(first["unet.conv_in.weight"], second["unet.conv_in.weight"])


def test_it_records_what_was_averaged_and_no_folder(small_base, tmp_path) -> None:
    files = [write_generator(tmp_path / f"{seed}.safetensors", small_base, seed=seed, two_sets=True) for seed in (1, 2)]
    made = averaged([load_generator(file) for file in files], [0.5, 0.5], open_base(small_base))
    assert not made.has_two_sets
    assert (made.info.rank, made.info.realistic_rank) == (0, 0)
    first, second = made.info.training["average"]
    assert first == {
        "file": "1.safetensors",
        "weight": 0.5,
        "fidelity": 1.0,
        "training": {},
        "realistic_training": {"loss": "icm"},
    }
    assert second["file"] == "2.safetensors"


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.5], "one weight per generator"), ([0.5, 0.6], "add up to 1"), ([1.5, -0.5], "above 0")],
)
def test_weights_that_make_no_average_are_refused(small_base, weights, message) -> None:
    generators = [random_generator(small_base, seed=seed) for seed in (1, 2)]
    with pytest.raises(IcmsrError, match=message):
        averaged(generators, weights, open_base(small_base))


@pytest.mark.parametrize(
    ("name", "value"), [("family", "sd21"), ("timestep", 201), ("prediction", "eps"), ("base_hash", "0")]
)
def test_generators_that_do_not_go_together_are_refused(small_base, name, value) -> None:
    one = random_generator(small_base)
    other = replace(one, info=replace(one.info, **{name: value}), name="other")
    with pytest.raises(IcmsrError, match=f"generator and other cannot be averaged: their {name}"):
        averaged([one, other], [0.5, 0.5], open_base(small_base))


def test_another_base_is_refused(small_base, tmp_path) -> None:
    generators = [random_generator(small_base, seed=seed) for seed in (1, 2)]
    with pytest.raises(IcmsrError, match="other weights"):
        averaged(generators, [0.5, 0.5], open_base(write_base(tmp_path / "other", seed=5)))


def test_another_prompt_is_refused(small_base) -> None:
    one = random_generator(small_base)
    for embedding in (None, one.prompt_embedding + 1):
        with pytest.raises(IcmsrError, match="prompt embeddings differ"):
            averaged([one, replace(one, prompt_embedding=embedding)], [0.5, 0.5], open_base(small_base))


def lora_on_top(base: Path, seed: int) -> Generator:
    """A generator whose realistic set holds LoRA alone."""
    generator = random_generator(base, seed=seed, two_sets=True)
    realistic = {part: replace(weights, tensors={}) for part, weights in generator.realistic.items()}
    return replace(generator, realistic=realistic)


def test_a_realistic_set_is_carried_over_at_its_strength(small_base, tmp_path) -> None:
    one, other = random_generator(small_base, seed=1), lora_on_top(small_base, seed=2)
    made = with_realistic(averaged([one, one], [0.5, 0.5], open_base(small_base)), other, 0.5)
    files = {"made": made, "one": one, "other": other}
    for name, generator in files.items():
        save_generator(tmp_path / f"{name}.safetensors", generator, torch.float32)
    at = {
        (name, fidelity): parameters(small_base, tmp_path / f"{name}.safetensors", fidelity)
        for name, fidelity in (("made", 0.0), ("made", 1.0), ("one", None), ("other", 0.0), ("other", 1.0))
    }
    for name, value in at["made", 1.0].items():
        added = 0.5 * (at["other", 1.0][name] - at["other", 0.0][name])
        torch.testing.assert_close(value, at["one", None][name] + added, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(at["made", 0.0][name], at["one", None][name], rtol=0, atol=1e-6, msg=name)
    assert made.info.realistic_training == {"loss": "icm"}


def test_a_realistic_set_that_cannot_be_carried_over_is_refused(small_base) -> None:
    one, other = random_generator(small_base), lora_on_top(small_base, seed=2)
    for faithful, realistic, strength, message in (
        (other, other, 1.0, "has a realistic set already"),
        (one, one, 1.0, "no realistic set of LoRA"),
        (one, random_generator(small_base, two_sets=True), 1.0, "no realistic set of LoRA"),
        (one, other, 0.0, "above 0"),
        (one, replace(other, info=replace(other.info, timestep=3)), 1.0, "their timestep"),
    ):
        with pytest.raises(IcmsrError, match=message):
            with_realistic(faithful, realistic, strength)


def test_the_script_writes_a_generator_and_replaces_none(small_base, tmp_path) -> None:
    files = [str(write_generator(tmp_path / f"{seed}.safetensors", small_base, seed=seed)) for seed in (1, 2)]
    made = tmp_path / "made.safetensors"
    flags = [f"--out={made}", f"--files={files}", f"--base={small_base}"]
    script = ScriptProcess("average.py", *flags, folder=tmp_path)
    assert script.wait() == 0, script.output()
    assert [entry["weight"] for entry in load_generator(made).info.training["average"]] == [0.5, 0.5]
    for flag, message in (
        ("--fidelities=[0.5]", "one value for each file with two sets, 0"),
        ("--strength=0.5", "name its file with --realistic"),
    ):
        wrong = ScriptProcess("average.py", *flags[1:], f"--out={made}2", flag, folder=tmp_path)
        assert wrong.wait() != 0
        assert message in wrong.output()
    again = ScriptProcess("average.py", *flags, folder=tmp_path)
    assert again.wait() != 0
    assert "is there already" in again.output()
