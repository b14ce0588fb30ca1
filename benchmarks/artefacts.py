"""Faults that training leaves: staircases on slanted edges, halos, and patterns that repeat with the latent's cells.

    python benchmarks/artefacts.py
    python benchmarks/artefacts.py --generator FILE --base BASE --fidelity 0 --out FOLDER

Edges: a straight edge at several angles (degrees from upright), drawn at 512 pixels, reduced four times by area and
enlarged again. "jitter" is how far the edge leaves the straight line (pixels, RMS), "width" its rise from 10% to 90%
(pixels), "halo" the overshoot over the edge's height. Patterns: the strongest spectral line at a period of 2, 4 and 8
pixels over its surroundings, in dB: in a flat area with faint noise, and in textures from scikit-image (extra `test`)
after the preset `camera`. Without a pattern it is about 8 to 13 dB. `--out` keeps the edges as pictures. Exit codes:
0 done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data
import torch
from _command_line import SCALE, add_threads_option, machine, markdown, run_benchmark
from _measurement import use_threads

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.artefacts import edge_shape, lattice_peak
from icmsr_core.pictures.files import Picture, from_tensor, to_tensor, write_picture
from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.data.degradation import degrade
from icmsr_core.train.data.presets import PRESETS
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import embedded_base, embedded_generator

Image = np.ndarray[Any, np.dtype[np.float32]]
"""[H, W, 3] in [0, 1]."""
Enlarge = Callable[[Image], Image]
SIDE, MARGIN, FINER = 512, 64, 8
"""Pixels of an edge's picture; what is cut off each side before it is measured; samples a pixel and axis."""
ANGLES = (3, 7, 12, 20, 30)
PERIODS = (2, 4, 8)
TEXTURES = ("brick", "grass", "gravel")
NOISE = 2 / 255


def slanted_edge(angle: float, dark: float = 0.25, bright: float = 0.75) -> Image:
    """An edge at `angle` degrees from upright; every pixel is the mean of what it covers."""
    places = (np.arange(SIDE * FINER) + 0.5) / FINER - SIDE / 2
    right = places[None, :] > np.tan(np.radians(angle)) * places[:, None]
    covered = right.reshape(SIDE, FINER, SIDE, FINER).mean((1, 3), dtype=np.float32)
    return np.repeat((dark + (bright - dark) * covered)[..., None], 3, axis=-1).astype(np.float32)


def reduced(picture: Image) -> Image:
    """A SCALE-th of the size, by area."""
    side = SIDE // SCALE
    return np.asarray(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA), np.float32)


def bicubic(picture: Image) -> Image:
    """SCALE times the size."""
    height, width = picture.shape[:2]
    return from_tensor(resize(to_tensor(picture), height * SCALE, width * SCALE).clamp(0, 1))


def luma(picture: Image) -> Image:
    """Y in [0, 1], from full-range R, G, B."""
    return picture @ np.array([0.299, 0.587, 0.114], np.float32)


def edge_rows(ways: dict[str, Enlarge], out: Path | None) -> Iterator[list[str]]:
    """A row for each angle: jitter, width and halo of the truth and of each way to enlarge."""
    for angle in ANGLES:
        truth = slanted_edge(angle)
        pictures = {"truth": truth, **{name: enlarge(reduced(truth)) for name, enlarge in ways.items()}}
        shapes = [edge_shape(luma(made)[MARGIN:-MARGIN]) for made in pictures.values()]
        if out is not None:
            for name, made in pictures.items():
                write_picture(out / f"{angle}-{name}.png", Picture(rgb=made))
        measured = [(f"{shape.jitter:.2f}", f"{shape.width:.1f}", f"{shape.overshoot:.2f}") for shape in shapes]
        yield [str(angle), *(value for row in zip(*measured) for value in row)]


def pattern_rows(ways: dict[str, Enlarge]) -> Iterator[list[str]]:
    """A row for each kind of area and period: the peak of the truth and of each way to enlarge, in dB."""
    random = np.random.default_rng(0)
    flat = np.full((SIDE, SIDE, 3), 0.5, np.float32) + random.normal(0, NOISE, (SIDE, SIDE, 3)).astype(np.float32)
    small = np.full((SIDE // SCALE,) * 2 + (3,), 0.5) + random.normal(0, NOISE, (SIDE // SCALE,) * 2 + (3,))
    areas: dict[str, tuple[Image, Image]] = {"flat": (flat, small.astype(np.float32))}
    for seed, name in enumerate(TEXTURES):
        picture = getattr(skimage.data, name)()
        colours = np.ascontiguousarray(np.dstack([picture] * 3) if picture.ndim == 2 else picture)[:SIDE, :SIDE]
        low = degrade(colours, PRESETS["camera"], np.random.default_rng(seed))
        areas[name] = colours.astype(np.float32) / np.float32(255), low.astype(np.float32) / np.float32(255)
    for area, (original, damaged) in areas.items():
        made = [original, *(enlarge(damaged) for enlarge in ways.values())]
        for period in PERIODS:
            peaks = [lattice_peak(luma(picture)[MARGIN:-MARGIN, MARGIN:-MARGIN], period) for picture in made]
            yield [f"{area}, {period}", *(f"{peak:.1f}" for peak in peaks)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Wrong usage leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, default=embedded_generator(), metavar="FILE")
    parser.add_argument("--base", type=Path, default=embedded_base(), metavar="BASE")
    parser.add_argument("--fidelity", type=float, metavar="F", help="default: the file's own")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to make, for the edges' pictures")
    add_threads_option(parser)
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} is there already: name another folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the two tables and returns the exit code."""
    options = parse(arguments)
    use_threads(options.threads)
    silence_diffusers()
    try:
        recipe = Recipe(base=options.base, generator=options.generator, fidelity=options.fidelity)
        backbone = load_backbone(recipe)
        if options.out is not None:
            options.out.mkdir(parents=True)
        ways: dict[str, Enlarge] = {
            "bicubic": bicubic,
            "generator": lambda picture: from_tensor(upscale(backbone, to_tensor(picture))),
        }
        print(f"{machine(torch.device('cpu'))}; {options.generator}\n")
        names = ("truth", *ways)
        columns = ["degrees", *(f"{measure}, {name}" for measure in ("jitter", "width", "halo") for name in names)]
        print(markdown(columns, list(edge_rows(ways, options.out))))
        print()
        print(markdown(["area, period", *names], list(pattern_rows(ways))))
    except IcmsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
