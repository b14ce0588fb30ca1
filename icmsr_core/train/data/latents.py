"""Latents of whole photographs, encoded once and then read in crops: training a prior without its VAE in every step.

The frozen VAE takes most of a prior's step. Here each photograph is encoded whole, at a few sizes and also mirrored,
and a sample is a crop of one of these latents. The encoder then normalises over the whole photograph, as at inference,
instead of over a small crop.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ...errors import IcmsrError
from ...pictures.ranges import bytes_to_signed
from ...runtime.latents import encode_picture
from ...runtime.precision import autocast, lay_out
from ...weights.tensor_files import open_tensors, write_tensors
from ..settings import ADDED
from .cached_file import CachedSamples
from .data_config import DataConfig, find_photographs
from .sources import Pixels, read_photograph
from .synthetic import synthetic_picture

log = logging.getLogger(__name__)

_ATTEMPTS = 20  # photographs drawn for one sample before giving up
_MADE_UP = "made up"


@dataclass(frozen=True)
class LatentCacheConfig:
    """What is encoded beforehand."""

    enabled: bool = False
    """Encode the photographs once, into the run folder, and train on crops of their latents."""
    scales: tuple[float, ...] = (1.0, 0.7, 0.5)
    """Sizes at which every photograph is encoded, as factors of its height and width (shrunk by area). Sizes that would
    be smaller than data.crop are not made."""
    mirrored: bool = True
    """Also encode the mirror image of each: an encoder does not give mirrored latents for a mirrored picture."""
    made_up: int = 256
    """Number of made-up pictures that data.synthetic draws from, twice data.crop wide and high."""
    precision: str = field(default="fp32", metadata=ADDED)
    """What the VAE encodes in: fp32, or bf16, which is faster on cards and on CPUs with instructions for it. The
    latents are then rounded to 8 bits."""

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise IcmsrError(f"latents.scales must be one or more factors above 0 and at most 1, got {self.scales}")
        check_encoder_precision(self.precision)
        if self.made_up < 1:
            raise IcmsrError(f"latents.made_up must be at least 1, got {self.made_up}")


class CachedLatents(CachedSamples):
    """Samples by number, each a function of the seed and its number alone. Each is a dict of tensors:

    - ``latent`` float32 [C, crop / factor, crop / factor]: the posterior's mode times the scaling factor;
    - ``index``, ``caption``, ``events`` and ``unreadable`` as in `TrainingPairs`.

    `file` is written if it is missing, or if it holds something else than `config`, `cache` and `vae` ask for.
    Raises IcmsrError for sources that are missing or malformed, and where no photograph can be used.
    """

    def __init__(
        self,
        config: DataConfig,
        cache: LatentCacheConfig,
        seed: int,
        vae: AutoencoderKL,
        file: Path,
        held_out: bool = False,
    ) -> None:
        self.config, self.seed, self.file = config, seed, file
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._channels = int(vae.config.latent_channels)
        self._made_up = 0.0 if held_out else config.synthetic
        self._sources = find_photographs(config, held_out) if config.synthetic < 1 else None
        self.photographs = self._sources.paths if self._sources else []
        if config.crop % self._factor:
            raise IcmsrError(f"data.crop must be a multiple of {self._factor}, the VAE's factor, got {config.crop}")
        description = json.dumps(
            {
                "vae": weights_hash(vae),
                "crop": config.crop,
                "seed": seed,
                "made up": self._made_up > 0,
                "photographs": [[path.name, path.stat().st_size] for path in self.photographs],
                **described(cache),
            }
        )
        if not self.holds(description):
            self._encode(cache, vae, description)
        self._sizes: dict[str, list[tuple[str, int, int]]] = {}
        with open_tensors(file) as opened:
            for key in sorted(opened.keys()):
                _, height, width = opened.shape(key)
                self._sizes.setdefault(key.split("/")[0], []).append((key, height, width))
        if not self._sizes:
            raise IcmsrError(
                f"none of {len(self.photographs)} photographs is readable and at least {config.crop} px "
                "high and wide: set a smaller data.crop"
            )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        cells = self.config.crop // self._factor
        key, height, width = self._draw(rng)
        top, left = int(rng.integers(height - cells + 1)), int(rng.integers(width - cells + 1))
        latent = self.opened().get_slice(key)[:, top : top + cells, left : left + cells]
        return {**self.marks(index), "caption": torch.tensor(0), "latent": latent.float().contiguous()}

    def blank(self) -> dict[str, Tensor]:
        """See `Samples`."""
        cells = self.config.crop // self._factor
        return {**self.marks(0), "caption": torch.tensor(0), "latent": torch.zeros(self._channels, cells, cells)}

    def _draw(self, rng: np.random.Generator) -> tuple[str, int, int]:
        """Key, height and width of one of the latents, a random photograph's or made-up picture's."""
        if self._sources is None or rng.random() < self._made_up:
            return self._sizes[_MADE_UP][int(rng.integers(len(self._sizes[_MADE_UP])))]
        for _ in range(_ATTEMPTS):
            found = self._sizes.get(str(self._sources.draw(rng)))
            if found:
                return found[int(rng.integers(len(found)))]
        raise IcmsrError(
            f"{_ATTEMPTS} photographs in a row are unreadable or smaller than {self.config.crop} px: set "
            "a smaller data.crop, or sort them out"
        )

    @torch.no_grad()
    def _encode(self, cache: LatentCacheConfig, vae: AutoencoderKL, description: str) -> None:
        log.info("encoding %d photographs into %s", len(self.photographs), self.file)
        device = next(vae.parameters()).device
        lay_out(vae, cache.precision)
        latents: dict[str, Tensor] = {}
        for name, picture in tqdm(self._pictures(cache), unit="picture", desc="encoding", disable=None):
            pixels = rearrange(torch.from_numpy(picture), "h w c -> 1 c h w").to(device)
            with autocast(device, cache.precision):
                latent = encode_picture(vae, bytes_to_signed(pixels))
            latents[name] = latent[0].to("cpu", torch.float16).contiguous()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.file, latents, {"description": description})

    def _pictures(self, cache: LatentCacheConfig) -> Iterator[tuple[str, Pixels]]:
        """Name and pixels of everything that is to be encoded; height and width are multiples of the VAE's factor."""
        for number, path in enumerate(self.photographs):
            try:
                photograph = read_photograph(path)
            except IcmsrError as error:
                log.warning("skipped in training: %s", error)
                continue
            for scale in cache.scales:
                height, width = (round(length * scale) for length in photograph.shape[:2])
                size = [length // self._factor * self._factor for length in (height, width)]
                if min(size) < self.config.crop:
                    continue
                yield from _both(f"{number}/{scale:g}", _shrunk(photograph, scale, size), cache.mirrored)
        for number in range(cache.made_up if self._made_up else 0):
            rng = np.random.default_rng((self.seed, 1 << 50, number))  # no sample has this number
            yield from _both(f"{_MADE_UP}/{number}", synthetic_picture(2 * self.config.crop, rng), cache.mirrored)


def check_encoder_precision(precision: str) -> None:
    """Raises `IcmsrError` for another precision of the encoder than fp32 and bf16."""
    if precision not in ("fp32", "bf16"):
        raise IcmsrError(f"latents.precision must be fp32 or bf16, got {precision!r}")


def described(cache: LatentCacheConfig) -> dict[str, Any]:
    """What a cached file says of its settings; of those of before 2026-11-30 the same as they said then."""
    return {name: value for name, value in asdict(cache).items() if (name, value) != ("precision", "fp32")}


def weights_hash(network: torch.nn.Module) -> str:
    """A hash of a network's weights, names included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _shrunk(photograph: Pixels, scale: float, size: list[int]) -> Pixels:
    """`photograph` times `scale`, its right and bottom rim cut off to `size` (height and width)."""
    if scale < 1:
        height, width = (round(length * scale) for length in photograph.shape[:2])
        photograph = np.asarray(cv2.resize(photograph, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return np.ascontiguousarray(photograph[: size[0], : size[1]])


def _both(name: str, picture: Pixels, mirrored: bool) -> Iterator[tuple[str, Pixels]]:
    yield f"{name}/plain", picture
    if mirrored:
        yield f"{name}/mirrored", np.ascontiguousarray(picture[:, ::-1])
