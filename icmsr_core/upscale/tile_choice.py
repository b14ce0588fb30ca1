"""Tile, batch and VAE mode from free memory. Source: ours.

The tile is 512 wherever it fits, so that machines with enough memory give the same picture; a smaller one, and the
VAE's bounded mode in the place of an exact one that was not asked for, are taken only where memory is short. More
memory buys no larger tile, though one of 1024 overlaps less and takes a tenth less time on a CPU
(docs/performance.md): a shorter overlap gains most of that everywhere. A CPU takes one tile at a time, because four of
512 together took no less time and four times the memory. Elsewhere as many run together as fit, up to
`MOST_TOGETHER`; that was not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..backbone.protocol import Backbone, BackboneDescriptor
from ..tiled_vae.estimate import drawn_windows
from ..tiled_vae.tiled import is_exact
from .one_step import make_plan
from .settings import UpscaleSettings
from .sizes import padded_size

TILES = (512, 384, 256, 192, 128)
"""What is chosen from, best first, in pixels of the result."""
MOST_TOGETHER = 8
FREE_SHARE = 0.8
"""Of the free memory that is counted on; the estimate was up to 25% short (nano's decoder, tiles of 384)."""
PICTURES = 12 * 3
"""Bytes per pixel of the result: it, the enlarged input and a copy, three channels of float32 each."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a pass takes beside weights and pictures, in float32.

    Fitted to ``benchmarks/tile_memory.py --clock cpu --threads 1``, see docs/performance.md; what is not proportional
    covers the libraries' workspaces.
    """

    unet: tuple[float, float]
    """Of a batch of tiles: in any case, and per latent cell of all its tiles."""
    vae: tuple[float, float, float]
    """Of the VAE: in any case; per pixel of what is held whole, the picture in exact mode and the windows that the
    statistics are taken from in bounded mode; and, except on a CPU, whose stripes are cut for the cache, per pixel of a
    tile. The last is of a CPU's stripes before they were cut, as nothing was measured elsewhere."""


NANO = Memory(unet=(0, 9.7e3), vae=(110e6, 256, 1100))
STABLE_DIFFUSION = Memory(unet=(200e6, 33e3), vae=(150e6, 1024, 5100))
HALF = {"unet": 0.5, "vae": 0.75}
"""What half precision takes of float32: measured on nano .40 and .54 to .71, the statistics stay in float32."""


def memory_of(descriptor: BackboneDescriptor) -> Memory:
    """The numbers of a family; SD1.5 and what is not known take those of SD2.1, the largest."""
    return NANO if descriptor.family == "nano" else STABLE_DIFFUSION


def needed_memory(
    height: int, width: int, settings: UpscaleSettings, descriptor: BackboneDescriptor, itemsize: int, kind: str
) -> float:
    """Bytes beside the weights for a result of `height` x `width` pixels; `itemsize` is 4 for float32, 2 for half.

    `kind` is the device's: away from the CPU neither the pictures nor the exact mode's whole maps have to be there.
    """
    memory, local = memory_of(descriptor), kind == "cpu"
    height, width = padded_size(height, width, descriptor)
    area = min(settings.tile**2 or height * width, height * width)
    cells = min(settings.tile or height, height) * min(settings.tile or width, width) / descriptor.latent_factor**2
    unet = memory.unet[0] + memory.unet[1] * settings.batch * cells
    if is_exact(settings.vae, height, width):
        held = height * width if local else 0
    else:
        factor = descriptor.latent_factor
        number, cells_each = drawn_windows(height // factor, width // factor, factor)
        held = number * cells_each * factor**2
    vae = memory.vae[0] + memory.vae[1] * held + memory.vae[2] * (0 if local else area)
    share = HALF if itemsize < 4 else {"unet": 1.0, "vae": 1.0}
    return max(share["unet"] * unet, share["vae"] * vae) + (PICTURES * height * width if local else 0)


def fit_to_memory(
    backbone: Backbone,
    height: int,
    width: int,
    settings: UpscaleSettings,
    free: float | None,
    kind: str,
    *,
    itemsize: int = 4,
    tile: bool = True,
    batch: bool = True,
) -> UpscaleSettings:
    """`settings` for an input of `height` x `width` pixels with `free` bytes on a device of `kind` "cpu", "cuda", ...

    `tile` and `batch` say what may be chosen; what may not stays as it is in `settings`. With `tile`, an overlap is
    shortened to a quarter of a smaller tile, and the VAE mode auto becomes bounded where no tile would make exact fit.
    What needs the least of them when nothing fits, or no more than the first choice when `free` is None, not known.
    """
    descriptor, target = backbone.descriptor, settings.target_size(height, width)
    room = FREE_SHARE * free if free is not None else float("inf")

    def need(candidate: UpscaleSettings) -> float:
        return needed_memory(*target, candidate, descriptor, itemsize, kind)

    def fits(candidate: UpscaleSettings) -> bool:
        return need(candidate) <= room

    chosen = replace(settings, batch=1) if batch else settings
    if tile:
        modes = ("auto", "bounded") if settings.vae == "auto" else (settings.vae,)
        candidates = [
            replace(chosen, vae=mode, tile=side, overlap=min(settings.overlap, side // (2 if side == TILES[0] else 4)))
            for mode in modes
            for side in TILES
        ]
        # The least is not always the last: on a CPU a small picture's windows hold more than the picture.
        chosen = next(filter(fits, candidates), None) or min(reversed(candidates), key=need)
    if batch and kind != "cpu" and free is not None:
        tiles = len(make_plan(backbone, *padded_size(*target, descriptor), chosen))
        return replace(chosen, batch=batch_for(tiles, lambda count: fits(replace(chosen, batch=count))))
    return chosen


def batch_for(tiles: int, fits: Callable[[int], bool]) -> int:
    """How many of `tiles` to run together: the fewest with which there are no more batches than with the most that fit.

    One is always taken to fit, more than `MOST_TOGETHER` never.
    """
    most = next((count for count in range(min(tiles, MOST_TOGETHER), 1, -1) if fits(count)), 1)
    return -(-tiles // -(-tiles // most))
