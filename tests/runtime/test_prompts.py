"""Prompts embedded by a base folder's own text encoder: against the encoder itself, the cache, and every rejection."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.prompts import constant_prompt, embed_prompts
from icmsr_core.weights.base import BaseFolder, open_base
from icmsr_core.weights.embedded import embedded_base
from tests.support.sd_files import write_sd_folder, write_text_encoder

WIDTH = 96  # 1024 / 10, in whole multiples of 32
PROMPTS = ["a cat", "", "Cat   a z"]
START, END, PAD, CAT = 1, 2, 0, 56
IDS = [[START, 29, CAT, END], [START, END], [START, CAT, 29, 54, END]]
"""PROMPTS in the made-up vocabulary: "a</w>" is 29, "z</w>" 54; lower case, white space joined."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    return write_sd_folder(tmp_path_factory.mktemp("sd") / "base", "sd21", 10, torch.float16)


@pytest.fixture
def base(tmp_path, networks: Path) -> BaseFolder:
    """A base with a text encoder that a test may spoil; the networks are links."""
    folder = tmp_path / "base"
    folder.mkdir()
    for entry in networks.iterdir():
        (folder / entry.name).symlink_to(entry)
    return open_base(write_text_encoder(folder, WIDTH))


def expected(base: BaseFolder, ids: list[list[int]]) -> torch.Tensor:
    """The definition: the encoder's final state for padded ids, no mask but the causal one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_dict(json.loads((base.path / "text_encoder/config.json").read_text())))
    prefix = "" if next(iter(encoder.state_dict())).startswith("embeddings") else "text_model."
    state = load_file(base.path / "text_encoder/model.safetensors")
    state = {key.replace("text_model.", prefix): value for key, value in state.items() if "position_ids" not in key}
    encoder.load_state_dict(state, strict=True)
    padded = torch.tensor([entry + [PAD] * (77 - len(entry)) for entry in ids])
    with torch.no_grad():
        return encoder.eval()(padded).last_hidden_state


def forbid_transformers(monkeypatch) -> None:
    """Whoever imports it from here on fails, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "transformers", None)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_embeddings_are_the_encoder_s(base: BaseFolder, batch: int, capfd) -> None:
    result = embed_prompts(base, PROMPTS, None, "cpu", batch)
    assert result.shape == (3, 77, WIDTH)
    assert (result.dtype, result.device.type, result.requires_grad) == (torch.float32, "cpu", False)
    torch.testing.assert_close(result, expected(base, IDS), rtol=0, atol=1e-5)
    assert (result[0] - result[2]).abs().max() > 0.1
    assert capfd.readouterr() == ("", ""), "no progress bar, no advice"


def test_equal_prompts_are_embedded_once(base: BaseFolder, tmp_path) -> None:
    cache = tmp_path / "prompts.safetensors"
    result = embed_prompts(base, ["a cat", "", "a cat", "", ""], cache, "cpu")
    torch.testing.assert_close(result, expected(base, [IDS[row] for row in (0, 1, 0, 1, 1)]), rtol=0, atol=1e-5)
    assert load_file(cache)["prompts"].shape == (2, 77, WIDTH)
    assert torch.equal(embed_prompts(base, ["a cat", "", "a cat", "", ""], cache, "cpu"), result)


def test_long_prompts_are_cut_and_counted(base: BaseFolder, caplog, capfd) -> None:
    with caplog.at_level(logging.WARNING):
        result = embed_prompts(base, ["a " * 75, "a " * 76, "cat " * 500], None, "cpu")
    lines = [record.message for record in caplog.records if record.name.startswith("icmsr_core")]
    assert lines == ["2 of 3 prompts are longer than 77 tokens and are cut"]
    assert "sequence length" not in caplog.text + "".join(capfd.readouterr()), "the tokenizer's own advice"
    ids = [[START, *[29] * 75, END], [START, *[29] * 75, END], [START, *[CAT] * 75, END]]
    torch.testing.assert_close(result, expected(base, ids), rtol=0, atol=1e-5)


def test_half_precision_weights_are_found_and_run_in_float32(base: BaseFolder) -> None:
    folder = base.path / "text_encoder"
    state = load_file(folder / "model.safetensors")
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(
        {key: value.float() if value.is_floating_point() else value for key, value in halves.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    reference = expected(base, IDS)
    (folder / "model.safetensors").unlink()
    save_file(halves, folder / "model.fp16.safetensors", metadata={"format": "pt"})
    result = embed_prompts(base, PROMPTS, None, "cpu")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, reference, rtol=0, atol=1e-5)


def test_a_configuration_of_lower_precision_rounds_nothing(base: BaseFolder) -> None:
    """Published folders hold float32 weights beside a configuration that says float16."""
    path = base.path / "text_encoder/config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "torch_dtype": "float16", "dtype": "float16"}))
    result = embed_prompts(base, PROMPTS, None, "cpu")
    path.write_text(json.dumps(values))
    torch.testing.assert_close(result, expected(base, IDS), rtol=0, atol=1e-5)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_while_nothing_changed(base: BaseFolder, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "new/prompts.safetensors"
    first = embed_prompts(base, PROMPTS, cache, "cpu")
    with safe_open(cache, framework="pt") as file:
        assert file.metadata().keys() == {"format", "prompts", "text_encoder"}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "no partial file is left"
    forbid_transformers(monkeypatch)
    again = embed_prompts(base, PROMPTS, cache, "cpu")
    assert torch.equal(again, first)
    cache.write_bytes(b"\1" * cache.stat().st_size)
    assert torch.equal(again, first), "the tensor is not a view of the file"


@pytest.mark.parametrize("change", ["order", "prompt", "number", "weights", "tokenizer"])
def test_the_cache_is_written_again_after_a_change(base: BaseFolder, tmp_path, change: str) -> None:
    cache = tmp_path / "prompts.safetensors"
    first = embed_prompts(base, PROMPTS, cache, "cpu")
    prompts = {"order": PROMPTS[::-1], "prompt": ["a cut", *PROMPTS[1:]], "number": PROMPTS[:2]}.get(change, PROMPTS)
    if change == "weights":
        path = base.path / "text_encoder/model.safetensors"
        state = load_file(path)
        state["text_model.final_layer_norm.bias"] += 1
        save_file(state, path, metadata={"format": "pt"})
    if change == "tokenizer":
        (base.path / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    changed = embed_prompts(base, prompts, cache, "cpu")
    assert changed.shape != first.shape or not torch.equal(changed, first)
    assert torch.equal(changed, embed_prompts(base, prompts, None, "cpu"))
    assert torch.equal(load_file(cache)["prompts"], changed)


def test_a_foreign_file_is_never_overwritten(base: BaseFolder, tmp_path) -> None:
    cache = tmp_path / "generator.safetensors"
    save_file({"a": torch.ones(1)}, cache, metadata={"format": "icmsr-generator"})
    before = cache.read_bytes()
    with pytest.raises(IcmsrError, match="not a prompt cache and would be overwritten"):
        embed_prompts(base, PROMPTS, cache, "cpu")
    assert cache.read_bytes() == before
    cache.write_text("text")
    with pytest.raises(IcmsrError, match="the prompt cache cannot be read"):
        embed_prompts(base, PROMPTS, cache, "cpu")
    assert cache.read_text() == "text"


# --- the constant prompt ---------------------------------------------------------------------------------------------


def test_the_constant_prompt_is_the_base_s_own_or_the_empty_text(base: BaseFolder, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "empty.safetensors"
    result = constant_prompt(base, cache)
    torch.testing.assert_close(result, expected(base, [[START, END]])[0], rtol=0, atol=1e-5)
    forbid_transformers(monkeypatch)
    assert torch.equal(constant_prompt(base, cache), result)
    save_file({"prompt_embedding": torch.full((3, WIDTH), 0.5).half()}, base.path / "prompt_embedding.safetensors")
    own = constant_prompt(base, cache)
    assert own.dtype == torch.float32
    assert torch.equal(own, torch.full((3, WIDTH), 0.5))


def test_nano_s_prompt_is_its_own_constant(monkeypatch) -> None:
    forbid_transformers(monkeypatch)
    nano = open_base(embedded_base())
    assert torch.equal(constant_prompt(nano), nano.prompt_embedding())


# --- rejections ------------------------------------------------------------------------------------------------------


def test_nano_takes_no_text() -> None:
    with pytest.raises(IcmsrError, match=r"text prompt needs a base with a text encoder, and nano-2 has no"):
        embed_prompts(open_base(embedded_base()), ["a cat"], None, "cpu")


def test_without_transformers_the_error_says_how_to_install_it(base: BaseFolder, monkeypatch) -> None:
    forbid_transformers(monkeypatch)
    with pytest.raises(IcmsrError, match="pip install transformers, or icm-sr"):
        embed_prompts(base, PROMPTS, None, "cpu")


@pytest.mark.parametrize("prompts", [[], "a cat", ["a", None]])
def test_prompts_must_be_a_list_of_texts(base: BaseFolder, prompts) -> None:
    with pytest.raises(IcmsrError, match="prompts must be one or more texts"):
        embed_prompts(base, prompts, None, "cpu")
    with pytest.raises(IcmsrError, match="batch must be 1 or more prompts, got 0"):
        embed_prompts(base, PROMPTS, None, "cpu", 0)


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("text_encoder/model.safetensors", r"text_encoder: model\.safetensors is missing .*pickled"),
        ("text_encoder/config.json", r"text_encoder/config\.json: the file cannot be read \(No such file"),
        ("tokenizer/vocab.json", r"tokenizer: vocab\.json is missing"),
        ("tokenizer/merges.txt", r"tokenizer: merges\.txt is missing"),
    ],
)
def test_missing_files_of_the_text_encoder_are_named(base: BaseFolder, missing: str, text: str) -> None:
    (base.path / missing).unlink()
    with pytest.raises(IcmsrError, match=text):
        embed_prompts(base, PROMPTS, None, "cpu")


def test_files_that_do_not_belong_together_are_refused(base: BaseFolder) -> None:
    other = replace(base, unet_config={**base.unet_config, "cross_attention_dim": 768})
    with pytest.raises(IcmsrError, match=f"embeds text with width {WIDTH}, the UNet of .* takes 768"):
        embed_prompts(other, PROMPTS, None, "cpu")
    path = base.path / "tokenizer/vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({**vocabulary, "cat</w>": 57, "x": CAT}))
    with pytest.raises(IcmsrError, match="gives token 57, but the text encoder has only 57"):
        embed_prompts(base, PROMPTS, None, "cpu")


@pytest.mark.parametrize("damage", ["lacking", "narrow", "text", "short"])
def test_damaged_weights_of_the_text_encoder_are_refused(base: BaseFolder, damage: str) -> None:
    """transformers itself fills what is missing with random values."""
    path = base.path / "text_encoder/model.safetensors"
    state = load_file(path)
    name = "encoder.layers.1.mlp.fc1.bias"
    if damage == "lacking":
        del state[f"text_model.{name}"]
    if damage == "narrow":
        state[f"text_model.{name}"] = torch.zeros(3)
    save_file(state, path, metadata={"format": "pt"})
    content = path.read_bytes()
    if damage in ("text", "short"):
        path.write_bytes(b"text" if damage == "text" else content[:-1000])
    with pytest.raises(IcmsrError, match=r"cannot be read|do not fit the configuration"):
        embed_prompts(base, PROMPTS, None, "cpu")


def test_weights_that_are_not_finite_are_refused(base: BaseFolder, tmp_path) -> None:
    path, cache = base.path / "text_encoder/model.safetensors", tmp_path / "prompts.safetensors"
    state = load_file(path)
    state["text_model.final_layer_norm.bias"][0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(IcmsrError, match="NaN or infinite"):
        embed_prompts(base, PROMPTS, cache, "cpu")
    assert not cache.exists()
