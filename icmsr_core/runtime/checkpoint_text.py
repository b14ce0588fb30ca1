"""The empty prompt's embedding by the text encoder inside a checkpoint in one file.

CLIP's text transformer (arXiv 2103.00020) in plain torch: the tokens of the empty prompt are constants, so neither a
tokenizer nor transformers is needed. Stable Diffusion 1 takes the last layer of CLIP ViT-L, Stable Diffusion 2 the last
but one of OpenCLIP ViT-H; both end with the final norm.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IcmsrError
from ..weights.sd_families import HEAD_WIDTH
from ..weights.tensor_files import TensorFile, open_tensors

START_TOKEN, END_TOKEN = 49406, 49407
"""The tokens around every prompt."""
VOCABULARY = 49408


@dataclass(frozen=True)
class TextLayout:
    """The names of a text encoder's tensors in a checkpoint."""

    prefix: str
    tokens: str
    positions: str
    layer: str
    """Beginning of a layer's names; its number follows."""
    norm: str
    fused: bool
    """Whether query, key and value are one matrix (OpenCLIP)."""


HUGGING_FACE = ("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight")
LAYOUTS = (
    *(
        TextLayout(prefix, *HUGGING_FACE, "text_model.encoder.layers.", "text_model.final_layer_norm", False)
        for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
    ),
    *(
        TextLayout(prefix, "token_embedding.weight", "positional_embedding", "transformer.resblocks.", "ln_final", True)
        for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model.")
    ),
)
"""Where checkpoints of Stable Diffusion 1, 2 and SD-Turbo have it."""


def text_layout(path: Path, keys: Collection[str]) -> TextLayout:
    """Where the checkpoint at `path` with these keys has its text encoder. Raises `IcmsrError` if it has none."""
    for layout in LAYOUTS:
        if layout.prefix + layout.tokens in keys and layout.prefix + layout.positions in keys:
            return layout
    raise IcmsrError(
        f"{path}: this checkpoint holds no text encoder, which even the empty prompt needs: take a full checkpoint, or "
        "a diffusers folder or hub id as the base"
    )


@torch.no_grad()
def embed_empty_prompt(path: Path, family: str) -> Tensor:
    """The conditioning [77, width] of the empty prompt, float32 on the CPU, for the checkpoint of `family` at `path`.

    One layer is in memory at a time. Raises `IcmsrError` for a checkpoint without a text encoder or with a damaged one.
    """
    with open_tensors(path) as file:
        keys = set(file.keys())
        layout = text_layout(path, keys)
        encoder = _Encoder(path, file, keys, layout, second=family == "sd21")
        hidden = encoder.embedded()
        for number in range(encoder.layers):
            hidden = encoder.layer(hidden, number)
        result = encoder.norm(hidden, layout.norm)
    if not bool(result.isfinite().all()):
        raise IcmsrError(f"{path}: its text encoder gives NaN or infinite values: download it again")
    return result


class _Encoder:
    """The layers of a text encoder, read from its open file when they are needed."""

    def __init__(self, path: Path, file: TensorFile, keys: Collection[str], layout: TextLayout, second: bool) -> None:
        """`second`: as Stable Diffusion 2 uses it."""
        self._path, self._file, self._keys, self._layout, self._second = path, file, keys, layout, second
        start = layout.prefix + layout.layer
        found = {key[len(start) :].split(".")[0] for key in keys if key.startswith(start)}
        # Stable Diffusion 2 does not use the last of its 24 layers, which files with diffusers' names leave out.
        self.layers = len(found) - (second and layout.fused)

    def _get(self, name: str) -> Tensor:
        if self._layout.prefix + name not in self._keys:
            raise IcmsrError(f"{self._path}: {self._layout.prefix}{name} is missing: download the checkpoint again")
        return self._file.tensor(self._layout.prefix + name, torch.float32)

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        return F.linear(hidden, self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        """Layer norm by the weights called `name`."""
        return F.layer_norm(hidden, hidden.shape[-1:], self._get(f"{name}.weight"), self._get(f"{name}.bias"), 1e-5)

    def embedded(self) -> Tensor:
        """The empty prompt's tokens [77, width] with their positions."""
        words, positions = self._get(self._layout.tokens), self._get(self._layout.positions)
        if words.shape[0] != VOCABULARY:
            raise IcmsrError(
                f"{self._path}: its text encoder has {words.shape[0]} words instead of {VOCABULARY}: take another "
                "checkpoint"
            )
        padding = 0 if self._second else END_TOKEN
        ids = torch.tensor([START_TOKEN, END_TOKEN, *[padding] * (positions.shape[0] - 2)])
        return words[ids] + positions

    def layer(self, hidden: Tensor, number: int) -> Tensor:
        """One layer of the transformer over `hidden` [tokens, width]."""
        name = f"{self._layout.layer}{number}."
        names = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
        if not self._layout.fused:
            names = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        hidden = hidden + self._attention(self.norm(hidden, name + names[0]), name)
        inner = self._linear(self.norm(hidden, name + names[1]), name + names[2])
        inner = F.gelu(inner) if self._second else inner * torch.sigmoid(1.702 * inner)
        return hidden + self._linear(inner, name + names[3])

    def _attention(self, hidden: Tensor, name: str) -> Tensor:
        if self._layout.fused:
            weight, bias = self._get(f"{name}attn.in_proj_weight"), self._get(f"{name}attn.in_proj_bias")
            projected, out = F.linear(hidden, weight, bias).chunk(3, dim=-1), f"{name}attn.out_proj"
        else:
            projected = tuple(self._linear(hidden, f"{name}self_attn.{part}_proj") for part in "qkv")
            out = f"{name}self_attn.out_proj"
        tokens, width = hidden.shape
        heads = max(1, width // HEAD_WIDTH)
        query, key, value = (part.reshape(tokens, heads, -1).transpose(0, 1) for part in projected)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._linear(found.transpose(0, 1).reshape(tokens, width), out)
