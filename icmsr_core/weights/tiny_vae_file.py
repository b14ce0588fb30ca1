"""Reads a tiny VAE (TAESD, github.com/madebyollin/taesd, MIT) in the forms in which it is published.

The tensors get the names of diffusers' AutoencoderTiny; diffusers itself is not needed. Its latents are Stable
Diffusion's scaled latents (scaling factor 1), so it can replace the VAE directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbone.protocol import BackboneDescriptor
from ..errors import IcmsrError
from .descriptions import read_description
from .diffusers_folder import CONFIG_FILE, WEIGHTS_FILE
from .tensor_files import read_tensors

PAIR = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")
CLAMP_LAYERS = 1
"""Layers before the first convolution in TAESD's own decoder (a clamp), which diffusers does not count."""
FORMS = f"a diffusers folder ({CONFIG_FILE}, {WEIGHTS_FILE}), or {PAIR[0]} with {PAIR[1]} next to it"


@dataclass(frozen=True, eq=False)
class TinyVae:
    """A tiny VAE that was read but not yet built."""

    path: Path
    """The file it was read from."""
    state: Mapping[str, Tensor]
    """Its tensors by AutoencoderTiny's names: ``encoder.layers.0.weight``, ..."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """diffusers' configuration; entries that are missing have TAESD's values."""

    @property
    def latent_channels(self) -> int:
        """Channels of its latent."""
        return int(self.state["decoder.layers.0.weight"].shape[1])

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.config.get("num_decoder_blocks", (3, 3, 3, 1))) - 1))

    def check_fits(self, descriptor: BackboneDescriptor) -> None:
        """Raises `IcmsrError` when this VAE does not fit the latents of `descriptor`."""
        own = self.latent_channels, self.latent_factor
        wanted = descriptor.latent_channels, descriptor.latent_factor
        if own != wanted:
            raise IcmsrError(
                f"{self.path}: this tiny VAE has {own[0]} latent channels and {own[1]} pixels a cell, the family "
                f"{descriptor.family} has {wanted[0]} and {wanted[1]}: TAESD is for sd15 and sd21"
            )


def read_tiny_vae(path: Path) -> TinyVae:
    """The tiny VAE at `path`: a diffusers folder or its weights file, or TAESD's own folder or one of its two files.

    Raises `IcmsrError`, which says what is missing, for anything else.
    """
    if path.is_dir():
        if (path / WEIGHTS_FILE).is_file():
            path = path / WEIGHTS_FILE
        elif (path / PAIR[0]).is_file() or (path / PAIR[1]).is_file():
            path = path / PAIR[0]
        else:
            raise IcmsrError(f"{path}: no tiny VAE in this folder: expected {FORMS}")
    elif not path.is_file():
        raise IcmsrError(f"{path}: no such file or folder: --tiny-vae takes {FORMS}")
    if path.suffix.lower() != ".safetensors":
        raise IcmsrError(f"{path}: must be a .safetensors, pickled .pth and .bin files are never opened: use {FORMS}")
    if "encoder" in path.name or "decoder" in path.name:
        return _read_pair(path)
    state = read_tensors(path)[0]
    config = _read_config(path.with_name(CONFIG_FILE)) if path.with_name(CONFIG_FILE).is_file() else {}
    return _checked(TinyVae(path, state, config))


def _read_pair(path: Path) -> TinyVae:
    state = {}
    for part, shift in (("encoder", 0), ("decoder", CLAMP_LAYERS)):
        file = path.with_name(path.name.replace("encoder", part).replace("decoder", part))
        if not file.is_file():
            raise IcmsrError(f"{file}: not found next to {path.name}: a tiny VAE needs both encoder and decoder")
        for key, tensor in read_tensors(file)[0].items():
            number, _, rest = key.partition(".")
            if not number.isdigit():
                raise IcmsrError(f"{file}: not in TAESD's layout, found {key!r}: expected {FORMS}")
            state[f"{part}.layers.{int(number) - shift}.{rest}"] = tensor
    return _checked(TinyVae(path, state))


def _read_config(path: Path) -> dict[str, Any]:
    config = read_description(path)
    kind = config.get("_class_name")
    if kind != "AutoencoderTiny":
        raise IcmsrError(f"{path}: must be the configuration of an AutoencoderTiny, got {kind!r}: expected {FORMS}")
    return config


def _checked(tiny: TinyVae) -> TinyVae:
    absent = [key for key in ("encoder.layers.0.weight", "decoder.layers.0.weight") if key not in tiny.state]
    if absent:
        raise IcmsrError(f"{tiny.path}: not a tiny VAE, {' and '.join(absent)} missing: expected {FORMS}")
    return tiny
