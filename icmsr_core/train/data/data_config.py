"""Where training pictures come from and what is done to them: the settings, and the photographs that they name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...errors import IcmsrError
from ..settings import ADDED, FREE
from .presets import PRESETS
from .sources import Photographs, folder_source, list_source, read_captions


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
    enlarge: float = field(default=1.0, metadata=ADDED)
    """Photographs may also be enlarged, by a random factor up to this: a camera's pictures at full size are softer than
    reduced ones, and a generator that saw crisp originals alone over-sharpens them. Above 1, the factor from
    1/enlarge to shrink is drawn evenly on a logarithmic scale."""
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
        if not 1 <= self.enlarge <= 8:
            raise IcmsrError(f"data.enlarge must be a number from 1 to 8, got {self.enlarge}")
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

    Raises IcmsrError for what is missing, empty or malformed there (see `sources`).
    """
    if not config.folders and not config.lists:
        raise IcmsrError(
            "data.folders is empty and so is data.lists: name a folder of photographs, or set data.synthetic to 1"
        )
    sources = [*map(folder_source, config.folders), *map(list_source, config.lists)]
    captions = read_captions(config.captions) if config.captions else None
    return Photographs(sources, config.weights, captions, config.hold_out, held_out)
