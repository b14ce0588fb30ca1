"""Published checkpoints are known by their shapes: full size, without their bytes."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.weights.base import BaseInfo, open_base
from tests.support.sd_files import ORIGINAL_PREFIX, original_name, original_tensor, shapes_of, unet_config, vae_config

UNET = ORIGINAL_PREFIX["unet"]

SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""The tensor that tells v-prediction."""


def write_hollow(path: Path, family: str, metadata: dict | None = None, drop: str = "", **shapes: list[int]) -> Path:
    """A checkpoint of the published size in float16 whose weights are a hole in the file: all zero, no room on disk.

    `shapes` replaces shapes by name (dots written as __), `drop` is the beginning of names that are left out.
    """
    table = {}
    for part, config in (("unet", unet_config(family)), ("vae", vae_config())):
        for key, shape in shapes_of(part, config).items():
            one = torch.empty(shape, device="meta")
            table[original_name(part, key)] = list(original_tensor(part, key, one).shape)
    table |= {key.replace("__", "."): shape for key, shape in shapes.items()}
    header, offset = {"__metadata__": metadata or {"format": "pt"}}, 0
    for key, shape in table.items():
        if drop and key.startswith(drop):
            continue
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def set_spread(path: Path, spread: float) -> None:
    """Writes values of that standard deviation into the tensor that tells v-prediction."""
    with open(path, "r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        start, end = json.loads(file.read(length))[SPREAD]["data_offsets"]
        file.seek(8 + length + start)
        values = torch.tensor([spread, -spread], dtype=torch.float16).repeat((end - start) // 4)
        file.write(values.numpy().tobytes())


@pytest.mark.parametrize(
    ("family", "spread", "metadata", "prediction"),
    [
        ("sd15", 0.0, {}, "eps"),
        ("sd15", 0.2, {}, "eps"),
        ("sd15", 0.0, {"modelspec.prediction_type": "v"}, "v"),
        ("sd21", 0.08, {}, "eps"),
        ("sd21", 0.1, {}, "v"),
        ("sd21", 0.1, {"modelspec.prediction_type": "epsilon"}, "eps"),
        ("sd21", 0.01, {"modelspec.prediction_type": "v", "modelspec.license": "openrail++"}, "v"),
    ],
)
def test_a_published_file_is_known_by_its_shapes(tmp_path, family, spread, metadata, prediction) -> None:
    path = write_hollow(tmp_path / "v2-1_512.safetensors", family, metadata)
    set_spread(path, spread)
    base = open_base(path)
    assert base.info == BaseInfo("v2-1_512", family, prediction, licence=metadata.get("modelspec.license", ""))
    for ours, published in ((base.unet_config, unet_config(family)), (base.vae_config, vae_config())):
        assert all(ours.get(key, value) == value for key, value in published.items() if key[0] != "_")
    descriptor = base.descriptor()
    assert (descriptor.latent_channels, descriptor.latent_factor, descriptor.multiple_of) == (4, 8, 64)
    assert path.stat().st_size > 1.8e9
    if os.name == "posix":
        assert path.stat().st_blocks * 512 < 20e6, "the test takes no room"


def test_sd_turbo_is_a_stable_diffusion_2_whose_text_encoder_has_sdxl_s_name(tmp_path) -> None:
    text = {"conditioner__embedders__0__model__token_embedding__weight": [49408, 1024]}
    base = open_base(write_hollow(tmp_path / "sd_turbo.safetensors", "sd21", **text))
    assert (base.info.family, base.info.prediction) == ("sd21", "eps")


KEYS = "model__diffusion_model__"


CONTEXT_KEY = f"{KEYS}input_blocks__1__1__transformer_blocks__0__attn2__to_k__weight"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({f"{KEYS}input_blocks__0__0__weight": [320, 9, 3, 3]}, "in_channels 9"),
        ({f"{KEYS}out__2__weight": [8, 320, 3, 3]}, "out_channels 8"),
        ({CONTEXT_KEY: [320, 2048]}, "cross_attention_dim 2048"),
        ({"drop": f"{UNET}input_blocks.1.1."}, "cross_attention_dim 0"),
        ({f"{KEYS}input_blocks__4__0__out_layers__3__weight": [96, 96, 3, 3]}, r"unet widths \[320, 96, 1280, 1280\]"),
        ({"drop": f"{UNET}input_blocks.10."}, r"unet widths \[320, 640, 1280, 0\]"),
        ({"first_stage_model__decoder__conv_in__weight": [512, 16, 3, 3]}, "latent_channels 16"),
        ({"first_stage_model__encoder__down__0__block__0__conv2__weight": [64, 64, 3, 3]}, r"vae widths \[64, 256"),
        ({"drop": "first_stage_model."}, r"a checkpoint without its VAE \(first_stage_model\.\*\)"),
        ({f"{KEYS}label_emb__0__0__weight": [1280, 2816]}, "SDXL or of another model with a class embedding"),
        ({"conditioner__embedders__0__x": [4], "conditioner__embedders__1__x": [4]}, "SDXL"),
    ],
)
def test_checkpoints_of_other_models_are_refused_by_kind(tmp_path, changes: dict, text: str) -> None:
    path = write_hollow(tmp_path / "other.safetensors", "sd21", **changes)
    ways_out = "choose a checkpoint of one of these|is needed|a base is a diffusers folder or a full"
    with pytest.raises(IcmsrError, match=rf"other\.safetensors: .*{text}.*({ways_out})"):
        open_base(path)
