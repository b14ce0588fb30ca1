"""Stable Diffusion checkpoints in one file, in the original (CompVis) layout: configurations and diffusers names.

    model.diffusion_model.*    the UNet            model_ema.*                    its running average, not used
    first_stage_model.*        the VAE             cond_stage_model.*, betas, ... the text encoder, ..., not used

The configurations follow from the shapes; weights are read elsewhere. Pickled checkpoints (.ckpt) are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IcmsrError
from .descriptions import own_description
from .file_kinds import known_kind
from .generator_file import ADAPTER_FORMAT, GENERATOR_FORMAT
from .sd_families import SD_FAMILIES, SD_VAE_WIDTHS, SD_WIDTHS, sd_unet_config, sd_vae_config, unknown_family
from .tensor_files import open_tensors

BASE_FORMAT = "icmsr-base"
"""``format`` in the metadata of a checkpoint with a description: ``icmsr`` is then the JSON of icmsr_base.json."""
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
"""Prefixes of the keys of the two networks."""
SD_LEVELS = 4
"""Levels of both networks."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Endings of pickles, which can run code when they are read."""
V_STATISTIC = ("output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09)
"""A tensor of SD2's UNet, and the standard deviation above which ComfyUI assumes v-prediction (its
`supported_models.SD20`). Nothing else in a checkpoint tells eps and v apart."""
STATED_PREDICTIONS = {"epsilon": "eps", "v": "v", "v_prediction": "v"}
"""Our names for the values of the metadata entry ``modelspec.prediction_type`` (Stability AI's ModelSpec)."""

_UNET_MODULES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file without its weights."""

    values: Mapping[str, Any]
    """Fields of `BaseInfo`."""
    unet_config: Mapping[str, Any]
    """diffusers' configuration of its UNet."""
    vae_config: Mapping[str, Any]
    """diffusers' configuration of its VAE."""


def read_checkpoint(path: Path) -> Checkpoint:
    """The family, prediction and configurations of the checkpoint file at `path`.

    Published Stable Diffusion 1 and 2 are recognised by their shapes. Whether Stable Diffusion 2 predicts eps or v is
    taken from the metadata entry ``modelspec.prediction_type``, or else guessed as ComfyUI does. A file with the
    metadata of `BASE_FORMAT` states all this itself and may have other widths.

    Raises `IcmsrError` for anything else, and says what it is if that can be seen: a pickle, a LoRA, a VAE, SDXL, ...
    """
    _check_head(path)
    with open_tensors(path) as file:
        keys, metadata = set(file.keys()), file.metadata()
        _check_kind(path, keys, metadata)

        def shape(part: str, key: str) -> list[int]:
            full = PREFIXES[part] + key
            return file.shape(full) if full in keys else []

        unet_config, vae_config, odd = _configurations(shape)
        own = metadata.get("format") == BASE_FORMAT
        family = SD_FAMILIES.get(unet_config["cross_attention_dim"])
        if odd or (not own and family is None):
            context = {"cross_attention_dim": unet_config["cross_attention_dim"]}
            raise unknown_family(str(path), {**context, **odd}, "choose a checkpoint of one of these")
        if own:
            return Checkpoint(own_description(path, metadata), unet_config, vae_config)
        published = {"unet": (SD_WIDTHS, unet_config), "vae": (SD_VAE_WIDTHS, vae_config)}
        wrong = {
            f"{part} widths": config["block_out_channels"]
            for part, (widths, config) in published.items()
            if config["block_out_channels"] != list(widths)
        }
        if wrong:
            raise unknown_family(str(path), wrong, "choose a checkpoint of one of these")
        prediction = STATED_PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
        key, limit = V_STATISTIC
        if prediction is None and family == "sd21" and shape("unet", key):
            spread = float(file.tensor(PREFIXES["unet"] + key, torch.float32).std(correction=0))
            prediction = "v" if spread > limit else "eps"
        licence = metadata.get("modelspec.license", "")
        values = {"name": path.stem, "family": family, "prediction": prediction or "eps", "licence": licence}
        return Checkpoint(values, unet_config, vae_config)


def diffusers_name(part: str, key: str) -> str | None:
    """The diffusers name of the checkpoint's `key`; None when it does not belong to `part` (``unet``, ``vae``).

    An unknown key of that network keeps its name, so that loading fails and names it.
    """
    if not key.startswith(PREFIXES[part]):
        return None
    inner = key.removeprefix(PREFIXES[part])
    if part == "unet":
        return _unet_name(inner)
    if not inner.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
        return None  # the loss that the VAE was trained with
    return _vae_name(inner)


def diffusers_shape(part: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in diffusers: the VAE's attention has linear layers there, 1x1 convolutions in checkpoints."""
    return shape[:2] if part == "vae" and ".attentions." in name and len(shape) > 2 else shape


def diffusers_tensor(part: str, name: str, tensor: Tensor) -> Tensor:
    """`tensor` in diffusers' shape for `name`."""
    return tensor.reshape(diffusers_shape(part, name, tuple(tensor.shape)))


def _unet_name(inner: str) -> str:
    module, _, leaf = inner.rpartition(".")
    if module in _UNET_MODULES:
        return f"{_UNET_MODULES[module]}.{leaf}"
    if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", inner):
        way, number, inside, rest = found[1], int(found[2]), int(found[3]), found[4]
        # Three entries per block: two layers and the downsampler on the way down, three layers on the way up.
        block, layer = divmod(number - 1 if way == "input" else number, 3)
        start = f"{'down' if way == 'input' else 'up'}_blocks.{block}"
        if rest.startswith("op."):
            return f"{start}.downsamplers.0.conv.{leaf}"
        if rest.startswith("conv."):
            return f"{start}.upsamplers.0.{rest}"
        is_attention = inside == 1
    elif found := re.fullmatch(r"middle_block\.([012])\.(.+)", inner):
        inside, rest, start = int(found[1]), found[2], "mid_block"
        layer, is_attention = inside // 2, inside == 1
    else:
        return inner
    if is_attention:
        return f"{start}.attentions.{layer}.{rest}"
    submodule = rest.rpartition(".")[0]
    return f"{start}.resnets.{layer}.{_RESNET[submodule]}.{leaf}" if submodule in _RESNET else inner


def _vae_name(inner: str) -> str:
    if found := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)", inner):
        return f"{found[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(found[2], found[2])}.{found[3]}"
    name = inner.replace(".nin_shortcut.", ".conv_shortcut.").replace("coder.norm_out.", "coder.conv_norm_out.")
    name = re.sub(r"coder\.mid\.block_([12])\.", lambda m: f"coder.mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(r"^encoder\.down\.(\d)\.", r"encoder.down_blocks.\1.", name)
    # The checkpoint numbers the decoder's blocks from the picture, diffusers from the latent.
    name = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up_blocks.{SD_LEVELS - 1 - int(m[1])}.", name)
    name = re.sub(r"_blocks\.(\d)\.block\.(\d)\.", r"_blocks.\1.resnets.\2.", name)
    return re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)


def _check_head(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # eight bytes of length, then JSON
        return
    if path.suffix in PICKLES or head.startswith((b"PK", b"\x80")):
        raise IcmsrError(
            f"{path}: a pickled checkpoint, which can run code when it is read: "
            "choose the .safetensors file of the same model"
        )
    if path.suffix.lower() != ".safetensors":
        raise IcmsrError(f"{path}: neither a base folder nor a .safetensors checkpoint")


def _check_kind(path: Path, keys: Collection[str], metadata: Mapping[str, str]) -> None:
    def any_starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    kind = ""
    if metadata.get("format") == GENERATOR_FORMAT:
        kind = "a generator file, not a base: use it as the generator"
    elif metadata.get("format") == ADAPTER_FORMAT:
        kind = "a T2I-Adapter, not a base"
    elif (known := known_kind(keys)) != "a checkpoint":
        kind = known + {
            "a T2I-Adapter": ", not a base",
            "a LoRA": ", not a base",
            "a VAE alone": "",
            "a diffusers UNet alone": ": name the folder that holds unet/ and vae/",
            "": f"not a Stable Diffusion checkpoint: no key begins with {PREFIXES['unet']}",
        }.get(known, ": Stable Diffusion 1.5 or 2.1 is needed")
    elif f"{PREFIXES['unet']}input_blocks.0.0.weight" not in keys:
        kind = "a model of another kind, without Stable Diffusion's UNet"
    elif not any_starts(PREFIXES["vae"]):
        kind = f"a checkpoint without its VAE ({PREFIXES['vae']}*)"
    if kind:
        raise IcmsrError(f"{path}: {kind} (a base is a diffusers folder or a full .safetensors checkpoint)")


def _configurations(shape: Callable[[str, str], list[int]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Configurations of UNet and VAE from their shapes, and the values that Stable Diffusion does not have."""

    def side(part: str, key: str, axis: int) -> int:
        sides = shape(part, key)
        return sides[axis] if len(sides) > axis else 0

    # The first layer of each level.
    widths = [side("unet", f"input_blocks.{3 * level + 1}.0.out_layers.3.weight", 0) for level in range(SD_LEVELS)]
    vae_widths = [side("vae", f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(SD_LEVELS)]
    context = side("unet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1)
    linear = len(shape("unet", "input_blocks.1.1.proj_in.weight")) == 2
    found = {
        "in_channels": (side("unet", "input_blocks.0.0.weight", 1), 4),
        "out_channels": (side("unet", "out.2.weight", 0), 4),
        "latent_channels": (side("vae", "decoder.conv_in.weight", 1), 4),
    }
    odd: dict[str, Any] = {key: number for key, (number, expected) in found.items() if number != expected}
    odd |= {f"{part} widths": each for part, each in (("unet", widths), ("vae", vae_widths)) if not all(each)}
    return sd_unet_config(widths, context, linear), sd_vae_config(vae_widths), odd
