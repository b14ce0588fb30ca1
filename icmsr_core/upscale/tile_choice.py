"""Tile, batch and VAE mode that fit into free memory, and what to try when memory ran out all the same. Source: ours.

The tile is 512 wherever it fits, so that machines with enough memory give the same picture. Only where memory is short
is it smaller, and only then does the VAE mode `auto` become bounded where it would be exact. More memory brings no
larger tile: one of 1024 takes a tenth less time on a CPU (docs/performance.md), but most of that is its relatively
shorter overlap, which a shorter overlap brings at every size. A CPU takes one tile at a time, because four of 512
together took no less time and four times the memory. Other devices take as many together as fit, up to
`MOST_TOGETHER`; that was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..backbone.protocol import BackboneDescriptor
from ..tiled_vae.estimate import drawn_windows
from ..tiled_vae.tiled import is_exact
from .plan import UpscalePlan, plan_upscale
from .settings import TILE_MULTIPLE, UpscaleSettings
from .sizes import padded_size

TILES = (512, 384, 256, 192, 128)
"""Tiles to choose from, best first, in pixels of the result."""
MOST_TOGETHER = 8
"""Most tiles in a batch."""
LARGEST_RETRY = 1024
"""Tile to try when the whole picture at once did not fit, in pixels of the result."""
FREE_SHARE = 0.8
"""Share of the free memory that a plan may need: the estimate was up to 25% short (nano's decoder, tiles of 384)."""
PICTURES = 12 * 3
"""Bytes per pixel of the result for three pictures, the result, the enlarged input and a copy: 3 float32 channels
each."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a family's networks need in float32, without their weights and the pictures.

    Fitted to ``benchmarks/tile_memory.py --clock cpu --threads 1``, see docs/performance.md. The constant terms cover
    the libraries' workspaces.
    """

    unet: tuple[float, float]
    """UNet: a constant, and bytes per latent cell of all tiles of a batch."""
    vae: tuple[float, float, float]
    """VAE: a constant; bytes per pixel of what is held whole (the picture in exact mode, in bounded mode the windows
    that the statistics are taken from); bytes per pixel of a tile. The last counts except on a CPU, where stripes are
    cut for the cache. It was measured on a CPU before they were, as nothing else could be measured."""


NANO = Memory(unet=(0, 9.7e3), vae=(110e6, 256, 1100))
STABLE_DIFFUSION = Memory(unet=(200e6, 33e3), vae=(150e6, 1024, 5100))
HALF = {"unet": 0.5, "vae": 0.75}
"""Share of float32's memory that half precision needs. Measured on nano: 0.40, and 0.54 to 0.71 for the VAE, whose
statistics stay in float32."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a plan has to fit into."""

    kind: str
    """Kind of the device: "cpu", "cuda", ..."""
    free: float | None
    """Free bytes; None where they are not known, and then the first choice is taken to fit."""
    itemsize: int = 4
    """Bytes per value of the networks' precision: 4 for float32, 2 for half."""


@dataclass(frozen=True)
class Automatic:
    """Which settings are chosen from free memory; the others stay as they are."""

    tile: bool = True
    """Tile and overlap, and bounded in place of the VAE mode auto."""
    batch: bool = True
    """Tiles that run together."""


def memory_of(descriptor: BackboneDescriptor) -> Memory:
    """The memory of a family. SD1.5 and unknown families get the numbers of SD2.1, the largest."""
    return NANO if descriptor.family == "nano" else STABLE_DIFFUSION


def needed_memory(
    descriptor: BackboneDescriptor, target: tuple[int, int], settings: UpscaleSettings, memory: DeviceMemory
) -> float:
    """Bytes, without the weights, for a result of `target` (height, width) pixels on the device of `memory`.

    The pictures, and the maps that the exact mode holds whole, count on a CPU only: from other devices they can move to
    main memory.
    """
    numbers, on_cpu, factor = memory_of(descriptor), memory.kind == "cpu", descriptor.latent_factor
    height, width = padded_size(*target, descriptor)
    tile_height, tile_width = min(settings.tile or height, height), min(settings.tile or width, width)
    cells = tile_height * tile_width / factor**2
    unet = numbers.unet[0] + numbers.unet[1] * settings.batch * cells
    if is_exact(settings.vae, height, width):
        held = height * width if on_cpu else 0
    else:
        number, cells_each = drawn_windows(height // factor, width // factor, factor)
        held = number * cells_each * factor**2
    stripe = 0 if on_cpu else min(settings.tile**2 or height * width, height * width)
    vae = numbers.vae[0] + numbers.vae[1] * held + numbers.vae[2] * stripe
    if memory.itemsize < 4:
        unet, vae = HALF["unet"] * unet, HALF["vae"] * vae
    return max(unet, vae) + (PICTURES * height * width if on_cpu else 0)


def plan_for_memory(
    descriptor: BackboneDescriptor,
    height: int,
    width: int,
    settings: UpscaleSettings,
    memory: DeviceMemory,
    automatic: Automatic,
) -> UpscalePlan:
    """The plan for pictures of `height` x `width` pixels with the best of `candidates` that fits into `memory`.

    Where none fits, with the one that needs the least; where free memory is not known, with the first. The batch is
    then as large as fits, on a CPU 1 (`batch_for`). What `automatic` does not name stays as it is in `settings`.
    """
    target = settings.target_size(height, width)
    room = FREE_SHARE * memory.free if memory.free is not None else float("inf")

    def need(candidate: UpscaleSettings) -> float:
        return needed_memory(descriptor, target, candidate, memory)

    chosen = replace(settings, batch=1) if automatic.batch else settings
    if automatic.tile:
        choices = list(candidates(chosen))
        # The one that needs the least is not always the last: on a CPU a small picture's windows hold more than it.
        chosen = next((one for one in choices if need(one) <= room), None) or min(reversed(choices), key=need)
    plan = plan_upscale(descriptor, height, width, chosen)
    if automatic.batch and memory.kind != "cpu" and memory.free is not None:
        return plan.with_batch(batch_for(len(plan.tiles), lambda count: need(replace(chosen, batch=count)) <= room))
    return plan


def candidates(settings: UpscaleSettings) -> Iterator[UpscaleSettings]:
    """`settings` with each tile to choose from, best first; after all of them, if the VAE mode is auto, bounded.

    An exact VAE that was asked for stays exact. The overlap is at most half of the largest tile and a quarter of the
    others.
    """
    for mode in ("auto", "bounded") if settings.vae == "auto" else (settings.vae,):
        for tile in TILES:
            overlap = min(settings.overlap, tile // (2 if tile == TILES[0] else 4))
            yield replace(settings, vae=mode, tile=tile, overlap=overlap)


def smaller_settings(settings: UpscaleSettings) -> UpscaleSettings | None:
    """What to try when memory ran out with `settings`: one tile at a time, then half the tile; None below `TILES`."""
    if settings.batch > 1:
        return replace(settings, batch=1)
    tile = settings.tile // 2 // TILE_MULTIPLE * TILE_MULTIPLE if settings.tile else LARGEST_RETRY
    if tile < TILES[-1]:
        return None
    return replace(settings, tile=tile, overlap=min(settings.overlap, tile // 4))


def batch_for(tiles: int, fits: Callable[[int], bool]) -> int:
    """How many of `tiles` to run together: the smallest number that needs no more batches than the largest that fits.

    `fits` says whether so many fit. One is always taken to fit, more than `MOST_TOGETHER` never run together.
    """
    most = next((count for count in range(min(tiles, MOST_TOGETHER), 1, -1) if fits(count)), 1)
    return -(-tiles // -(-tiles // most))
