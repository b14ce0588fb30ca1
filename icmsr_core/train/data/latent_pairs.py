"""Pairs of latents, encoded once: training a generator without its VAE in every step.

The VAE takes most of a distillation's step. Where its encoder is frozen, the latents of the input and of the truth are
always the same for the same pair, so a run can encode some thousand pairs first and then train the UNet alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from ...errors import IcmsrError
from ...weights.tensor_files import write_tensors
from ..settings import ADDED
from .cached_file import CachedSamples
from .latents import check_encoder_precision
from .loader import Resumable, make_loader
from .pairs import TrainingPairs

log = logging.getLogger(__name__)

ENCODED_TOGETHER = 8
"""Pairs in one pass of the encoder."""
Encode = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
"""From a batch of `TrainingPairs` to the latents [N, C, h, w] of inputs and truths."""


@dataclass(frozen=True)
class LatentPairsConfig:
    """What is encoded beforehand."""

    pairs: int = 0
    """Pairs that are encoded once, into the run folder, and then trained on again and again. 0: train on pictures, with
    new pairs in every step."""

    precision: str = field(default="fp32", metadata=ADDED)
    """What the VAE encodes them in: fp32 or bf16, see train/prior.py's."""

    def __post_init__(self) -> None:
        check_encoder_precision(self.precision)
        if self.pairs < 0:
            raise IcmsrError(f"latents.pairs must be 0 or more, got {self.pairs}")


class LatentPairs(CachedSamples):
    """Samples by number, each a function of the seed and its number alone. Each is a dict of tensors:

    - ``low_latent`` and ``truth_latent``, float32 [C, crop / factor, crop / factor]: of the input and of the truth;
    - ``index``, ``caption``, ``events`` and ``unreadable`` as in `TrainingPairs`.

    The pairs are the first `count` samples of `pairs`. `file` is written if it is missing, or if it holds something
    else than `pairs`, `count` and `encoder` (a hash of what encodes) ask for; `workers` processes make the pictures.
    """

    def __init__(
        self, pairs: TrainingPairs, count: int, file: Path, encode: Encode, encoder: str, workers: int = 0
    ) -> None:
        self.config, self.photographs, self.seed = pairs.config, pairs.photographs, pairs.seed
        self._count, self.file = count, file
        photographs = [[path.name, path.stat().st_size] for path in pairs.photographs]
        settings = {**asdict(pairs.config), "photographs": photographs, "seed": pairs.seed, "count": count}
        for place in ("folders", "lists", "captions", "cache_mb"):
            settings.pop(place, None)
        description = json.dumps({**settings, "encoder": encoder}, sort_keys=True, default=str)
        if not self.holds(description):
            write_tensors(file, _encoded(pairs, count, encode, workers), {"description": description})

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(np.random.default_rng((self.seed, 1 << 51, index)).integers(self._count))
        file = self.opened()
        low, truth = (file.get_slice(name)[number].float() for name in ("low", "truth"))
        caption = file.get_slice("caption")[number]
        return {**self.marks(index), "caption": caption.clone(), "low_latent": low, "truth_latent": truth}

    def blank(self) -> dict[str, Tensor]:
        """See `Samples`."""
        sample = self[0]
        return {
            **self.marks(0),
            **{name: torch.zeros_like(sample[name]) for name in ("caption", "low_latent", "truth_latent")},
        }


@torch.no_grad()
def _encoded(pairs: TrainingPairs, count: int, encode: Encode, workers: int) -> dict[str, Tensor]:
    log.info("encoding %d pairs of %d photographs", count, len(pairs.photographs))
    lows: list[Tensor] = []
    truths: list[Tensor] = []
    captions: list[Tensor] = []
    with tqdm(total=count, unit="pair", desc="encoding", disable=None) as bar:
        for batch in _batches(pairs, count, workers):
            for kept, latent in zip((lows, truths), encode(batch)):
                kept.append(latent.to("cpu", torch.float16))
            captions.append(batch["caption"])
            bar.update(len(batch["caption"]))
    return {"low": torch.cat(lows), "truth": torch.cat(truths), "caption": torch.cat(captions)}


def _batches(pairs: TrainingPairs, count: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """The first `count` samples in their order, `ENCODED_TOGETHER` at a time; the last batch may be smaller."""
    whole = Resumable(0, count, ENCODED_TOGETHER)
    if len(whole):
        yield from make_loader(pairs, whole, workers)
    if len(whole) < count:
        yield default_collate([pairs[number] for number in range(len(whole), count)])
