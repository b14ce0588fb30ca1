"""Text prompts as tensors: embedded once by the base folder's own text encoder, then read from a cache.

For teachers that are conditioned on text, and for imported generators without a constant prompt. Upscaling itself reads
no text. transformers (the extra text) is imported only to embed a prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import IcmsrError
from ..weights.base import BaseFolder
from ..weights.descriptions import read_description
from ..weights.diffusers_folder import CONFIG_FILE
from ..weights.tensor_files import open_tensors, read_head, read_tensors, write_tensors
from .checkpoint_text import embed_empty_prompt, text_layout

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger(__name__)

PROMPTS_FORMAT = "icmsr-prompts"
WEIGHTS_VARIANTS = {"model.safetensors": None, "model.safetensors.index.json": None, "model.fp16.safetensors": "fp16"}
"""Weights files of the text encoder, each with the `variant` argument that transformers needs to find it."""


@torch.no_grad()
def embed_prompts(
    base: BaseFolder, prompts: Sequence[str], cache: Path | None, device: torch.device | str, batch: int = 16
) -> Tensor:
    """The text encoder's last hidden state for each prompt: [P, tokens, width], float32 on the CPU.

    The conditioning of Stable Diffusion's own pipelines: padded to the encoder's length (77 tokens), no attention
    mask, final norm included. For SD 2.1 it is the penultimate layer: its published encoder ends there. Longer prompts
    are cut, with one warning that counts them. A base in one file does the empty prompt only. The encoder runs on
    `device` in float32, `batch` prompts at a time, and once for equal prompts. The .safetensors file `cache` keeps the
    results; it is overwritten when the prompts or the files of the text encoder or tokenizer have changed.

    Raises `IcmsrError` when the base has no text encoder or one of another width, transformers is missing, or
    `cache` is another kind of file.
    """
    if not prompts or isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise IcmsrError(f"prompts must be one or more texts, got {prompts!r}")
    if batch < 1:
        raise IcmsrError(f"batch must be 1 or more prompts, got {batch}")
    tokens = check_prompts(base, prompts)
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    hashes = {}
    embedded = None
    if cache is not None:
        hashes = {"prompts": _hash_texts(list(rows)), "text_encoder": _hash_text_files(base.path)}
        embedded = _read_cache(cache, hashes)
    if embedded is None:
        embedded = _embed(base, list(rows), tokens, torch.device(device), batch)
        if cache is not None:
            write_tensors(cache, {"prompts": embedded}, {"format": PROMPTS_FORMAT, **hashes})
    return embedded if len(rows) == len(prompts) else embedded[[rows[prompt] for prompt in prompts]]


def _embed(base: BaseFolder, prompts: list[str], tokens: int, device: torch.device, batch: int) -> Tensor:
    if base.path.is_file():
        return embed_empty_prompt(base.path, base.info.family)[None]
    encoder, tokenizer = _load_text_encoder(base.path)
    ids = _token_ids(tokenizer, prompts, tokens)
    if int(ids.max()) >= encoder.config.vocab_size:
        raise IcmsrError(
            f"{base.path}: the tokenizer gives token {int(ids.max())}, but the text encoder has only "
            f"{encoder.config.vocab_size}: use the tokenizer that belongs to this text encoder"
        )
    torch.nn.Module.to(encoder, device)
    embedded = torch.empty(len(prompts), tokens, int(base.unet_config["cross_attention_dim"]))
    for start in range(0, len(prompts), batch):
        embedded[start : start + batch] = encoder(ids[start : start + batch].to(device)).last_hidden_state.cpu()
    if not bool(embedded.isfinite().all()):
        raise IcmsrError(f"{base.path}/text_encoder: it gives NaN or infinite values: download the folder again")
    return embedded


def constant_prompt(base: BaseFolder, cache: Path | None = None, device: torch.device | str = "cpu") -> Tensor:
    """The constant context [tokens, width] that a generator of `base` is trained with, float32 on the CPU.

    It is the folder's own prompt embedding if there is one, else the empty prompt. `cache`, `device` and errors are as
    in `embed_prompts`.
    """
    own = base.prompt_embedding()
    return embed_prompts(base, [""], cache, device)[0] if own is None else own.float().clone()


def check_prompts(base: BaseFolder, prompts: Sequence[str] = ()) -> int:
    """The number of tokens of the base's text encoder.

    Raises `IcmsrError` when its files are missing or do not fit, and for `prompts` other than the empty one where the
    base is a checkpoint in one file, which has no tokenizer.
    """
    if base.path.is_file():
        return _check_checkpoint(base, prompts)
    folder = base.path / "text_encoder"
    if not folder.is_dir() or not (base.path / "tokenizer").is_dir():
        raise IcmsrError(
            f"{base.path}: a text prompt needs a base with a text encoder, and {base.info.name} has no "
            "text_encoder/ or tokenizer/: choose a full Stable Diffusion folder or a hub id"
        )
    _weights_variant(folder)
    tokenizer = base.path / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):  # transformers silently makes up an empty vocabulary
            if not (tokenizer / name).is_file():
                raise IcmsrError(f"{tokenizer}: {name} is missing: download the folder again")
    config = read_description(folder / CONFIG_FILE)
    try:
        width, tokens = int(config["hidden_size"]), int(config.get("max_position_embeddings", 77))
    except (ValueError, KeyError, TypeError) as error:
        raise IcmsrError(
            f"{folder / CONFIG_FILE}: not a text encoder's configuration ({error!r}): download the folder again"
        ) from error
    expected = base.unet_config["cross_attention_dim"]
    if width != expected:
        raise IcmsrError(
            f"{folder}: embeds text with width {width}, the UNet of {base.path} takes {expected}: "
            "use the text encoder that belongs to the UNet"
        )
    return tokens


def _check_checkpoint(base: BaseFolder, prompts: Sequence[str]) -> int:
    filled = [prompt for prompt in prompts if prompt]
    if filled:
        raise IcmsrError(
            f"{base.path}: the prompt {filled[0]!r} needs a tokenizer, which a checkpoint in one file does not have: "
            "give the model's diffusers folder or hub id as --base, or take the empty prompt"
        )
    with open_tensors(base.path) as file:
        layout = text_layout(base.path, file.keys())
        tokens, width = file.shape(layout.prefix + layout.positions)
    expected = base.unet_config["cross_attention_dim"]
    if width != expected:
        raise IcmsrError(
            f"{base.path}: its text encoder embeds text with width {width}, its UNet takes {expected}: take another "
            "checkpoint"
        )
    return tokens


def _weights_variant(folder: Path) -> str | None:
    """The `variant` argument with which transformers finds the weights in `folder`."""
    for name, variant in WEIGHTS_VARIANTS.items():
        if (folder / name).is_file():
            return variant
    raise IcmsrError(
        f"{folder}: model.safetensors is missing (pickled .bin weights must be saved as .safetensors first)"
    )


def _load_text_encoder(path: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise IcmsrError(
            f"text prompts need the package transformers ({error}): pip install transformers, or icm-sr[text]"
        ) from error
    folder = path / "text_encoder"
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        # Not the precision that the configuration states: transformers would round to it.
        "torch_dtype": torch.float32,
        "variant": _weights_variant(folder),
        "output_loading_info": True,
    }
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = CLIPTextModel.from_pretrained(str(folder), **options)
        tokenizer = CLIPTokenizer.from_pretrained(str(path / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split()[:40])
        raise IcmsrError(f"{path}: text_encoder or tokenizer cannot be read ({reason}): download it again") from error
    finally:
        if had_bar:
            transformers_logging.enable_progress_bar()
    encoder, report = loaded
    # transformers fills what the file lacks with random values and only warns.
    lacking = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if lacking:
        raise IcmsrError(f"{folder}: the weights do not fit the configuration: {', '.join(lacking[:4])}")
    return encoder.eval().requires_grad_(False), tokenizer


def _token_ids(tokenizer: CLIPTokenizer, prompts: list[str], tokens: int) -> Tensor:
    """[P, tokens] int64."""
    lengths = [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]]
    cut = sum(length > tokens for length in lengths)
    if cut:
        log.warning("%d of %d prompts are longer than %d tokens and are cut", cut, len(prompts), tokens)
    padded = tokenizer(prompts, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    ids: Tensor = padded["input_ids"]
    return ids


def _hash_texts(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _hash_text_files(base: Path) -> str:
    """Changes with the names or contents of the files that decide how text is embedded."""
    if base.is_file():
        return f"{base.stat().st_size} {base.stat().st_mtime_ns}"
    digest = hashlib.sha256()
    for folder in ("text_encoder", "tokenizer"):
        for path in sorted((base / folder).iterdir()):
            if path.suffix not in (".json", ".txt", ".safetensors") or not path.is_file():
                continue
            digest.update(f"{folder}/{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _read_cache(path: Path, hashes: dict[str, str]) -> Tensor | None:
    """The embeddings in the cache at `path`; None when there is none, or other prompts or files made it."""
    if not path.exists():
        return None
    try:
        metadata = read_head(path)[1]
    except IcmsrError as error:
        raise IcmsrError(
            f"{path}: the prompt cache cannot be read ({error}): delete it or choose another name"
        ) from error
    if metadata.get("format") != PROMPTS_FORMAT:
        raise IcmsrError(f"{path}: this file is not a prompt cache and would be overwritten: choose another name")
    if any(metadata.get(key) != value for key, value in hashes.items()):
        log.info("%s: made from other prompts or another text encoder: embedding again", path)
        return None
    return read_tensors(path)[0]["prompts"]
