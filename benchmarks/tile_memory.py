"""What a tile costs: memory and time of one pass of the UNet over it, and of the VAE in stripes of its area.

    python benchmarks/tile_memory.py --clock cpu --threads 1
    python benchmarks/tile_memory.py --clock cpu --threads 1 --models sd21 --tiles 256 512
    python benchmarks/tile_memory.py --device cuda --dtypes bf16 --models nano sd21 --batches 1 4 8

The numbers in `icmsr_core/upscale/tile_choice.py` come from here. Each line is measured in its own process: the peak
minus what the process held before (libraries, weights, pictures), divided by the latent cells of all tiles of the
batch, or by the pixels of the tile. The VAE runs over a picture twice as wide and twice as high as the tile. sd21 has
random weights of SD2.1's shapes. Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from _command_line import add_clock_options, machine, markdown, number, run_benchmark
from _measurement import DTYPES, Peak, Stopwatch, measure_all, use_threads

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.device import pick_device
from icmsr_core.tiled_vae.tiled import decode_tiled, encode_tiled, plan_stripes
from icmsr_core.upscale.settings import TILE_MULTIPLE

COLUMNS = ("model, precision", "part", "tile", "batch", "s per megapixel", "MB", "bytes per cell", "bytes per pixel")
PARTS = ("unet", "encoder", "decoder")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    """sd21 or nano."""
    part: str
    """One of `PARTS`."""
    dtype: str
    """A key of `DTYPES`."""
    device: str
    """The device's name."""
    tile: int
    """Side in pixels of the result."""
    batch: int
    """Tiles that run together; 1 for the VAE."""
    threads: int
    """Torch's threads on the CPU; 0 for its own choice."""
    clock: str
    """One of `CLOCKS`."""
    vae: str
    """exact or bounded."""


class Found(NamedTuple):
    """What a measuring process found."""

    seconds: float
    """For a megapixel (2^20 pixels)."""
    memory: float
    """Peak in bytes, without what was held before."""
    factor: int
    """Pixels per latent cell along each axis."""


@torch.inference_mode()
def measure_case(case: Case) -> Found:
    """Loads the networks of `case` and measures it; to run in its own process."""
    use_threads(case.threads)
    torch.manual_seed(0)
    device = torch.device(case.device)
    if case.model == "nano":
        from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
        from icmsr_core.runtime.recipe import Recipe
        from icmsr_core.weights.embedded import embedded_generator

        silence_diffusers()
        backbone = load_backbone(Recipe(generator=embedded_generator(), device=case.device, dtype=case.dtype))
    else:
        from _sd_networks import our_backbone

        backbone = our_backbone(1.0, device, DTYPES[case.dtype])
    descriptor = backbone.descriptor
    factor, channels = descriptor.latent_factor, descriptor.latent_channels
    side = case.tile // factor if case.part == "unet" else 2 * case.tile // factor
    exact, stripes = case.vae == "exact", plan_stripes(side, side, case.tile // factor)
    latent = torch.randn(case.batch, channels, side, side, device=device)
    picture = torch.rand(1, 3, side * factor, side * factor, device=device)
    run: Callable[[], object] = {
        "unet": lambda: backbone.predict_noise(latent, descriptor.timestep),
        "encoder": lambda: encode_tiled(backbone, picture, stripes, exact=exact),
        "decoder": lambda: decode_tiled(backbone, latent, picture, stripes, exact=exact),
    }[case.part]
    if case.model == "nano":
        # A first pass pays for what is set up once; sd21's own size hides it. It is as small as can be, because the
        # allocator keeps its memory, which then does not count.
        least = descriptor.multiple_of
        backbone.decode(backbone.encode(picture[:, :, :least, :least]))
        backbone.predict_noise(latent[:1, :, : least // factor, : least // factor], descriptor.timestep)
    peak, watch = Peak(device), Stopwatch(device, case.clock)
    peak.reset()
    before, started = peak.bytes(), watch.now()
    run()
    return Found((watch.now() - started) / (case.batch * (side * factor) ** 2 / 2**20), peak.bytes() - before, factor)


def row_of(case: Case, found: Found | str) -> list[str]:
    """The line of `case`; a text in the place of a measurement says why there is none."""
    part = case.part if case.part == "unet" else f"{case.part}, {case.vae}"
    head = [f"{case.model}, {case.dtype}", part, str(case.tile), str(case.batch)]
    if isinstance(found, str):
        return [*head, found, *["-"] * 3]
    pixels = case.batch * case.tile**2
    return [
        *head,
        number(found.seconds),
        *(
            f"{value:.0f}"
            for value in (found.memory / 1e6, found.memory * found.factor**2 / pixels, found.memory / pixels)
        ),
    ]


def parse(arguments: Sequence[str] | None) -> list[Case]:
    """What the command line asks for, checked before anything is loaded. Wrong usage leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("nano", "sd21"), default=["nano"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiles", nargs="+", type=int, default=[256, 512, 1024], metavar="PX")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], metavar="N", help="for the UNet")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--vae", choices=("bounded", "exact"), default="bounded", help="the VAE's mode")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto, ... (default cpu)")
    add_clock_options(parser)
    options = parser.parse_args(arguments)
    if any(tile < TILE_MULTIPLE or tile % TILE_MULTIPLE for tile in options.tiles):
        parser.error(f"--tiles must be multiples of {TILE_MULTIPLE}, got {options.tiles}")
    if min(options.batches) < 1 or options.threads < 0:
        parser.error("--batches must be at least 1, --threads at least 0")
    try:
        device = str(pick_device(options.device))
    except IcmsrError as error:
        parser.error(str(error))
    return [
        Case(model, part, dtype, device, tile, batch, options.threads, options.clock, options.vae)
        for model in options.models
        for dtype in options.dtypes
        for part in options.parts
        for tile in options.tiles
        for batch in (options.batches if part == "unet" else [1])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every case, prints the table and returns the exit code."""
    cases = parse(arguments)
    results = measure_all(cases, measure_case, lambda case: f"{case.model} {case.part} {case.tile} x {case.batch}")
    rows = [row_of(case, found) for case, found in results.items()]
    print(f"{machine(torch.device(cases[0].device))}; {cases[0].clock} clock\n\n{markdown(COLUMNS, rows)}")
    return 0 if all(isinstance(found, Found) for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
