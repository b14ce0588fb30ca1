"""A base model on disk: a diffusers folder (`unet/`, `vae/`) with `icmsr_base.json` beside them.

Read with json and safetensors alone, so that the ComfyUI nodes need no diffusers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import BackboneDescriptor
from .errors import IcmsrError
from .generator_file import Generator, info_from_json, read_tensors
from .noise_schedule import NoiseSchedule, Prediction, check_prediction

INFO_FILE = "icmsr_base.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PROMPT_FILE = "prompt_embedding.safetensors"


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
        """The UNet's .safetensors."""
        return self.path / "unet" / WEIGHTS_FILE

    def unet_state(self) -> dict[str, Tensor]:
        """The UNet's tensors under their diffusers names."""
        return read_tensors(self.unet_weights_path())[0]

    def vae_state(self) -> dict[str, Tensor]:
        """The VAE's tensors under their diffusers names."""
        return read_tensors(self.path / "vae" / WEIGHTS_FILE)[0]

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
        """SHA-256 of the UNet's weights file, as generator files record it."""
        digest = hashlib.sha256()
        with open(self.unet_weights_path(), "rb") as file:
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
    """The base folder at `path`; an `IcmsrError` names what is missing or cannot be read."""
    if not path.is_dir():
        raise IcmsrError(f"{path}: no such base folder")
    for needed in (INFO_FILE, "unet/config.json", "vae/config.json", f"unet/{WEIGHTS_FILE}", f"vae/{WEIGHTS_FILE}"):
        if not (path / needed).is_file():
            raise IcmsrError(f"{path}: not a base folder of ICM-SR, {needed} is missing")
    info = info_from_json(str(path / INFO_FILE), BaseInfo, _read_json(path / INFO_FILE))
    check_prediction(info.prediction)
    configs = {}
    for part, needed_keys in (
        ("unet", ("block_out_channels", "cross_attention_dim")), ("vae", ("block_out_channels", "latent_channels"))
    ):
        configs[part] = _read_json(path / part / "config.json")
        missing = [key for key in needed_keys if key not in configs[part]]
        if missing:
            raise IcmsrError(f"{path / part / 'config.json'}: {', '.join(missing)} missing: write the base again")
    return BaseFolder(path, info, configs["unet"], configs["vae"])


def write_base_info(path: Path, info: BaseInfo) -> None:
    """Writes `icmsr_base.json` into the folder `path`."""
    (path / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
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
