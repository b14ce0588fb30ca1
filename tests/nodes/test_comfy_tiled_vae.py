"""Core's VAEs in stripes, inside ComfyUI: against themselves untiled and against diffusers."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone
from icmsr_core.runtime.recipe import Recipe
from tests.support.comfy_harness import run_script
from tests.support.model_files import write_base, write_generator
from tests.support.stripes import decode_in_stripes, encode_in_stripes

pytestmark = pytest.mark.comfy


class Outcome(NamedTuple):
    results: dict[str, torch.Tensor]
    image: torch.Tensor
    library: DiffusersBackbone


@pytest.fixture(scope="module")
def outcome(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    """One ComfyUI process that does everything these tests look at."""
    job: Path = tmp_path_factory.mktemp("tiled")
    weights = job / "models" / "icmsr"
    weights.mkdir(parents=True)
    base = write_base(job / "base")
    generator = write_generator(weights / "generator.safetensors", base)
    rough = torch.linspace(0, 1, 200)[:, None] * torch.linspace(0.2, 1, 144)
    image = rough * torch.rand(1, 3, 200, 144, generator=torch.Generator().manual_seed(0))
    save_file({"image": image}, job / "inputs.safetensors")
    run_script(comfy_python, comfyui, "tiled_vae_checks.py", job)
    return Outcome(load_file(job / "results.safetensors"), image, load_backbone(Recipe(base, generator)))


def assert_near(got: torch.Tensor, expected: torch.Tensor, bound: float = 1e-4) -> None:
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    print(f"largest difference {difference:.2e} at scale {scale:.2f}")
    assert float(expected.std()) > 0.02
    assert difference <= bound * max(1.0, scale)


@pytest.mark.parametrize("what", ["latent", "picture"])
def test_exact_is_the_untiled_result(outcome, what: str) -> None:
    assert_near(outcome.results[f"exact {what}"], outcome.results[what], 2e-5)


@pytest.mark.parametrize("kind", ["quant", "no quant"])
@pytest.mark.parametrize("what", ["latent", "picture"])
def test_cores_own_layout_with_attention(outcome, kind: str, what: str) -> None:
    assert_near(outcome.results[f"{kind} exact {what}"], outcome.results[f"{kind} {what}"], 2e-5)


def test_core_s_own_attention_runs_where_core_chose_one(outcome) -> None:
    """Over all cells at once, in both modes: a window of bounded mode holds all of this picture."""
    results = outcome.results
    assert_near(results["own exact picture"], results["no quant picture"], 2e-5)
    assert results["cells of own attention"].tolist() == 2 * [list(results["latent"].shape[2:])]
    nvidia, amd = results["kinds of attention"].tolist()[::2], results["kinds of attention"].tolist()[1::2]
    assert nvidia == [[True, False], [True, False], [True, True]], "torch's, split, xformers"
    assert amd == [[False, False], [False, False], [False, True]]


@torch.inference_mode()
@pytest.mark.parametrize(("name", "exact"), [("exact", True), ("bounded", False)])
def test_both_modes_agree_with_diffusers(outcome, name: str, exact: bool) -> None:
    """Same weights through the other walk over the other classes; the generator's LoRA on the encoder included."""
    results, image, library = outcome
    assert_near(results[f"{name} latent"], encode_in_stripes(library, image, tile=6, exact=exact))
    out = torch.empty_like(image)
    decode_in_stripes(library, results["latent"], out, tile=6, exact=exact)
    assert_near(results[f"{name} picture"], out)
    assert float((results["exact picture"] - results["bounded picture"]).abs().max()) > 1e-4, "the modes are two"
