"""Tile, batch and VAE mode that fit into free memory. Source: ours.

The tile is 512 wherever it fits, so that machines with enough memory give the same picture. Only where memory is short
is it smaller, if it may be chosen, and the VAE mode `auto` bounded where it would be exact. More memory brings no
larger tile: one of 1024 takes a tenth less time on a CPU (docs/performance.md), but most of that is its relatively
shorter overlap, which a shorter overlap brings at every size. A CPU takes one tile at a time, because four of 512
together took no less time and four times the memory. Other devices take as many together as fit, up to
`MOST_TOGETHER`; that was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

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


UNIFIED = ("cpu", "mps")
"""Kinds of device whose memory is main memory."""


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
    attention: float = 0
    """Bytes per pixel of the picture for the VAE's attention in exact mode, which cannot leave the device: six maps of
    the latent's size."""


NANO = Memory(unet=(0, 9.7e3), vae=(110e6, 256, 1100))
STABLE_DIFFUSION = Memory(unet=(200e6, 33e3), vae=(150e6, 1024, 5100), attention=6 * 512 * 4 / 64)
HALF = {"unet": 0.5, "vae": 0.75}
"""Share of float32's memory that half precision needs. Measured on nano: 0.40, and 0.54 to 0.71 for the VAE, whose
statistics stay in float32."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a plan has to fit into."""

    kind: str
    """Kind of the device: "cpu", "cuda", ..."""
    free: float | None
    """Free bytes; None where they are not known, and then everything is taken to fit."""
    itemsize: int = 4
    """Bytes per value of the networks' precision: 4 for float32, 2 for half."""
    main: float | None = None
    """Free bytes of main memory, as `free`; only for devices that have a memory of their own."""


@dataclass(frozen=True)
class Need:
    """Bytes that a plan takes, without the weights."""

    device: float
    """On the device in any case."""
    maps: float
    """The maps that the exact VAE holds whole: on the device, or all in main memory."""
    pictures: float
    """In main memory."""

    def short(self, memory: DeviceMemory) -> float:
        """Bytes that are missing in `memory`, of which `FREE_SHARE` may be used; 0 where all fits."""
        room, main = (FREE_SHARE * free if free is not None else inf for free in (memory.free, memory.main))
        if memory.kind in UNIFIED:
            return max(0.0, self.device + self.maps + self.pictures - room)
        device, elsewhere = max(0.0, self.device - room), max(0.0, self.pictures - main)
        maps = min(self.device + self.maps - room - device, self.maps + self.pictures - main - elsewhere)
        return device + elsewhere + max(0.0, maps)


@dataclass(frozen=True)
class Automatic:
    """Which settings are chosen from free memory; the others stay as they are, but for the VAE mode auto."""

    tile: bool = True
    """Tile and overlap."""
    batch: bool = True
    """Tiles that run together."""


def memory_of(descriptor: BackboneDescriptor) -> Memory:
    """The memory of a family. SD1.5 and unknown families get the numbers of SD2.1, the largest."""
    return NANO if descriptor.family == "nano" else STABLE_DIFFUSION


def needed_memory(
    descriptor: BackboneDescriptor, work: tuple[int, int], settings: UpscaleSettings, memory: DeviceMemory
) -> Need:
    """What a picture that is worked at `work` (height, width) pixels takes on the device of `memory`."""
    numbers, factor = memory_of(descriptor), descriptor.latent_factor
    height, width = padded_size(*work, descriptor)
    tile_height, tile_width = min(settings.tile or height, height), min(settings.tile or width, width)
    unet = numbers.unet[0] + numbers.unet[1] * settings.batch * tile_height * tile_width / factor**2
    stripe = 0 if memory.kind == "cpu" else min(settings.tile**2 or height * width, height * width)
    vae, maps = numbers.vae[2] * stripe, 0.0
    if is_exact(settings.vae, height, width):
        maps = numbers.vae[1] * height * width
        if memory.kind not in UNIFIED:  # elsewhere the maps, at another time, take more than the attention
            vae = max(vae, numbers.attention * height * width)
    else:
        number, cells_each = drawn_windows(height // factor, width // factor, factor)
        vae += numbers.vae[1] * number * cells_each * factor**2
    vae += numbers.vae[0]
    if memory.itemsize < 4:
        unet, vae, maps = HALF["unet"] * unet, HALF["vae"] * vae, HALF["vae"] * maps
    # UNet and VAE run one after the other.
    device = max(unet, vae + maps) - maps if memory.kind in UNIFIED else max(unet, vae)
    return Need(device, maps, PICTURES * height * width)


def plan_for_memory(
    descriptor: BackboneDescriptor,
    height: int,
    width: int,
    settings: UpscaleSettings,
    memory: DeviceMemory,
    automatic: Automatic,
) -> UpscalePlan:
    """The plan for pictures of `height` x `width` pixels with the best of `candidates` that fits into `memory`.

    Where none fits, with the one that lacks the least; where free memory is not known, with the first. The batch is
    then as large as fits, on a CPU 1 (`batch_for`). What `automatic` does not name stays as it is in `settings`, but
    for the VAE mode auto.
    """
    work = settings.frame(height, width).work

    def short(candidate: UpscaleSettings) -> float:
        return needed_memory(descriptor, work, candidate, memory).short(memory)

    choices = list(candidates(replace(settings, batch=1) if automatic.batch else settings, automatic.tile))
    chosen = next((one for one in choices if short(one) == 0), None)
    if chosen is None:  # bounded does not always lack less: a small picture's windows hold more than it
        chosen = min(reversed(choices), key=lambda one: (short(one), one.vae == "bounded"))
    plan = plan_upscale(descriptor, height, width, chosen)
    if automatic.batch and memory.kind != "cpu" and memory.free is not None:
        return plan.with_batch(batch_for(len(plan.tiles), lambda count: short(replace(chosen, batch=count)) == 0))
    return plan


def change_for_memory(
    descriptor: BackboneDescriptor, plan: UpscalePlan, asked: UpscaleSettings, memory: DeviceMemory
) -> str | None:
    """One line about what `plan` changes of `asked` because memory is short, None where it changes nothing.

    Also about an exact VAE that was asked for and will hardly fit. The batch, which changes no result, is not named.
    """
    if memory.free is None:
        return None
    size, free = f"{plan.target[1]} x {plan.target[0]} pixels", f"{memory.free / 1e9:.1f} GB of memory are free"
    if memory.main is not None:
        free = f"{memory.free / 1e9:.1f} GB of memory are free on the device, {memory.main / 1e9:.1f} GB of main memory"
    if (plan.settings.tile, plan.settings.vae) != (asked.tile, asked.vae):
        return f"{size}: {free}: tile {plan.settings.tile}, vae {plan.settings.vae}"
    if asked.vae != "exact":
        return None
    exact, bounded = (
        needed_memory(descriptor, plan.frame.work, replace(asked, vae=mode), memory) for mode in ("exact", "bounded")
    )
    if exact.short(memory) > bounded.short(memory):
        return f"{size}: {free}: the exact VAE may not fit: bounded needs less"
    return None


def candidates(settings: UpscaleSettings, tile_too: bool = True) -> Iterator[UpscaleSettings]:
    """`settings`, with `tile_too` with each tile to choose from, best first; then, if the VAE mode is auto, bounded.

    An exact VAE that was asked for stays exact. The overlap is at most half of the largest tile and a quarter of the
    others.
    """
    for mode in ("auto", "bounded") if settings.vae == "auto" else (settings.vae,):
        for tile in TILES if tile_too else (settings.tile,):
            overlap = min(settings.overlap, tile // (2 if tile == TILES[0] else 4)) if tile_too else settings.overlap
            yield replace(settings, vae=mode, tile=tile, overlap=overlap)


def smaller_tiles(settings: UpscaleSettings) -> Iterator[UpscaleSettings]:
    """`settings` with ever smaller tiles, each half as large as the one before, down to the least of `TILES`."""
    tile = settings.tile // 2 // TILE_MULTIPLE * TILE_MULTIPLE if settings.tile else LARGEST_RETRY
    while tile >= TILES[-1]:
        settings = replace(settings, tile=tile, overlap=min(settings.overlap, tile // 4))
        yield settings
        tile = tile // 2 // TILE_MULTIPLE * TILE_MULTIPLE


def batch_for(tiles: int, fits: Callable[[int], bool]) -> int:
    """How many of `tiles` to run together: the smallest number that needs no more batches than the largest that fits.

    `fits` says whether so many fit. One is always taken to fit, more than `MOST_TOGETHER` never run together.
    """
    most = next((count for count in range(min(tiles, MOST_TOGETHER), 1, -1) if fits(count)), 1)
    return -(-tiles // -(-tiles // most))
