"""Recipes: what is refused before anything is loaded, and what the rest comes to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.ingredients import check_recipe, resolve
from icmsr_core.runtime.precision import PRECISIONS
from icmsr_core.runtime.recipe import DTYPES, Recipe
from icmsr_core.weights.embedded import embedded_base, embedded_generator
from icmsr_core.weights.generator_file import load_generator, save_generator
from tests.support.model_files import TINY, write_base, write_generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory, base) -> Path:
    return write_generator(tmp_path_factory.mktemp("one set") / "generator.safetensors", base)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory, base) -> Path:
    return write_generator(tmp_path_factory.mktemp("two sets") / "two sets.safetensors", base, two_sets=True)


def test_a_recipe_without_a_base_is_nano_s_prior() -> None:
    assert Recipe() == Recipe(base=embedded_base(), generator=None, device="cpu", dtype="fp32")


def test_every_dtype_has_a_meaning() -> None:
    assert {"auto", *PRECISIONS} == set(DTYPES)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dtype": "fp8"}, "dtype must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ({"fidelity": 2.5}, "fidelity must be a number from 0 to 2, got 2.5"),
        ({"fidelity": float("nan")}, "fidelity must be a number from 0 to 2, got nan"),
    ],
)
def test_values_beyond_the_limits_are_refused_when_the_recipe_is_made(wrong: dict, words: str) -> None:
    with pytest.raises(IcmsrError, match=words):
        Recipe(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"device": "cuda:99"}, "device cuda:99 cannot be used here"),
        ({"generator": Path("none.safetensors")}, "none.safetensors: no such file"),
        ({"generator": embedded_base() / "adapter.safetensors"}, "adapter.safetensors: not an ICM-SR generator file"),
        ({"fidelity": 1.0}, "fidelity needs a generator with a faithful and a realistic set"),
    ],
)
def test_what_the_files_heads_show_is_refused_before_a_base_is_opened(monkeypatch, wrong: dict, words: str) -> None:
    monkeypatch.setattr("icmsr_core.runtime.ingredients.open_base", lambda *_: pytest.fail("a base was opened"))
    for check in (check_recipe, resolve):
        with pytest.raises(IcmsrError, match=words):
            check(Recipe(**wrong))


@pytest.mark.parametrize("held", ["file", "memory"])
def test_fidelity_is_refused_for_a_generator_of_one_set(base, generator, held: str) -> None:
    chosen = generator if held == "file" else load_generator(generator)
    with pytest.raises(IcmsrError, match=r"generator.safetensors: fidelity needs .* single set: .* got 0.5"):
        check_recipe(Recipe(base, chosen, fidelity=0.5))


def test_checking_a_good_recipe_reads_no_tensors(two_sets, monkeypatch) -> None:
    monkeypatch.setattr("icmsr_core.weights.generator_file.read_tensors", lambda *_: pytest.fail("tensors were read"))
    check_recipe(Recipe(Path("none"), two_sets, fidelity=0.5))


def test_choices_are_made_once(base, two_sets) -> None:
    found = resolve(Recipe(base, two_sets, fidelity=0.5, dtype="bf16"))
    assert found.generator is not None
    assert (found.generator.fidelity, found.generator.name) == (0.5, str(two_sets))
    assert (found.device, found.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert found.descriptor.timestep == load_generator(two_sets).info.timestep
    assert resolve(Recipe(base, two_sets)).generator.fidelity == 1.0


def test_the_generator_s_prompt_comes_before_the_base_s(base, generator) -> None:
    held = load_generator(generator)
    own = replace(held, prompt_embedding=held.prompt_embedding + 1)
    assert torch.equal(resolve(Recipe(base, own)).prompt_embedding, own.prompt_embedding)
    bare = replace(held, prompt_embedding=None)
    assert torch.equal(resolve(Recipe(base, bare)).prompt_embedding, resolve(Recipe(base)).prompt_embedding)


def test_a_recipe_whose_base_holds_no_prompt_says_which_base(tmp_path, base) -> None:
    other = write_base(tmp_path / "base", TINY)
    (other / "prompt_embedding.safetensors").unlink()
    with pytest.raises(IcmsrError, match=rf"{other}: neither the generator nor the base .* holds a prompt embedding"):
        resolve(Recipe(other))


def test_the_embedded_generator_is_realistic_unless_asked_for_less(tmp_path) -> None:
    found = resolve(Recipe(generator=embedded_generator()))
    assert found.generator.fidelity == 1.0
    copy = tmp_path / "copy.safetensors"
    save_generator(copy, found.generator.at_fidelity(0.0))  # a choice is not written into a file
    assert load_generator(copy).fidelity == 1.0
