"""A base model on disk: a diffusers folder (`unet/`, `vae/`) with `icmsr_base.json` beside them.

Read with json and safetensors alone, so that the ComfyUI nodes need no diffusers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import BackboneDescriptor
from .errors import IcmsrError
from .generator_file import Generator, read_tensors
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
        return read_tensors(path)[0]["prompt_embedding"] if path.is_file() else None

    def hash(self) -> str:
        """SHA-256 of the UNet's weights file, as generator files record it."""
        return hashlib.sha256(self.unet_weights_path().read_bytes()).hexdigest()

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
    values = _read_json(path / INFO_FILE)
    known = {entry.name for entry in fields(BaseInfo)}
    try:
        info = BaseInfo(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        raise IcmsrError(f"{path / INFO_FILE}: {error}") from error
    check_prediction(info.prediction)
    return BaseFolder(path, info, _read_json(path / "unet" / "config.json"), _read_json(path / "vae" / "config.json"))


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
