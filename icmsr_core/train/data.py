"""Training pairs: a sharp crop and the low-resolution picture that a poor camera would have made of it.

Sample number i of a run depends on the seed and on i alone: not on the number of workers, and not on where a run was
stopped and taken up again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..degradation import PRESETS, DegradationConfig, degrade
from ..errors import IcmsrError
from .synthetic import synthetic_picture

log = logging.getLogger(__name__)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
SCALE = 4


@dataclass(frozen=True)
class DataConfig:
    """Where training pictures come from and what is done to them."""

    folders: tuple[str, ...] = ()
    """Folders of photographs (searched recursively)."""
    synthetic: float = 0.15
    """Share of procedurally made pictures."""
    crop: int = 96
    """Side of the sharp crop in pixels, a multiple of 32."""
    shrink: float = 2.0
    """Photographs are first shrunk by a random factor from 1 to this: it hides their own JPEG and lens blur."""
    degradations: tuple[str, ...] = ("light", "realesrgan")
    """Presets of the degradation (see `icmsr_core.degradation.PRESETS`)."""
    degradation_weights: tuple[float, ...] = (0.7, 0.3)
    """How often each preset is drawn."""

    def __post_init__(self) -> None:
        if self.crop < 32 or self.crop % 32:
            raise IcmsrError(f"data.crop must be a positive multiple of 32, got {self.crop}")
        if not 0 <= self.synthetic <= 1:
            raise IcmsrError(f"data.synthetic must be between 0 and 1, got {self.synthetic}")
        if self.shrink < 1:
            raise IcmsrError(f"data.shrink must be at least 1, got {self.shrink}")
        unknown = [name for name in self.degradations if name not in PRESETS]
        if unknown:
            raise IcmsrError(f"data.degradations: unknown {unknown}, known are {sorted(PRESETS)}")
        if len(self.degradations) != len(self.degradation_weights) or sum(self.degradation_weights) <= 0:
            raise IcmsrError("data.degradation_weights needs one non-negative weight per entry of data.degradations")


def find_photographs(folders: tuple[str, ...]) -> list[Path]:
    """Pictures below `folders`, in a fixed order. Raises `IcmsrError` for a folder without any."""
    if not folders:
        raise IcmsrError("data.folders is empty: name a folder of photographs, or set data.synthetic to 1")
    found: list[Path] = []
    for folder in folders:
        here = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        if not here:
            raise IcmsrError(f"{folder}: no pictures here (looked for {', '.join(PICTURE_SUFFIXES)})")
        found += here
    return found


class TrainingPairs(Dataset[dict[str, Tensor]]):
    """Pairs ``sharp`` [3, crop, crop] and ``low`` [3, crop / 4, crop / 4], uint8, by sample number."""

    def __init__(self, config: DataConfig, seed: int, degraded: bool = True) -> None:
        self.config, self.seed, self.degraded = config, seed, degraded
        self.photographs = find_photographs(config.folders) if config.synthetic < 1 else []
        weights = np.asarray(config.degradation_weights, dtype=np.float64)
        self._weights = weights / weights.sum()
        self._presets: list[DegradationConfig] = [PRESETS[name] for name in config.degradations]
        # Decoded once per worker: 643 photographs of about 0.5 MB; decoding anew would cost more than degrading.
        self._decoded: dict[Path, npt.NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return 1 << 40  # the sampler says when to stop

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        crop = self.config.crop
        if rng.random() < self.config.synthetic:
            sharp = synthetic_picture(crop, rng)
        else:
            sharp = self._photograph_crop(rng)
        sharp = np.rot90(sharp, int(rng.integers(4)))
        if rng.random() < 0.5:
            sharp = sharp[:, ::-1]
        sharp = np.ascontiguousarray(sharp)
        pair = {"sharp": _tensor(sharp)}
        if self.degraded:
            preset = self._presets[int(rng.choice(len(self._presets), p=self._weights))]
            low = degrade(sharp.astype(np.float32) / 255.0, preset, rng)
            pair["low"] = _tensor((low * 255.0).round().astype(np.uint8))
        return pair

    def _photograph_crop(self, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        crop = self.config.crop
        for _ in range(20):
            path = self.photographs[int(rng.integers(len(self.photographs)))]
            picture = self._read(path)
            room = min(picture.shape[:2]) / crop
            if room < 1:
                continue  # too small or unreadable: another one is drawn
            factor = float(rng.uniform(1.0, min(self.config.shrink, room)))
            height, width = (max(crop, round(length / factor)) for length in picture.shape[:2])
            # Crop before shrinking: the same pixels at a fraction of the work.
            top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
            y0, y1 = (int(edge * picture.shape[0] / height) for edge in (top, top + crop))
            x0, x1 = (int(edge * picture.shape[1] / width) for edge in (left, left + crop))
            return np.asarray(cv2.resize(picture[y0:y1, x0:x1], (crop, crop), interpolation=cv2.INTER_AREA))
        raise IcmsrError(f"20 photographs in a row are smaller than {crop} px or unreadable: set a smaller data.crop")

    def _read(self, path: Path) -> npt.NDArray[np.uint8]:
        if path not in self._decoded:
            encoded = np.fromfile(path, dtype=np.uint8)
            picture: Any = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
            if picture is None:
                log.warning("%s: not a readable picture, left out", path)
                picture = np.zeros((0, 0, 3), dtype=np.uint8)
            self._decoded[path] = np.ascontiguousarray(picture[:, :, ::-1])
        return self._decoded[path]


def _tensor(picture: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


class Resumable(Sampler[int]):
    """Sample numbers from `start` up to `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


def make_loader(
    pairs: TrainingPairs, batch: int, start: int, stop: int, workers: int
) -> DataLoader[dict[str, Tensor]]:
    """Batches of samples `start` to `stop`; the same batches whatever the number of workers."""
    return DataLoader(
        pairs,
        batch_size=batch,
        sampler=Resumable(start, stop),
        num_workers=workers,
        drop_last=True,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    # A scheduler, `timeout` or Ctrl-C signals the whole process group, and a worker that died of it would take the loop
    # down before the state is saved. A group of its own, rather than ignoring the signals: the loop ends its workers
    # with SIGTERM.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
