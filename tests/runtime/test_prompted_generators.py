"""Generators that come without a prompt embedding, as imported ones do: `--prompt` for upscale and for import."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.told import Told
from icmsr_core.pictures.files import Picture, read_picture, to_tensor, write_picture
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.prompts import embed_prompts
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.base import PROMPT_FILE, open_base
from icmsr_core.weights.generator_file import load_generator, save_generator
from icmsr_core.weights.hub import find_base
from tests.support.sd_files import complete_generator, write_sd_checkpoint, write_sd_folder, write_text_encoder

WIDTH = 96  # of SD2.1's text at a tenth


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """SD2.1 at a tenth of the width, with a text encoder."""
    folder = write_sd_folder(tmp_path_factory.mktemp("sd") / "base", "sd21", 10)
    return write_text_encoder(folder, WIDTH)


@pytest.fixture(scope="module")
def promptless(base, tmp_path_factory) -> Path:
    """A generator for it that holds no prompt."""
    path = tmp_path_factory.mktemp("generator") / "promptless.safetensors"
    save_generator(path, replace(complete_generator(open_base(base)), prompt_embedding=None), torch.float32)
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.png"
    random = torch.Generator().manual_seed(0)
    write_picture(path, Picture(rgb=torch.rand(16, 16, 3, generator=random).numpy()))
    return path


@pytest.fixture(scope="module")
def lora(promptless, tmp_path_factory) -> Path:
    """Its UNet's LoRA as diffusers has it."""
    generator = load_generator(promptless)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(
        {
            f"unet.{module}.lora_{half}.weight": tensor
            for module, pair in generator.unet.lora.items()
            for half, tensor in zip("AB", pair)
        },
        path,
    )
    return path


def files(generator: Path, base: Path) -> list[str]:
    return ["--model", str(generator), "--base", str(base)]


def upscaled(source: Path, base: Path, generator: Path, *flags: str) -> torch.Tensor:
    target = source.with_name("out.png")
    run = ["upscale", str(source), str(target), *files(generator, base), "--color-fix", "none", "--dtype", "fp32"]
    assert main([*run, *flags]) == 0
    return to_tensor(read_picture(target).rgb)


def test_the_prompt_is_the_context_of_the_one_step(base, promptless, source):
    """What the base's text encoder makes of it, as if the generator had been trained with that constant."""
    pictures = {prompt: upscaled(source, base, promptless, "--prompt", prompt) for prompt in ("", "a cat")}
    assert float((pictures[""] - pictures["a cat"]).abs().max()) > 2 / 255
    for prompt, got in pictures.items():
        embedding = embed_prompts(open_base(base), [prompt], None, "cpu")[0]
        generator = replace(load_generator(promptless), prompt_embedding=embedding)
        settings = UpscaleSettings(color_fix="none")
        expected = upscale(load_backbone(Recipe(base, generator)), to_tensor(read_picture(source).rgb), settings)
        assert float((got - expected).abs().max()) <= 1 / 255


def test_a_prompt_replaces_the_generator_s_own_and_the_base_s(base, promptless):
    own = replace(load_generator(promptless), prompt_embedding=torch.randn(7, WIDTH))
    asked = embed_prompts(open_base(base), ["a cat"], None, "cpu")
    assert torch.equal(load_backbone(Recipe(base, own, prompt="a cat"))._context[None], asked)
    assert load_backbone(Recipe(base, own))._context.shape == (7, WIDTH)


def test_without_a_prompt_the_error_says_how_to_give_one(base, promptless, source, capsys, monkeypatch):
    monkeypatch.setattr("icmsr_core.weights.base.BaseFolder.tensors", lambda *_: pytest.fail("weights were read"))
    assert main(["upscale", str(source), str(source.with_name("o.png")), *files(promptless, base)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"icmsr: error: {promptless}: neither the generator nor the base {base} holds a prompt")
    assert '--prompt "" for the empty one' in error
    assert error.count("\n") == 1


def test_a_base_without_a_text_encoder_takes_no_prompt(promptless, source, tmp_path, capsys):
    file = write_sd_checkpoint(tmp_path / "one file.safetensors", "sd21", 10)
    for base, prompt, words in (
        (
            str(file),
            "a",
            "the prompt 'a' needs a tokenizer, which a checkpoint in one file does not have",
        ),
        (str(file), "", "holds no text encoder, which even the empty prompt needs: take a full checkpoint"),
        ("nano", "a", "text prompt needs a base with a text encoder, and nano-2 has no text_encoder/"),
        ("nano", "a", "choose a full Stable Diffusion folder or a hub id"),
    ):
        model = ["--model", str(promptless)] if base != "nano" else []
        assert main(["upscale", str(source), str(tmp_path / "o.png"), "--base", base, *model, "--prompt", prompt]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_where_transformers_is_missing_the_error_names_it(base, promptless, source, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ["upscale", str(source), str(source.with_name("o.png")), *files(promptless, base)]
    assert main([*arguments, "--prompt", ""]) == 1
    assert "text prompts need the package transformers" in (error := capsys.readouterr().err)
    assert "icm-sr[text]" in error


def test_an_import_may_take_its_prompt_along(base, lora, source, tmp_path, capsys):
    """The file then works where there is no text encoder: a checkpoint in one file, a graph without CLIP."""
    dest = tmp_path / "g.safetensors"
    arguments = ["import", "lora", str(lora), str(dest), "--base", str(base)]
    assert main([*arguments, "--prompt", "a cat"]) == 0
    out = capsys.readouterr().out
    assert f"constant [77, {WIDTH}]" in out
    assert 'Its constant prompt is "a cat".' in out
    assert "bring" not in out
    expected = embed_prompts(open_base(base), ["a cat"], None, "cpu")[0]
    assert torch.equal(load_generator(dest).prompt_embedding, expected)
    file = write_sd_checkpoint(tmp_path / "one file.safetensors", "sd21", 10)
    picture = upscaled(source, file, dest)
    assert main(arguments) == 0
    assert "none: give one, as conditioning in ComfyUI or with --prompt on the command line" in capsys.readouterr().out
    assert torch.equal(upscaled(source, base, dest, "--prompt", "a cat"), picture)


def test_an_import_s_prompt_needs_a_base_with_a_text_encoder(base, lora, tmp_path):
    for settings, words in (
        (
            ImportSettings(Told("sd21"), prompt=""),
            "a prompt needs a text encoder, and that comes with a base: give --base",
        ),
        (
            ImportSettings(base=write_sd_folder(tmp_path / "bare", "sd21", 10), prompt=""),
            "text prompt needs a base with a text encoder, and random sd21 has no",
        ),
    ):
        with pytest.raises(IcmsrError, match=words):
            import_checkpoint("lora", lora, tmp_path / "g.safetensors", settings)
    assert not (tmp_path / "g.safetensors").exists()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_hub_s_text_encoder_is_fetched_for_a_prompt_alone(tmp_path, monkeypatch, variant):
    asked: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    folder = write_sd_folder(tmp_path / "snapshot", "sd21", 10, variant=variant)
    write_text_encoder(folder, WIDTH, variant=variant)
    save_file({"prompt_embedding": torch.randn(5, WIDTH)}, folder / PROMPT_FILE)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    find_base("owner/name")
    assert not [pattern for pattern in asked if pattern.startswith(("text_encoder", "tokenizer"))]
    asked.clear()
    assert find_base("owner/name", text=True) == folder
    assert {
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/*.json",
        "tokenizer/merges.txt",
    } <= set(asked)
    assert ("text_encoder/model.fp16.safetensors" in asked) == (variant == "fp16")
    asked.clear()
    generator = replace(complete_generator(open_base(folder)), prompt_embedding=None)
    context = load_backbone(Recipe("owner/name", generator, prompt="a cat"))._context
    assert torch.equal(context[None], embed_prompts(open_base(folder), ["a cat"], None, "cpu"))
    assert "text_encoder/config.json" in asked
