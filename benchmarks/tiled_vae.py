"""The VAE untiled, exact and bounded: time, peak memory, and how near the results are to the untiled one.

    python benchmarks/tiled_vae.py --pictures FOLDER
    python benchmarks/tiled_vae.py --pictures FOLDER --sizes 4096 --modes exact bounded --clock cpu

Pictures of the folder, as many as are needed, are laid side by side, enlarged four times, encoded and decoded by the
embedded model's VAE. Each line is measured in its own process. "against the first" compares with the first mode of the
same size; "beside them" is the peak of the process minus the picture, the result and what it held before.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from _command_line import SCALE, add_clock_options, machine, markdown, number, run_benchmark
from _measurement import ChildFailed, Peak, Stopwatch, in_child, use_threads

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import find_pictures, read_picture, to_tensor
from icmsr_core.pictures.ranges import signed_to_unit, unit_to_signed
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize

MODES = ("untiled", "exact", "bounded")
COLUMNS = ("px", "mode", "s", "against the first", "peak MB", "beside them MB", "PSNR, dB", "largest difference")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    size: int
    """Height and width of the picture."""
    mode: str
    """One of `MODES`."""
    folder: Path
    """Where pictures are."""
    tile: int
    """The tile in pixels."""
    threads: int
    """Torch's threads; 0 for its own choice."""
    clock: str
    """One of `CLOCKS`."""
    result: Path
    """File that the result goes to."""


class Found(NamedTuple):
    """What a measuring process found."""

    seconds: float
    """Of encoding and decoding."""
    peak: float
    """Most bytes in use."""
    before: float
    """Bytes in use with the model and the picture loaded."""


def mosaic(folder: Path, size: int) -> torch.Tensor:
    """Pictures of `folder` row by row until `size` x `size` pixels are full, [1, 3, size, size] in [0, 1]."""
    canvas, paths = torch.zeros(1, 3, size, size), iter(find_pictures(folder))
    top = 0
    while top < size:
        left, height = 0, size - top
        while left < size:
            path = next(paths, None)
            if path is None:
                paths = iter(find_pictures(folder))
                continue
            image = to_tensor(read_picture(path).rgb)
            height = min(height, image.shape[2])
            width = min(size - left, image.shape[3])
            canvas[:, :, top : top + height, left : left + width] = image[:, :, :height, :width]
            left += width
        top += height
    return canvas


def measure_case(case: Case) -> Found:
    """Loads nano and measures `case`; to run in its own process."""
    from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
    from icmsr_core.runtime.recipe import Recipe
    from icmsr_core.tiled_vae.tiled import decode_tiled, encode_tiled, plan_stripes
    from icmsr_core.weights.embedded import embedded_generator

    use_threads(case.threads)
    silence_diffusers()
    backbone = load_backbone(Recipe(generator=embedded_generator()))
    factor = backbone.descriptor.latent_factor
    cells = case.size // factor
    stripes, one = plan_stripes(cells, cells, case.tile // factor), plan_stripes(64 // factor, 64 // factor, 0)
    with torch.inference_mode():
        warm = torch.rand(1, 3, 64, 64)
        decode_tiled(backbone, encode_tiled(backbone, warm, one), warm, one)
        image = resize(mosaic(case.folder, case.size // SCALE), case.size, case.size)
        peak, watch = Peak(torch.device("cpu")), Stopwatch(torch.device("cpu"), case.clock)
        peak.reset()
        before = peak.bytes()
        out = torch.empty_like(image)
        started = watch.now()
        if case.mode == "untiled":
            decoded = backbone.decode(backbone.encode(unit_to_signed(image)))
            out.copy_(signed_to_unit(decoded))
        else:
            latent = encode_tiled(backbone, image, stripes, exact=case.mode == "exact")
            decode_tiled(backbone, latent, out, stripes, exact=case.mode == "exact")
        seconds = watch.now() - started
        found = Found(seconds, peak.bytes(), before)
    torch.save(out, case.result)
    return found


def difference(one: Path, other: Path) -> tuple[float, float]:
    """PSNR in dB and the largest difference of two results."""
    error = (torch.load(one, mmap=True) - torch.load(other, mmap=True)).abs_()
    mean = float(error.square().mean())
    return (-10 * math.log10(mean) if mean else math.inf), float(error.max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every case, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048], help="in pixels, multiples of 64")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tile", type=int, default=UpscaleSettings.tile)
    add_clock_options(parser)
    options = parser.parse_args(arguments)
    if any(size < 64 or size % 64 for size in options.sizes):
        parser.error(f"--sizes must be multiples of 64, got {options.sizes}")
    try:
        UpscaleSettings(tile=options.tile, overlap=0)
    except IcmsrError as error:
        parser.error(str(error))
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            first: Found | None = None
            reference = Path(folder) / f"{options.modes[0]}.pt"
            for mode in options.modes:
                print(f"{size} px, {mode}", file=sys.stderr, flush=True)
                result = Path(folder) / f"{mode}.pt"
                case = Case(size, mode, options.pictures, options.tile, options.threads, options.clock, result)
                try:
                    found = in_child(measure_case, case)
                except ChildFailed as error:
                    print(f"{size} px, {mode}: {error}", file=sys.stderr)
                    failed = 1
                    continue
                first = first or found
                near = ["-", "-"]
                if result != reference and reference.is_file():
                    psnr, largest = difference(reference, result)
                    near = [number(psnr) if largest else "the same", f"{largest:.1e}"]
                rows.append(
                    [
                        str(size),
                        mode,
                        number(found.seconds),
                        f"{found.seconds / first.seconds - 1:+.0%}",
                        f"{found.peak / 1e6:.0f}",
                        f"{(found.peak - found.before - 12 * size**2) / 1e6:.0f}",
                        *near,
                    ]
                )
    print(f"{machine(torch.device('cpu'))}\n\n{markdown(COLUMNS, rows)}")
    return failed


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
