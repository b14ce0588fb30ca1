"""Training pairs: a sharp crop and the poor picture that a degradation has made of it.

Sample number i of a run depends on the seed and on i alone: not on the number of workers or processes, not on what is
in memory, and not on where a run was stopped and taken up again.
"""

from __future__ import annotations

import logging
import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import IcmsrError
from ..settings import FREE
from .degradation import degrade
from .presets import PRESETS, DegradationConfig
from .sources import Photographs, PictureCache, Pixels, folder_source, list_source, read_captions, read_photograph
from .synthetic import synthetic_picture

log = logging.getLogger(__name__)

_ATTEMPTS = 20  # photographs drawn for one sample before giving up
_NAMED = 4  # unreadable photographs that one sample can name


@dataclass(frozen=True)
class DataConfig:
    """Where training pictures come from and what is done to them."""

    folders: tuple[str, ...] = ()
    """Folders of photographs, searched recursively (neither folders nor lists are read if synthetic is 1)."""
    lists: tuple[str, ...] = ()
    """Text files with the path of one photograph a line, relative to the list's folder; # begins a comment line."""
    weights: tuple[float, ...] = ()
    """How often each folder, then each list, is drawn from; empty: every photograph is equally likely."""
    captions: str = ""
    """Text file with a line NAME<tab>CAPTION for each captioned photograph: its path below its folder (or as its list
    has it), or its file name alone; empty: no captions."""
    hold_out: float = 0.0
    """Share of the photographs, 0 to below 1, that training never sees: chosen by a hash of their names."""
    small: str = "skip"
    """What happens to photographs smaller than the crop: skip (another one is drawn), or upscale (bicubic)."""
    cache_mb: int = field(default=512, metadata=FREE)
    """Memory for decoded photographs in each worker, in MiB; 0: each is decoded whenever it is drawn."""
    synthetic: float = 0.15
    """Share of procedurally made pictures."""
    crop: int = 96
    """Side of the sharp crop in pixels, a multiple of 32."""
    shrink: float = 2.0
    """Photographs are first shrunk by a random factor from 1 to this: it hides their own JPEG and lens blur."""
    degradations: tuple[str, ...] = ("light", "realesrgan")
    """Presets of the degradation (see `icmsr_core.train.data.presets.PRESETS`), all of the same scale."""
    degradation_weights: tuple[float, ...] = (0.7, 0.3)
    """How often each preset is drawn."""

    def __post_init__(self) -> None:
        if self.crop < 32 or self.crop % 32:
            raise IcmsrError(f"data.crop must be a positive multiple of 32, got {self.crop}")
        if not 0 <= self.synthetic <= 1:
            raise IcmsrError(f"data.synthetic must be between 0 and 1, got {self.synthetic}")
        if not 0 <= self.hold_out < 1:
            raise IcmsrError(f"data.hold_out must be at least 0 and below 1, got {self.hold_out}: try 0.02")
        if not 1 <= self.shrink < math.inf:
            raise IcmsrError(f"data.shrink must be a number from 1 up, got {self.shrink}")
        if self.small not in ("skip", "upscale"):
            raise IcmsrError(f"data.small must be skip or upscale, got {self.small!r}")
        if self.cache_mb < 0:
            raise IcmsrError(f"data.cache_mb must be at least 0, got {self.cache_mb}: 0 keeps nothing in memory")
        if self.weights:
            _check_weights("data.weights", self.weights, "data.folders and data.lists", self.folders + self.lists)
        unknown = [name for name in self.degradations if name not in PRESETS]
        if unknown:
            raise IcmsrError(f"data.degradations: unknown {unknown}, known are {sorted(PRESETS)}")
        _check_weights("data.degradation_weights", self.degradation_weights, "data.degradations", self.degradations)
        scales = {name: PRESETS[name].scale for name in self.degradations}
        if len(set(scales.values())) > 1:
            raise IcmsrError(f"data.degradations must be of one scale, got {scales}: train one task at a time")

    @property
    def scale(self) -> int:
        """How many times smaller than the sharp crop the degraded picture is, in height and width."""
        return PRESETS[self.degradations[0]].scale


def _check_weights(where: str, weights: tuple[float, ...], what: str, entries: tuple[str, ...]) -> None:
    fine = all(weight >= 0 for weight in weights) and 0 < sum(weights) < math.inf
    if len(weights) != len(entries) or not fine:
        raise IcmsrError(
            f"{where} needs one non-negative weight per entry of {what}, {len(entries)}, one of them "
            f"above 0, got {weights}"
        )


def find_photographs(config: DataConfig, held_out: bool = False) -> Photographs:
    """The photographs that `config` names, in one half of its split. Reads folders, lists and captions, no picture.

    Raises IcmsrError for whatever is missing, empty or malformed there (see `icmsr_core.train.data.sources`).
    """
    if not config.folders and not config.lists:
        raise IcmsrError(
            "data.folders is empty and so is data.lists: name a folder of photographs, or set data.synthetic to 1"
        )
    sources = [*map(folder_source, config.folders), *map(list_source, config.lists)]
    captions = read_captions(config.captions) if config.captions else None
    return Photographs(sources, config.weights, captions, config.hold_out, held_out)


@dataclass
class _Met:
    """What drawing one sample came across."""

    unreadable: list[int] = field(default_factory=list)
    small: int = 0


class Samples(Dataset[dict[str, Tensor]]):
    """What a run trains on: endlessly many samples, each a function of the run's seed and its number alone."""

    config: DataConfig
    photographs: list[Path]
    """The photographs they come from; a sample's ``unreadable`` counts in this list."""

    def __len__(self) -> int:
        return 1 << 40  # the sampler says when to stop

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample number `index`."""

    @abstractmethod
    def blank(self) -> dict[str, Tensor]:
        """A sample of the same shapes, made without reading a photograph."""


class TrainingPairs(Samples):
    """Samples by number. Each is a dict of tensors:

    - ``sharp`` uint8 [3, crop, crop] RGB, and, with `degraded`, ``low`` uint8 [3, crop / scale, crop / scale];
    - ``index`` int64 [], the sample's number;
    - ``caption`` int64 [], its place in `captions`; 0, the empty string, for made-up and uncaptioned pictures;
    - ``events`` int64 [2], how often an unreadable and a small photograph were met while it was drawn;
    - ``unreadable`` int64 [4], the numbers of the first unreadable ones, then -1 (`Tally` makes names of them).

    With `held_out`, photographs of the held-out share alone, and no made-up pictures; otherwise all others.
    Raises IcmsrError for sources that are missing or malformed, and where nothing is in the wanted half. Taking a
    sample raises it when 20 photographs in a row cannot be used.
    """

    def __init__(self, config: DataConfig, seed: int, degraded: bool = True, held_out: bool = False) -> None:
        if held_out and not config.hold_out > 0:
            raise IcmsrError("data.hold_out is 0, so no photograph is held out: set a share such as 0.02")
        if held_out and config.synthetic >= 1:
            raise IcmsrError("data.synthetic is 1, so there are no photographs to hold out: lower it")
        self.config, self.seed, self.degraded = config, seed, degraded
        self._synthetic = 0.0 if held_out else config.synthetic
        self._sources = find_photographs(config, held_out) if config.synthetic < 1 else None
        self.photographs = self._sources.paths if self._sources else []
        self.captions: tuple[str, ...] = self._sources.captions if self._sources else ("",)
        weights = np.asarray(config.degradation_weights, dtype=np.float64)
        self._weights = weights / weights.sum()
        self._presets: list[DegradationConfig] = [PRESETS[name] for name in config.degradations]
        self._cache = PictureCache(config.cache_mb << 20)
        self._unreadable: set[int] = set()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        met, caption = _Met(), 0
        if rng.random() < self._synthetic or self._sources is None:
            sharp = synthetic_picture(self.config.crop, rng)
        else:
            number, sharp = self._photograph_crop(self._sources, rng, met)
            caption = self._sources.caption(number)
        sharp = np.rot90(sharp, int(rng.integers(4)))
        if rng.random() < 0.5:
            sharp = sharp[:, ::-1]
        sharp = np.ascontiguousarray(sharp)
        sample = {
            "sharp": _tensor(sharp),
            "index": torch.tensor(index),
            "caption": torch.tensor(caption),
            "events": torch.tensor([len(met.unreadable), met.small]),
            "unreadable": torch.tensor([*met.unreadable, *[-1] * _NAMED][:_NAMED]),
        }
        if self.degraded:
            preset = self._presets[int(rng.choice(len(self._presets), p=self._weights))]
            sample["low"] = _tensor(degrade(sharp, preset, rng))
        return sample

    def blank(self) -> dict[str, Tensor]:
        """See `Samples`."""
        crop, scale = self.config.crop, self.config.scale
        return {
            "sharp": torch.full((3, crop, crop), 127, dtype=torch.uint8),
            "low": torch.full((3, crop // scale, crop // scale), 127, dtype=torch.uint8),
            "index": torch.tensor(0),
            "caption": torch.tensor(0),
        }

    def _photograph_crop(self, sources: Photographs, rng: np.random.Generator, met: _Met) -> tuple[int, Pixels]:
        """The number of a random photograph and a random crop of it."""
        crop = self.config.crop
        for _ in range(_ATTEMPTS):
            number = sources.draw(rng)
            picture = self._read(number)
            if picture is None:
                met.unreadable.append(number)
                continue
            size = picture.shape[:2]
            room = min(size) / crop
            if room < 1:
                met.small += 1
                if self.config.small == "skip":
                    continue
                # The square is cut out first: a long strip, enlarged whole, could fill the memory.
                side = min(size)
                top, left = (int(rng.integers(length - side + 1)) for length in size)
                square = picture[top : top + side, left : left + side]
                return number, _resized(square, crop, cv2.INTER_CUBIC)
            factor = float(rng.uniform(1.0, min(self.config.shrink, room)))
            height, width = (max(crop, round(length / factor)) for length in size)
            # Crop before shrinking: the same pixels at a fraction of the work.
            top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
            y0, y1 = (int(edge * size[0] / height) for edge in (top, top + crop))
            x0, x1 = (int(edge * size[1] / width) for edge in (left, left + crop))
            return number, _resized(picture[y0:y1, x0:x1], crop, cv2.INTER_AREA)
        raise IcmsrError(
            f"{_ATTEMPTS} photographs in a row cannot be used: {met.small} are smaller than {crop} px and "
            f"{len(met.unreadable)} unreadable, the last one {self.photographs[number]}: set a smaller data.crop, "
            "set data.small to upscale, or sort them out"
        )

    def _read(self, number: int) -> Pixels | None:
        """Photograph `number` as uint8 [H, W, 3], or None if it cannot be read; each such file is tried once."""
        if number not in self._unreadable:
            try:
                return self._cache.get(number, lambda: read_photograph(self.photographs[number]))
            except IcmsrError:
                self._unreadable.add(number)  # `Tally` says so, once, in the main process
        return None


def _resized(picture: Pixels, side: int, how: int) -> Pixels:
    return np.asarray(cv2.resize(picture, (side, side), interpolation=how), dtype=np.uint8)


def _tensor(picture: Pixels) -> Tensor:
    return rearrange(torch.from_numpy(picture), "h w c -> c h w").contiguous()


class Tally:
    """What the samples of a run met, counted in the main process from its batches.

    Each unreadable photograph is logged as a warning, with the reason, when it is first seen.
    """

    unreadable: list[str]
    """The files that could not be read, sorted."""

    def __init__(self, pairs: Samples) -> None:
        self._photographs = pairs.photographs
        self._samples, self._events = 0, [0, 0]
        self.unreadable = []

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Counts one batch of `make_loader`'s (``events`` [batch, 2] and ``unreadable`` [batch, 4] of it)."""
        self._samples += len(batch["events"])
        for column, count in enumerate(batch["events"].sum(dim=0).tolist()):
            self._events[column] += count
        for number in set(batch["unreadable"].flatten().tolist()) - {-1}:
            path = self._photographs[number]
            if str(path) not in self.unreadable:
                self.unreadable = sorted([*self.unreadable, str(path)])
                log.warning("skipped in training: %s", _why_unreadable(path))

    def take(self) -> dict[str, int]:
        """How many samples there were since the last call, and how often an unreadable and a small photograph were met
        in them: the keys samples, unreadable and small."""
        unreadable, small = self._events
        counts = {"samples": self._samples, "unreadable": unreadable, "small": small}
        self._samples, self._events = 0, [0, 0]
        return counts


def _why_unreadable(path: Path) -> str:
    try:
        read_photograph(path)
    except IcmsrError as error:
        return str(error)
    return f"{path}: it could not be read by a data worker, though it can be now"


class Resumable(Sampler[int]):
    """The sample numbers of process `rank`, from `start` up to at most `stop`.

    Every step of all processes takes the next batch * processes numbers, of which process r has the r-th run of `batch`
    numbers; a last step that would not be whole is left out.
    """

    def __init__(self, start: int, stop: int, batch: int = 1, rank: int = 0, processes: int = 1) -> None:
        if batch < 1 or not 0 <= rank < processes:
            raise IcmsrError(
                f"batch must be at least 1 and rank from 0 up to below processes, got batch {batch}, "
                f"rank {rank}, processes {processes}"
            )
        self.batch, self.step = batch, batch * processes
        self.first, self.steps = start + rank * batch, max(0, stop - start) // self.step

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            first = self.first + step * self.step
            yield from range(first, first + self.batch)

    def __len__(self) -> int:
        return self.steps * self.batch


def make_loader(
    pairs: Samples, batch: int, start: int, stop: int, workers: int, rank: int = 0, processes: int = 1
) -> DataLoader[dict[str, Tensor]]:
    """Batches of samples `start` to `stop`, for process `rank` of `processes`; the same whatever number of workers.

    `batch` is that of one process. All processes together see, step by step and in their order, the samples that one
    process with the batch ``batch * processes`` sees. Raises IcmsrError as `Resumable` does.
    """
    return DataLoader(
        pairs,
        batch_size=batch,
        sampler=Resumable(start, stop, batch, rank, processes),
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
