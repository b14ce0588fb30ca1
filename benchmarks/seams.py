"""Whether the UNet's tiles show: gradient energy along their borders over that of the untiled picture there.

    python benchmarks/seams.py --pictures FOLDER
    python benchmarks/seams.py --pictures FOLDER --number 6 --tiles 512 768 1024 --overlaps 64 128 --shortest 256

The energy is the mean squared difference of neighbouring pixels across every line where a tile begins to fade in, is
halfway in, or is fully in. A seam adds to it: 1 means no seam, and the mean over the pictures should stay below 1.05.
"work" is the area of the tiles divided by that of the picture, the largest of all pictures; "PSNR" is tiled against
untiled. The embedded model enlarges the pictures four times, with the VAE in exact mode. Pictures that fit into one
tile are skipped.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from _command_line import SCALE, add_threads_option, machine, markdown, number, run_benchmark
from _measurement import use_threads
from torch import Tensor

from icmsr_core.backbone.protocol import Backbone
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import find_pictures, read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import run_plan, upscale
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.tiling import Span, TilePlan
from icmsr_core.weights.embedded import embedded_generator

COLUMNS = ("tile", "overlap", "pictures", "mean", "worst", "PSNR, dB", "work")


class Seam(NamedTuple):
    """What one picture shows with one size of tile."""

    ratio: float
    """Gradient energy along the borders, tiled over untiled."""
    psnr: float
    """Tiled against untiled, dB."""
    work: float
    """Area of the tiles over that of the picture."""


def border_lines(spans: Sequence[Span]) -> list[int]:
    """Cells before which a border of these spans (along one axis, in order) lies."""
    lines = set()
    for span in spans:
        begin, end = span.fade_in
        if begin > 0:
            lines |= {begin, (begin + end) // 2, end}
    return sorted(lines)


def energy(image: Tensor, plan: TilePlan, factor: int) -> float:
    """Mean squared difference of the pixels of `image` [1, 3, H, W] on both sides of the plan's borders."""
    differences = []
    for dim, spans in ((2, {box.rows for box in plan.boxes}), (3, {box.columns for box in plan.boxes})):
        for line in border_lines(sorted(spans, key=lambda span: span.start)):
            place = line * factor
            if 0 < place < image.shape[dim]:
                step = image.narrow(dim, place, 1) - image.narrow(dim, place - 1, 1)
                differences.append(step.flatten())
    return float(torch.cat(differences).square().mean())


def measure(backbone: Backbone, image: Tensor, whole: Tensor, settings: UpscaleSettings) -> Seam | None:
    """What the tiles of `settings` do to `image`, whose untiled result is `whole`; None if there is one tile only."""
    factor = backbone.descriptor.latent_factor
    plan = plan_upscale(backbone.descriptor, image.shape[2], image.shape[3], settings)
    tiles = plan.tiles
    if len(tiles) == 1:
        return None
    tiled = run_plan(backbone, image, plan)
    area = sum((box.rows.stop - box.rows.start) * (box.columns.stop - box.columns.start) for box in tiles.boxes)
    psnr = -10 * torch.log10((tiled - whole).square().mean())
    work = area / (tiles.height * tiles.width)
    return Seam(energy(tiled, tiles, factor) / energy(whole, tiles, factor), float(psnr), work)


def pictures(folder: Path, number: int, shortest: int) -> Iterator[Tensor]:
    """The first `number` pictures of `folder` whose shorter side has at least `shortest` pixels."""
    found = 0
    for path in find_pictures(folder):
        image = to_tensor(read_picture(path).rgb)
        if min(image.shape[2:]) >= shortest:
            found += 1
            yield image
        if found == number:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of low-quality pictures")
    parser.add_argument("--number", type=int, default=20, help="how many of them (default 20)")
    parser.add_argument("--shortest", type=int, default=1, help="least length of their shorter side (default 1)")
    parser.add_argument("--tiles", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--overlaps", nargs="+", type=int, default=[16, 32, 64, 128])
    add_threads_option(parser)
    options = parser.parse_args(arguments)
    try:
        chosen = [
            UpscaleSettings(scale=SCALE, tile=tile, overlap=overlap, vae="exact")
            for tile, overlap in product(options.tiles, options.overlaps)
            if 2 * overlap <= tile
        ]
    except IcmsrError as error:
        parser.error(str(error))
    use_threads(options.threads)
    silence_diffusers()
    backbone = load_backbone(Recipe(generator=embedded_generator()))
    found: dict[UpscaleSettings, list[Seam]] = {settings: [] for settings in chosen}
    for index, image in enumerate(pictures(options.pictures, options.number, options.shortest)):
        print(f"picture {index + 1}", file=sys.stderr, flush=True)
        whole = upscale(backbone, image, UpscaleSettings(scale=SCALE, tile=0))
        for settings in chosen:
            seam = measure(backbone, image, whole, settings)
            if seam is not None:
                found[settings].append(seam)
    if not any(found.values()):
        print("no picture is larger than a tile", file=sys.stderr)
        return 1
    rows = []
    for settings, seams in found.items():
        if seams:
            ratios, psnrs, works = zip(*seams)
            rows.append(
                [
                    str(settings.tile),
                    str(settings.overlap),
                    str(len(seams)),
                    f"{statistics.mean(ratios):.4f}",
                    f"{max(ratios):.4f}",
                    number(statistics.mean(psnrs)),
                    f"{max(works):.2f}",
                ]
            )
    print(f"{machine(torch.device('cpu'))}\n\n{markdown(COLUMNS, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
