"""Time and memory of nano for each megapixel of the result, from small pictures to very large ones.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --megapixels 0.25 1 4 16 64 --device cuda --dtype bf16 --tile 1024

Every size is measured in a process of its own. "pictures" is what input, enlarged input and result take as tensors,
which no method can do without; "beside them" is the peak of the process less that, and less what it held before the
first run (libraries and weights). Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from _command_line import SCALE, add_common_options, checked_settings, machine, markdown, number, run_benchmark
from _measurement import DTYPES, Peak, Stopwatch, measure_all, use_threads

from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import VAE_MODES, UpscaleSettings

MEGAPIXELS = (0.25, 1, 4, 16, 64)
COLUMNS = ("megapixels", "px", "s", "s per megapixel", "against the first", "peak MB", "pictures MB", "beside them MB")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    megapixels: float
    """Of the result."""
    aspect: float
    """Its width over its height."""
    device: str
    """The device's name."""
    dtype: str
    """A key of `DTYPES`."""
    runs: int
    """Runs whose median counts."""
    threads: int
    """Torch's threads on the CPU; 0 for its own choice."""
    clock: str
    """One of `CLOCKS`."""
    settings: UpscaleSettings
    """Tiles and VAE mode."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(width, height) of the input."""
        height = math.sqrt(self.megapixels * 2**20 / self.aspect) / SCALE
        return max(1, round(height * self.aspect)), max(1, round(height))


class Found(NamedTuple):
    """What a measuring process found."""

    seconds: float
    """Median."""
    peak: float
    """Most bytes in use."""
    before: float
    """Bytes in use once the model was loaded and had run on a small picture."""


def measure_case(case: Case) -> Found:
    """Loads nano and measures `case`; for a process of its own."""
    from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
    from icmsr_core.runtime.recipe import Recipe
    from icmsr_core.weights.embedded import embedded_generator

    use_threads(case.threads)
    silence_diffusers()
    device = torch.device(case.device)
    backbone = load_backbone(Recipe(generator=embedded_generator(), device=case.device, dtype=case.dtype))
    peak, watch = Peak(device), Stopwatch(device, case.clock)
    upscale(backbone, torch.rand(1, 3, 32, 32, device=device), case.settings)
    peak.reset()
    before = peak.bytes()
    width, height = case.input_size
    image = torch.rand(1, 3, height, width, device=device)
    seconds = []
    for _ in range(case.runs):
        started = watch.now()
        upscale(backbone, image, case.settings)
        seconds.append(watch.now() - started)
    return Found(statistics.median(seconds), peak.bytes(), before)


def rows_of(results: dict[Case, Found | str]) -> list[list[str]]:
    """The table's lines; a text in the place of a measurement says why there is none."""
    rows, first = [], None
    for case, found in results.items():
        width, height = (SCALE * side for side in case.input_size)
        head = [f"{case.megapixels:g}", f"{width} x {height}"]
        if isinstance(found, str):
            rows.append([*head, found, *["-"] * 5])
            continue
        each = found.seconds / (width * height / 2**20)
        first = first or each
        # Input, input at the size of the result, result: three channels of float32.
        pictures = 12 * width * height * (2 + 1 / SCALE**2)
        rows.append(
            [
                *head,
                number(found.seconds),
                number(each),
                f"{each / first - 1:+.0%}",
                *(f"{amount / 1e6:.0f}" for amount in (found.peak, pictures, found.peak - found.before - pictures)),
            ]
        )
    return rows


def parse(arguments: Sequence[str] | None) -> list[Case]:
    """What the command line asks for, checked before anything is loaded. Wrong usage leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megapixels",
        nargs="+",
        type=float,
        default=list(MEGAPIXELS),
        metavar="M",
        help="sizes of the result in units of 2^20 pixels (default 0.25 to 64)",
    )
    parser.add_argument("--aspect", type=float, default=1.0, help="width over height (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto, ... (default cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--vae", choices=VAE_MODES, default=UpscaleSettings.vae, help="our VAE mode")
    add_common_options(parser, runs=1)
    options = parser.parse_args(arguments)
    if min(options.megapixels) <= 0 or max(options.megapixels) > 1024:
        parser.error(f"--megapixels must be above 0 and at most 1024, got {options.megapixels}")
    if options.aspect <= 0:
        parser.error(f"--aspect must be above 0, got {options.aspect:g}")
    settings, device = checked_settings(parser, options, options.device, options.vae)
    counts = options.runs, options.threads, options.clock
    return [
        Case(megapixels, options.aspect, device, options.dtype, *counts, settings) for megapixels in options.megapixels
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every size, prints the table and returns the exit code."""
    cases = parse(arguments)
    results = measure_all(cases, measure_case, lambda case: f"{case.megapixels:g} megapixels")
    first = cases[0]
    print(f"{machine(torch.device(first.device))}")
    settings = f"tile {first.settings.tile}, vae {first.settings.vae}"
    print(f"nano, {first.dtype}, {settings}; median of {first.runs} runs, {first.clock} clock\n")
    print(markdown(COLUMNS, rows_of(results)))
    return 0 if all(isinstance(found, Found) for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
