"""How soft training pairs are, against real ones: the energy of contrast by frequency, and what the input keeps of it.

    python benchmarks/pair_spectra.py --photos PHOTOS --real realsr camera:2:1 lens:1:2.5

A kind of pair is PRESET:SHRINK:ENLARGE, a preset of `icmsr_core.train.data.presets` with `data.shrink` and
`data.enlarge`. Energies are those of the luma of crops of 256 pixels under a Hann window, by the frequency in cycles a
pixel of the original; the input is enlarged by bicubic interpolation. The values are medians over the pairs. `--real`
is a folder with lr and hr, of which the crop in the middle is taken.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from _command_line import machine, markdown, number, run_benchmark
from numpy.typing import NDArray

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import find_pictures
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.sources import read_photograph

CROP = 256
SCALE = 4
BANDS = ((0.02, 0.06), (0.06, 0.1), (0.1, 0.125), (0.125, 0.2), (0.2, 0.3), (0.3, 0.5))
COLUMNS = (
    "pairs",
    "number",
    *(f"original, {low:g} to {high:g}" for low, high in BANDS),
    *(f"input / original, {low:g} to {high:g}" for low, high in BANDS),
)
Pixels = NDArray[np.uint8]


def energies(picture: Pixels) -> NDArray[np.float64]:
    """The energy of contrast of a square `picture` [N, N, 3] in each of the bands."""
    luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
    side = len(luma)
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((luma - luma.mean()) * np.outer(window, window))) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    return np.array([power[(low <= radius) & (radius < high)].sum() for low, high in BANDS])


def real_pairs(folder: Path) -> Iterator[tuple[Pixels, Pixels]]:
    """Original and input of each pair in `folder`, the middle of them. Raises `IcmsrError` where one is missing."""
    inputs = {path.name: path for path in find_pictures(folder / "lr")}
    side = CROP // SCALE
    for path in find_pictures(folder / "hr"):
        if path.name not in inputs:
            raise IcmsrError(f"{path}: {folder / 'lr'} has no input of that name")
        sharp, low = (read_photograph(file) for file in (path, inputs[path.name]))
        height, width = low.shape[:2]
        if sharp.shape[:2] != (SCALE * height, SCALE * width) or min(height, width) < side:
            raise IcmsrError(f"{path}: {sharp.shape[:2]} is not {SCALE} x {low.shape[:2]}, of at least {CROP} px")
        y, x = (height - side) // 2, (width - side) // 2
        rows, columns = (slice(SCALE * first, SCALE * (first + side)) for first in (y, x))
        yield sharp[rows, columns], low[y : y + side, x : x + side]


def made_pairs(kind: str, photos: Sequence[str], number: int) -> Iterator[tuple[Pixels, Pixels]]:
    """Original and input of `number` training pairs of `kind`. Raises `IcmsrError` for a kind of another form."""
    try:
        preset, shrink, enlarge = kind.split(":")
        factors = float(shrink), float(enlarge)
    except ValueError:
        raise IcmsrError(f"a kind of pair is PRESET:SHRINK:ENLARGE such as lens:1:2.5, got {kind!r}") from None
    config = DataConfig(
        folders=tuple(photos),
        synthetic=0,
        crop=CROP,
        shrink=factors[0],
        enlarge=factors[1],
        degradations=(preset,),
        degradation_weights=(1,),
    )
    pairs = TrainingPairs(config, 0)
    for index in range(number):
        sample = pairs[index]
        sharp, low = (sample[name].permute(1, 2, 0).contiguous().numpy() for name in ("sharp", "low"))
        yield sharp, low


def row(name: str, pairs: Iterable[tuple[Pixels, Pixels]]) -> list[str]:
    """The line of `pairs`, called `name`: shares of the originals' energy, and the inputs' energy over it, as medians:
    a few pictures of high contrast would else decide."""
    found = []
    for sharp, low in pairs:
        enlarged = cv2.resize(low, sharp.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        found.append((energies(sharp), energies(np.asarray(enlarged, np.uint8))))
    original, given = np.swapaxes(found, 0, 1)
    shares = np.median(original / original.sum(1, keepdims=True), axis=0)
    return [name, str(len(found)), *map(number, shares), *map(number, np.median(given / original, axis=0))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="PRESET:SHRINK:ENLARGE", help="kinds of training pairs")
    parser.add_argument("--photos", action="append", default=[], help="folder of photographs; may be repeated")
    parser.add_argument("--real", type=Path, help="folder with lr and hr")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each kind (default: 100)")
    options = parser.parse_args(arguments)
    try:
        rows = [] if options.real is None else [row("real", real_pairs(options.real))]
        rows += [row(kind, made_pairs(kind, options.photos, options.pairs)) for kind in options.kinds]
    except IcmsrError as error:
        print(f"pair_spectra: {error}", file=sys.stderr)
        return 1
    print(f"{machine(torch.device('cpu'))}\n\n{markdown(COLUMNS, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
