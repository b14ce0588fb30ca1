"""A base model on disk: a diffusers folder (`unet/`, `vae/`), with `icmsr_base.json` beside them or plain.

A plain folder is Stable Diffusion as it is published, with `scheduler/scheduler_config.json`: its family is read off
the UNet's configuration. Read with json and safetensors alone, so that the ComfyUI nodes need no diffusers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .backbone import BackboneDescriptor
from .errors import IcmsrError
from .generator_file import Generator, info_from_json, read_tensors
from .noise_schedule import NoiseSchedule, Prediction, check_prediction

INFO_FILE = "icmsr_base.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
HALF_FILE = "diffusion_pytorch_model.fp16.safetensors"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
PROMPT_FILE = "prompt_embedding.safetensors"

SD_WIDTHS = (320, 640, 1280, 1280)
"""UNet widths of Stable Diffusion 1 and 2."""
SD_FAMILIES = {768: "sd15", 1024: "sd21"}
"""Family by the width of the text context, which alone tells the two UNets apart."""
SD_SCALING = 0.18215
"""Latent scale of Stable Diffusion's VAEs, and diffusers' default where an older configuration does not state it."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in VAE checkpoints from before diffusers 0.17, and today's."""


@dataclass(frozen=True)
class BaseInfo:
    """What a base folder says of itself beyond the diffusers configurations."""

    name: str
    """Name of the model, for people."""
    family: str
    """Family that generator files refer to."""
    prediction: Prediction = "eps"
    """What the UNet, as a diffusion prior, predicts."""
    beta_start: float = 0.00085
    """Scaled-linear noise schedule, first beta."""
    beta_end: float = 0.012
    """Scaled-linear noise schedule, last beta."""
    steps: int = 1000
    """Training timesteps."""
    licence: str = ""
    """Licence of the weights (SPDX)."""


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of one network are."""

    path: Path
    """The .safetensors, or the index of a sharded one."""
    shards: tuple[Path, ...]
    """The files that hold the tensors, in name order: `path` alone, or those that the index names."""


@dataclass(frozen=True)
class BaseFolder:
    """An opened base folder: configurations read and checked, weights not yet loaded."""

    path: Path
    info: BaseInfo
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]

    @property
    def schedule(self) -> NoiseSchedule:
        """The prior's noise schedule."""
        return NoiseSchedule(self.info.beta_start, self.info.beta_end, self.info.steps)

    def unet_weights_path(self) -> Path:
        """The UNet's .safetensors, or the index of its shards."""
        return find_weights(self.path, "unet").path

    def unet_state(self) -> dict[str, Tensor]:
        """The UNet's tensors under their diffusers names; they may be views of the mapped files."""
        return self._state("unet")

    def vae_state(self) -> dict[str, Tensor]:
        """The VAE's tensors under their diffusers names; they may be views of the mapped files."""
        return self._state("vae")

    def tensors(self, part: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything in `part` (``unet``, ``vae``), one at a time, floating ones in `dtype`.

        Each has memory of its own. The file is opened anew for each, because the pages of a mapped file count as the
        process's memory for as long as it is open: the peak is what the caller keeps and one tensor more.
        Raises `IcmsrError` for a damaged file.
        """
        for path in find_weights(self.path, part).shards:
            try:
                with safe_open(str(path), framework="pt") as file:
                    keys = list(file.keys())
                for key in keys:
                    with safe_open(str(path), framework="pt") as file:
                        yield _present_name(part, key), _cast_copy(file.get_tensor(key), dtype)
            except (SafetensorError, OSError) as error:
                raise IcmsrError(
                    f"{path}: not a readable .safetensors file ({error}): download or export it again"
                ) from error

    def _state(self, part: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for path in find_weights(self.path, part).shards:
            state |= {_present_name(part, key): value for key, value in read_tensors(path)[0].items()}
        return state

    def prompt_embedding(self) -> Tensor | None:
        """The prior's constant context [tokens, width], or None when the folder has none."""
        path = self.path / PROMPT_FILE
        if not path.is_file():
            return None
        tensors = read_tensors(path)[0]
        if "prompt_embedding" not in tensors or tensors["prompt_embedding"].ndim != 2:
            raise IcmsrError(f"{path}: must hold the tensor prompt_embedding [tokens, width]: write the base again")
        return tensors["prompt_embedding"]

    def hash(self) -> str:
        """SHA-256 of the UNet's weights file, as generator files record it; of shards one after another by name."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256()
        for path in find_weights(self.path, "unet").shards:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):  # the large families' weights are gigabytes
                    digest.update(block)
        return digest.hexdigest()

    def descriptor(self, generator: Generator | None = None) -> BackboneDescriptor:
        """The backbone that this base gives, with `generator`'s timestep and prediction, or the prior's own at t = 0.

        Raises `IcmsrError` when the generator belongs to another family.
        """
        if generator is not None and generator.info.family != self.info.family:
            raise IcmsrError(
                f"the generator is for the family {generator.info.family!r}, "
                f"the base {self.info.name!r} is {self.info.family!r}: choose files of one family"
            )
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        descriptor = BackboneDescriptor(
            family=self.info.family,
            latent_channels=int(self.vae_config["latent_channels"]),
            latent_factor=factor,
            multiple_of=factor * 2 ** (len(self.unet_config["block_out_channels"]) - 1),
            timestep=0 if generator is None else generator.info.timestep,
            prediction=self.info.prediction if generator is None else generator.info.prediction,
            schedule=self.schedule,
        )
        self.schedule.check_timestep(descriptor.timestep)
        return descriptor


def open_base(path: Path) -> BaseFolder:
    """The base folder at `path`; an `IcmsrError` names what is missing, cannot be read or is of no known family."""
    if not path.is_dir():
        raise IcmsrError(f"{path}: no such base folder")
    plain = not (path / INFO_FILE).is_file()
    if plain and not (path / SCHEDULER_FILE).is_file():
        raise IcmsrError(
            f"{path}: not a base folder of ICM-SR, {INFO_FILE} is missing "
            f"(a plain Stable Diffusion folder has {SCHEDULER_FILE} instead)"
        )
    for part in ("unet", "vae"):
        if not (path / part / "config.json").is_file():
            raise IcmsrError(f"{path}: not a base folder of ICM-SR, {part}/config.json is missing")
        find_weights(path, part)
    info = None if plain else info_from_json(str(path / INFO_FILE), BaseInfo, _read_json(path / INFO_FILE))
    configs = {}
    for part, needed_keys in (
        ("unet", ("block_out_channels", "cross_attention_dim")), ("vae", ("block_out_channels", "latent_channels"))
    ):
        configs[part] = _read_json(path / part / "config.json")
        missing = [key for key in needed_keys if key not in configs[part]]
        if missing:
            raise IcmsrError(f"{path / part / 'config.json'}: {', '.join(missing)} missing: write the base again")
    configs["vae"].setdefault("scaling_factor", SD_SCALING)
    info = info or _published_info(path, configs["unet"])
    check_prediction(info.prediction)
    return BaseFolder(path, info, configs["unet"], configs["vae"])


def find_weights(base: Path, part: str) -> WeightFiles:
    """The weights in the folder `part` of `base`: one file, else shards under an index, else the fp16 variant.

    Raises `IcmsrError` when there are none, or when the index cannot be read or names a shard that is not there.
    """
    folder = base / part
    if (folder / WEIGHTS_FILE).is_file():
        return WeightFiles(folder / WEIGHTS_FILE, (folder / WEIGHTS_FILE,))
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / HALF_FILE).is_file():
            return WeightFiles(folder / HALF_FILE, (folder / HALF_FILE,))
        raise IcmsrError(
            f"{base}: not a base folder of ICM-SR, {part}/{WEIGHTS_FILE} is missing "
            f"(so are {HALF_FILE} and {INDEX_FILE}; pickled .bin weights must be saved as .safetensors first)"
        )
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_file_name(name) for name in names.values()):
        raise IcmsrError(f"{index}: its weight_map must name a file of its folder for each tensor: download it again")
    shards = tuple(folder / name for name in sorted(set(names.values())))
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise IcmsrError(f"{index}: names {', '.join(absent[:4])}, which is missing: download the folder again")
    return WeightFiles(index, shards)


def _published_info(path: Path, unet_config: Mapping[str, Any]) -> BaseInfo:
    """What a plain Stable Diffusion folder is, by its configurations (ours)."""
    # The layers and the class embedding tell the distilled and the unCLIP UNets of the same widths from the originals.
    expected = {
        "block_out_channels": list(SD_WIDTHS), "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "class_embed_type": None, "addition_embed_type": None,
    }
    found = {key: unet_config.get(key, value) for key, value in expected.items()}
    found["block_out_channels"] = list(found["block_out_channels"])
    width = unet_config["cross_attention_dim"]
    if found != expected or not isinstance(width, int) or width not in SD_FAMILIES:
        odd = [f"{key} {value}" for key, value in found.items() if value != expected[key]]
        families = ", ".join(f"{family} with {context}" for context, family in SD_FAMILIES.items())
        raise IcmsrError(
            f"{path}/unet: of no known family, found {', '.join([f'cross_attention_dim {width}', *odd])}; known are "
            f"UNets of the widths {list(SD_WIDTHS)} with 4 channels ({families}): another base needs an {INFO_FILE}"
        )
    file = path / SCHEDULER_FILE
    scheduler = _read_json(file)
    if scheduler.get("beta_schedule") != "scaled_linear":
        raise IcmsrError(f"{file}: beta_schedule must be scaled_linear, got {scheduler.get('beta_schedule')!r}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if scheduler.get(key):
            raise IcmsrError(f"{file}: {key} changes the noise schedule and is not supported: choose another base")
    predictions = {"epsilon": "eps", "v_prediction": "v"}
    stated = scheduler.get("prediction_type", "epsilon")  # Stable Diffusion 1's own files do not state it
    if stated not in predictions:
        raise IcmsrError(f"{file}: prediction_type must be one of {', '.join(predictions)}, got {stated!r}")
    values = {
        "name": _published_name(path, unet_config), "family": SD_FAMILIES[width], "prediction": predictions[stated],
        "steps": scheduler.get("num_train_timesteps", 1000),
    }
    for key in ("beta_start", "beta_end"):
        if key not in scheduler:
            raise IcmsrError(f"{file}: {key} is missing: download the folder again")
        values[key] = scheduler[key]
    info = info_from_json(str(file), BaseInfo, values)
    NoiseSchedule(info.beta_start, info.beta_end, info.steps)  # raises for numbers that make no schedule
    return info


def _published_name(path: Path, unet_config: Mapping[str, Any]) -> str:
    """The folder's name; of a snapshot in a hub cache, whose folder is named by a commit, the model's."""
    full = Path(os.path.abspath(path))
    if not re.fullmatch(r"[0-9a-f]{40}", full.name):
        return full.name
    owner = full.parent.parent.name  # models--owner--name/snapshots/commit
    if owner.startswith("models--"):
        return owner.removeprefix("models--").replace("--", "/")
    return str(unet_config.get("_name_or_path") or full.name)


def _present_name(part: str, key: str) -> str:
    if part != "vae":
        return key
    return re.sub(
        r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.)", lambda match: OLD_ATTENTION[match[1]], key
    )


def _cast_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and not re.search(r"[/\\]", value)


def write_base_info(path: Path, info: BaseInfo) -> None:
    """Writes `icmsr_base.json` into the folder `path`."""
    (path / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IcmsrError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise IcmsrError(f"{path}: expected a JSON object")
    return values


def default_prompt_embedding(tokens: int, width: int) -> Tensor:
    """The constant context of a text-free base, [tokens, width]: seeded normal values (ours).

    Any constant would do; zeros would leave the cross-attention's key and value matrices without a gradient.
    """
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(2211))
