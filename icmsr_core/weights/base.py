"""A base model on disk: a diffusers folder (`unet/`, `vae/`), or a checkpoint in one file (`single_file.py`).

A folder either has an `icmsr_base.json`, or is Stable Diffusion as it is published, with
`scheduler/scheduler_config.json`: the UNet's configuration then tells the family. Only json and safetensors are needed
to read it, so the ComfyUI nodes can do without diffusers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone.noise_schedule import NoiseSchedule
from ..backbone.prediction import Prediction, check_prediction
from ..backbone.protocol import BackboneDescriptor
from ..errors import IcmsrError
from ..whole_file import replace_file
from .descriptions import info_from, read_description, shortened
from .diffusers_folder import CONFIG_FILE, HALF_FILE, HALF_INDEX_FILE, INDEX_FILE, SCHEDULER_FILE, WEIGHTS_FILE
from .file_kinds import AGAIN
from .generator_file import Generator
from .generator_fit import check_family, check_prior
from .sd_families import SD_FILES, SD_SCALING, published_values
from .single_file import diffusers_name, diffusers_shape, diffusers_tensor, read_checkpoint
from .tensor_files import open_tensors, read_tensors

INFO_FILE = "icmsr_base.json"
PROMPT_FILE = "prompt_embedding.safetensors"

NEEDED_KEYS = {
    "unet": ("block_out_channels", "cross_attention_dim"),
    "vae": ("block_out_channels", "latent_channels"),
}
"""Sizes that the configuration of each network must state."""
MOST_CHANNELS = 1 << 20
"""Above any network's width; a damaged number that is larger would ask for all memory there is."""
REOPEN_AFTER = 1 << 22
"""Bytes of tensors to read before a weights file is closed and opened again."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the VAE's attention layers before diffusers 0.17, and now."""


@dataclass(frozen=True)
class BaseInfo:
    """Facts about a base that the diffusers configurations do not hold (`icmsr_base.json`)."""

    name: str
    """Name of the model, for people."""
    family: str
    """Family, which generator files state: ``nano``, ``sd21``, ``sd15``."""
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

    @property
    def schedule(self) -> NoiseSchedule:
        """The prior's noise schedule."""
        return NoiseSchedule(self.beta_start, self.beta_end, self.steps)


@dataclass(frozen=True)
class WeightFiles:
    """The weights files of one network."""

    path: Path
    """The .safetensors (for a base in one file, the whole checkpoint), or the index of a sharded one."""
    shards: tuple[Path, ...]
    """The files with the tensors, sorted by name: `path` itself, or those that the index lists."""


@dataclass(frozen=True)
class BaseFolder:
    """A base that was opened: configurations read and checked, weights not yet loaded."""

    path: Path
    """The folder, or the checkpoint file."""
    info: BaseInfo
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]

    @property
    def schedule(self) -> NoiseSchedule:
        """The prior's noise schedule."""
        return self.info.schedule

    def unet_weights_path(self) -> Path:
        """The UNet's .safetensors, or the index of its shards."""
        return find_weights(self.path, "unet").path

    def unet_state(self) -> dict[str, Tensor]:
        """The UNet's tensors by their diffusers names."""
        return self._state("unet")

    def vae_state(self) -> dict[str, Tensor]:
        """The VAE's tensors by their diffusers names."""
        return self._state("vae")

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of `part` (``unet``, ``vae``) by their diffusers names; no tensor is read."""
        found = {}
        for path, keys in groupby(self._keys(part), key=lambda entry: entry[0]):
            with open_tensors(path) as file:
                for _, key, name in keys:
                    found[name] = diffusers_shape(part, name, tuple(file.shape(key)))
        return found

    def parameter_count(self, part: str) -> int:
        """Number of values in `part` (``unet``, ``vae``), by the shapes alone."""
        return sum(math.prod(shape) for shape in self.shapes(part).values())

    def tensors(self, part: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of `part` (``unet``, ``vae``), one at a time; floating-point ones in `dtype`.

        The file is reopened every few megabytes: the pages of a mapped file count as
        the process's memory while it is open, and so the peak is what the caller keeps plus one tensor. Raises
        `IcmsrError` for a damaged file, and for a value that is not finite in `dtype`.
        """
        for path, group in groupby(self._keys(part), key=lambda entry: entry[0]):
            entries = deque(group)
            while entries:
                batch: dict[str, Tensor] = {}
                with open_tensors(path) as file:
                    while entries and sum(tensor.nbytes for tensor in batch.values()) < REOPEN_AFTER:
                        _, key, name = entries.popleft()
                        batch[name] = diffusers_tensor(part, name, file.tensor(key, dtype))
                        _check_finite(path, key, batch[name])
                yield from batch.items()

    def where(self, part: str) -> str:
        """The place of `part`, for an error."""
        return f"{self.path} ({part})" if self.path.is_file() else f"{self.path}/{part}"

    def _state(self, part: str) -> dict[str, Tensor]:
        state = {}
        for path, keys in groupby(self._keys(part), key=lambda entry: entry[0]):
            with open_tensors(path) as file:
                for _, key, name in keys:
                    state[name] = diffusers_tensor(part, name, file.tensor(key))
        return state

    def _keys(self, part: str) -> Iterator[tuple[Path, str, str]]:
        """File, key in the file and diffusers name of every tensor of `part`."""
        single = self.path.is_file()
        for path in find_weights(self.path, part).shards:
            with open_tensors(path) as file:
                keys = file.keys()
            for key in keys:
                name = diffusers_name(part, key) if single else _present_name(part, key)
                if name is not None:
                    yield path, key, name

    def prompt_embedding(self) -> Tensor | None:
        """The prior's constant context [tokens, width]; None when the base has none."""
        path = self.path / PROMPT_FILE
        if not path.is_file():
            return None
        tensors = read_tensors(path)[0]
        if "prompt_embedding" not in tensors or tensors["prompt_embedding"].ndim != 2:
            raise IcmsrError(f"{path}: must hold the tensor prompt_embedding [tokens, width]: write the base again")
        return tensors["prompt_embedding"]

    def hash(self) -> str:
        """SHA-256 of the UNet's weights file, as generator files record it; shards are hashed in the order of names."""
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
        """The descriptor of a backbone with this base and `generator`; without a generator, the prior at t = 0.

        Raises `IcmsrError` when the generator belongs to another family, or its LoRA to a prior that predicts something
        else.
        """
        if generator is not None:
            check_family(generator, self.info.family, f"the base {self.info.name!r}")
            where = f"the base {self.info.name!r}"
            if self.path.is_file():
                where += ", as its metadata says or its weights suggest; its diffusers folder states it"
            recorded = generator.info.base_hash
            check_prior(generator, self.info.prediction, where, lambda: recorded == self.hash())
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        descriptor = BackboneDescriptor(
            family=self.info.family,
            latent_channels=int(self.vae_config["latent_channels"]),
            latent_factor=factor,
            multiple_of=factor * 2 ** (len(self.unet_config["block_out_channels"]) - 1),
            timestep=0,
            prediction=self.info.prediction,
            schedule=self.schedule,
        )
        return descriptor if generator is None else descriptor.with_generator(generator.info)


def open_base(path: Path) -> BaseFolder:
    """The base at `path`: a folder, or a Stable Diffusion checkpoint in one .safetensors (see `read_checkpoint`).

    Raises `IcmsrError`, which names what is missing, cannot be read or is of no known family.
    """
    if path.is_file():
        checkpoint = read_checkpoint(path)
        own = info_from(path, BaseInfo, checkpoint.values)
        return _checked(BaseFolder(path, own, checkpoint.unet_config, checkpoint.vae_config))
    if not path.is_dir():
        raise IcmsrError(
            f"{path}: no such file or folder, a base is a diffusers folder or a checkpoint (.safetensors): for Stable "
            f"Diffusion 2.1-base download {SD_FILES['sd21']}"
        )
    plain = not (path / INFO_FILE).is_file()
    if plain and not (path / SCHEDULER_FILE).is_file():
        raise IcmsrError(
            f"{path}: not a base folder of ICM-SR, {INFO_FILE} is missing "
            f"(a plain Stable Diffusion folder has {SCHEDULER_FILE} instead)"
        )
    for part in ("unet", "vae"):
        if not (path / part / CONFIG_FILE).is_file():
            raise IcmsrError(f"{path}: not a base folder of ICM-SR, {part}/config.json is missing")
        find_weights(path, part)
    info = None if plain else info_from(path / INFO_FILE, BaseInfo, read_description(path / INFO_FILE))
    configs = {}
    for part, needed_keys in NEEDED_KEYS.items():
        configs[part] = read_description(path / part / CONFIG_FILE)
        missing = [key for key in needed_keys if key not in configs[part]]
        if missing:
            raise IcmsrError(f"{path / part / CONFIG_FILE}: {', '.join(missing)} missing: write the base again")
    configs["vae"].setdefault("scaling_factor", SD_SCALING)
    heads = configs["unet"].pop("num_attention_heads", None)
    if heads is not None:  # diffusers calls the same number attention_head_dim, and refuses this name
        configs["unet"]["attention_head_dim"] = heads
    if info is None:
        file = path / SCHEDULER_FILE
        way_out = f"another base needs an {INFO_FILE}"
        info = info_from(file, BaseInfo, published_values(path, configs["unet"], file, read_description(file), way_out))
    for part, sizes in NEEDED_KEYS.items():
        _check_config(path / part / CONFIG_FILE, configs[part], sizes)
    return _checked(BaseFolder(path, info, configs["unet"], configs["vae"]))


def _check_config(path: Path, config: Mapping[str, Any], sizes: Sequence[str]) -> None:
    """Raises `IcmsrError` where one of the `sizes` in diffusers' configuration at `path` is no size at all."""
    for key in sizes:
        value, many = config[key], key == "block_out_channels"
        numbers = value if many and isinstance(value, list) else [] if many else [value]
        if not numbers or not all(type(number) is int and 0 < number < MOST_CHANNELS for number in numbers):
            wanted = "a list of positive whole numbers" if many else "a positive whole number"
            raise IcmsrError(f"{path}: {key} must be {wanted}, got {shortened(value)}: {AGAIN}")
    scaling = config.get("scaling_factor", 1.0)
    if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        raise IcmsrError(f"{path}: scaling_factor must be a positive number, got {shortened(scaling)}: {AGAIN}")


def _checked(base: BaseFolder) -> BaseFolder:
    try:
        check_prediction(base.info.prediction)
        _ = base.schedule  # raises for numbers that do not make a schedule
    except IcmsrError as error:
        raise IcmsrError(f"{base.path}: {error}") from error
    return base


def find_weights(base: Path, part: str) -> WeightFiles:
    """The weights of `part` in the folder `base`: one file, else shards with an index, else the fp16 variant of these.

    For a checkpoint in one file, that file. Raises `IcmsrError` when there are none, when the index cannot be read, or
    when a shard is missing.
    """
    if base.is_file():
        return WeightFiles(base, (base,))
    folder = base / part
    found = [name for name in (WEIGHTS_FILE, INDEX_FILE, HALF_FILE, HALF_INDEX_FILE) if (folder / name).is_file()]
    if not found:
        raise IcmsrError(
            f"{base}: not a base folder of ICM-SR, {part}/{WEIGHTS_FILE} is missing (so are {INDEX_FILE}, {HALF_FILE} "
            f"and {HALF_INDEX_FILE}; pickled .bin weights must be saved as .safetensors first)"
        )
    index = folder / found[0]
    if index.suffix == ".safetensors":
        return WeightFiles(index, (index,))
    names = read_description(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_file_name(name) for name in names.values()):
        raise IcmsrError(f"{index}: its weight_map must name a file of its folder for each tensor: download it again")
    shards = tuple(folder / name for name in sorted(set(names.values())))
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise IcmsrError(f"{index}: names {', '.join(absent[:4])}, which is missing: download the folder again")
    return WeightFiles(index, shards)


def _present_name(part: str, key: str) -> str:
    if part != "vae":
        return key
    return re.sub(
        r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.)", lambda match: OLD_ATTENTION[match[1]], key
    )


def _check_finite(path: Path, key: str, tensor: Tensor) -> None:
    # Minimum and maximum are NaN if any value is, and need no memory for a mask.
    if tensor.is_floating_point() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
        raise IcmsrError(f"{path}: NaN or infinite values in {key} (as {tensor.dtype}): download or export it again")


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and not re.search(r"[/\\]", value)


def write_base_info(path: Path, info: BaseInfo) -> None:
    """Writes `icmsr_base.json` into the folder `path`."""
    replace_file(path / INFO_FILE, (json.dumps(asdict(info), indent=2) + "\n").encode())


def default_prompt_embedding(tokens: int, width: int) -> Tensor:
    """The constant context of a text-free base, [tokens, width]: seeded normal values (ours).

    Any constant would do; zeros would leave the cross-attention's key and value matrices without a gradient.
    """
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(2211))
