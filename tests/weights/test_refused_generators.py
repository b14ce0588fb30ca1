"""Generator files that are refused, in one line that names what is wrong."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.generator_file import (
    Generator,
    LoraPair,
    PartWeights,
    holds_two_sets,
    load_generator,
    save_generator,
)
from tests.support.generators import TINY, rewrite
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.model_files import write_base

LORA = "unet.mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"metadata": {"format": "pt"}}, r"not an ICM-SR generator file \(.*its format is 'pt', expected 'icmsr-gen"),
        ({"metadata": {"icmsr": "{"}}, "its description cannot be read as JSON .*: download or export it again"),
        ({"metadata": {"icmsr": "[1, 2]"}}, "its description must be a JSON object, got list"),
        ({"description": lambda values: values | {"format_version": 4}}, "format version 4, .* reads 1, 2, 3: upd"),
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
    small_base: Path, generator: Generator, lora: Any, tensors: Any, text: str
) -> None:
    weights = PartWeights(
        {name: LoraPair(torch.ones(down), torch.ones(up)) for name, (down, up) in lora.items()},
        {name: torch.ones(shape) for name, shape in tensors.items()},
    )
    with pytest.raises(IcmsrError, match=f"does not fit this base model: unet\\.{text}"):
        load_backbone(Recipe(small_base, replace(generator, unet=weights)))
    with pytest.raises(IcmsrError, match=f"does not fit this base model: realistic\\.unet\\.{text}"):
        load_backbone(Recipe(small_base, replace(generator, realistic={"unet": weights}), fidelity=0.0))


def test_generators_of_another_base_are_refused(tmp_path, small_base: Path, generator: Generator, caplog) -> None:
    other = write_base(tmp_path / "other", TINY, family="sd21", seed=5)
    with pytest.raises(IcmsrError, match="family 'nano', the base 'random' is 'sd21': choose files of one family"):
        load_backbone(Recipe(other, generator))
    retrained = write_base(tmp_path / "retrained", TINY, seed=6)
    with caplog.at_level(logging.WARNING):
        load_backbone(Recipe(small_base, generator))
        assert caplog.text == ""
        load_backbone(Recipe(retrained, generator))
    assert "was trained on other base weights" in caplog.text


def test_timestep_and_embedding_must_fit_the_base(small_base: Path, generator: Generator) -> None:
    with pytest.raises(IcmsrError, match="timestep must be between 0 and 999, got 1000"):
        load_backbone(Recipe(small_base, replace(generator, info=replace(generator.info, timestep=1000))))
    with pytest.raises(IcmsrError, match=r"prompt embedding has width 64, the base .* takes 32"):
        load_backbone(Recipe(small_base, replace(generator, prompt_embedding=torch.ones(1, 64))))
