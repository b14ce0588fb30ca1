"""T2I-Adapters on disk: a diffusers folder, or one .safetensors that describes itself.

Both hold the same tensors under diffusers' names, so ComfyUI's node, diffusers and the training here read either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter

from ...errors import IcmsrError
from ...weights.descriptions import OWN_ENTRY, own_description, read_description, shortened
from ...weights.diffusers_folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, write_configuration
from ...weights.generator_file import ADAPTER_FORMAT
from ...weights.pickles import read_tensor_pickle
from ...weights.tensor_files import check_finite, open_tensors, read_head, read_tensors, write_tensors

_TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")
_MOST = 1 << 16  # channels and the like beyond this are a damaged file
_FIELDS = ("in_channels", "channels", "num_res_blocks", "downscale_factor", "adapter_type")
_BODY = re.compile(r"^adapter\.body\.(\d+)\.resnets\.(\d+)\.block1\.weight$")


def make_adapter(channels_in: int, factor: int, widths: Sequence[int]) -> T2IAdapter:
    """A new ``full_adapter`` for maps of `channels_in` channels, a latent factor and the UNet's level widths."""
    return T2IAdapter(channels_in, list(widths), 2, factor, "full_adapter")


def save_adapter(path: Path, adapter: T2IAdapter, description: Mapping[str, Any], dtype: torch.dtype) -> list[Path]:
    """Writes `path`.safetensors and the diffusers folder `path`, each atomically file by file; returns both.

    `description` (JSON-able) says what the adapter was trained for: its ``structure``, family, base.
    """
    state = {key: value.detach().to("cpu", dtype) for key, value in adapter.state_dict().items()}
    config = {name: adapter.config[name] for name in _FIELDS}
    metadata = {"format": ADAPTER_FORMAT, OWN_ENTRY: json.dumps({"config": config, **description}, sort_keys=True)}
    single = path.with_name(path.name + ".safetensors")
    write_tensors(single, state, metadata)
    write_configuration(path, adapter)
    write_tensors(path / WEIGHTS_FILE, state, {**metadata, "format": "pt"})
    return [single, path]


def read_adapter_config(path: Path) -> dict[str, Any]:
    """``in_channels``, ``channels``, ``downscale_factor`` and so on of an adapter, and ``structure`` if it says.

    Reads no weights. A file without a description (another tool's) gives what its shapes tell, with a downscale factor
    of 0. Raises `IcmsrError` for a missing, damaged or foreign file.
    """
    if path.is_dir():
        config_file = path / CONFIG_FILE
        if not config_file.is_file():
            raise IcmsrError(f"{path}: not a T2I-Adapter, {CONFIG_FILE} is missing")
        config = read_description(config_file)
        missing = [name for name in _FIELDS if name not in config]
        if missing:
            raise IcmsrError(f"{config_file}: not the configuration of a T2I-Adapter: {', '.join(missing)} missing")
        weights = path / WEIGHTS_FILE
        if not weights.is_file() and not (path / PICKLE_FILE).is_file():
            raise IcmsrError(f"{path}: {WEIGHTS_FILE} is missing: download the folder again")
        extra = own_description(weights, read_head(weights)[1]) if weights.is_file() else {}
        return _checked_config(config_file, config) | {"structure": extra.get("structure")}
    if not path.is_file():
        raise IcmsrError(f"{path}: no such adapter file or folder: train one with train/adapter.py")
    described = own_description(path, read_head(path)[1])
    if "config" in described:
        return _checked_config(path, described["config"]) | {"structure": described.get("structure")}
    return _from_shapes(path)


def _checked_config(path: Path, config: Any) -> dict[str, Any]:
    """The `_FIELDS` of `config`; raises `IcmsrError` where one is missing or makes no network."""
    values = config if isinstance(config, dict) else {}
    channels = values.get("channels")
    sizes = {"in_channels": 1, "num_res_blocks": 1, "downscale_factor": 0}
    fits = {
        **{name: type(values.get(name)) is int and least <= values[name] <= _MOST for name, least in sizes.items()},
        "channels": isinstance(channels, list)
        and bool(channels)
        and all(type(one) is int and 1 <= one <= _MOST for one in channels),
        "adapter_type": values.get("adapter_type") in _TYPES,
    }
    wrong = [name for name in _FIELDS if not fits[name]]
    if wrong:
        got = ", ".join(f"{name} {shortened(values.get(name))}" for name in wrong)
        raise IcmsrError(f"{path}: no T2I-Adapter can be built from its configuration, got {got}: download it again")
    return {name: values[name] for name in _FIELDS}


def check_adapter(path: Path, channels_in: int, factor: int, widths: Sequence[int], structure: Any = None) -> None:
    """Raises `IcmsrError` unless the adapter at `path` takes `channels_in` channels and fits the base's levels.

    With `structure` (kind and settings of the condition), an adapter that says it was trained for another is refused:
    it would work without a word and mean nothing.
    """
    config = read_adapter_config(path)
    taken = config["in_channels"] // (factor**2 if config["downscale_factor"] == 0 else 1)
    if taken != channels_in:
        raise IcmsrError(f"{path}: the adapter takes {taken} channels, the condition has {channels_in}")
    made = list(config["channels"])
    if config["adapter_type"] == "light_adapter":  # it makes one level more than it names
        made += made[-1:]
    if made != list(widths):
        raise IcmsrError(f"{path}: the adapter is for a UNet of widths {made}, the base has {list(widths)}")
    if config["downscale_factor"] not in (0, factor):
        raise IcmsrError(f"{path}: the adapter downscales by {config['downscale_factor']}, the base's VAE by {factor}")
    trained = config.get("structure")
    if structure is not None and trained and trained != structure:
        raise IcmsrError(f"{path}: the adapter was trained for {trained}, the condition is {structure}")


def load_adapter(path: Path, factor: int = 8) -> T2IAdapter:
    """The adapter at `path` in float32. `factor` serves files that do not describe themselves. Raises `IcmsrError`."""
    config = {key: value for key, value in read_adapter_config(path).items() if key in _FIELDS}
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        state = read_tensor_pickle(path / PICKLE_FILE)
    else:
        state = read_tensors(path / WEIGHTS_FILE if path.is_dir() else path)[0]
    if config["downscale_factor"] == 0:
        config |= {"downscale_factor": factor, "in_channels": config["in_channels"] // factor**2}
    adapter = T2IAdapter(**config)
    check_finite(path, state)
    try:
        adapter.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise IcmsrError(f"{path}: damaged adapter: {' '.join(str(error).split())}") from error
    return adapter


def _from_shapes(path: Path) -> dict[str, Any]:
    with open_tensors(path) as file:
        names = file.keys()
        shapes = {name: file.shape(name) for name in names}
    blocks = sorted((int(match[1]), int(match[2])) for match in map(_BODY.match, names) if match)
    if not blocks or "adapter.conv_in.weight" not in shapes:
        raise IcmsrError(f"{path}: not a T2I-Adapter of diffusers' full_adapter layout")
    levels = blocks[-1][0] + 1
    return {
        "in_channels": shapes["adapter.conv_in.weight"][1],
        "channels": [shapes[f"adapter.body.{level}.resnets.0.block1.weight"][0] for level in range(levels)],
        "num_res_blocks": blocks[-1][1] + 1,
        "downscale_factor": 0,
        "adapter_type": "full_adapter",
    }
