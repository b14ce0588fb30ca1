"""The pictures that the ablation (`ablation`) measures on, and the measuring, through the path that inference takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import IcmsrError
from ...measures.evaluation import COLOR
from ...measures.metrics import mean_color_difference, metric
from ...pictures.files import Picture, find_pictures, from_tensor, read_picture, to_tensor, write_picture
from ...runtime.diffusers_backbone import load_backbone
from ...runtime.recipe import Recipe
from ...upscale.one_step import upscale
from ...upscale.settings import UpscaleSettings
from ...upscale.sizes import resize
from ..data.degradation import degrade
from ..data.presets import PRESETS
from ..data.sources import read_photograph

Pairs = Sequence[tuple[str, Path, Path]]
"""Name, input and truth of each picture."""
PictureValues = dict[str, dict[str, dict[str, float | None]]]
"""By set of pictures, picture and measure; None where a measure is not defined."""


def make_photographs(folder: Path, photographs: Sequence[Path], count: int, side: int) -> Path:
    """`folder` with hr/ and lr/: the middle of `count` of the `photographs`, and the same degraded (preset `light`).

    Evenly chosen among those of `side` pixels or more, in the order of their paths; the degradation's random numbers
    depend on the place in that order alone. What is there already stays. Raises `IcmsrError` when there are too few.
    """
    if len(list(folder.glob("lr/*.png"))) == count:
        return folder
    large = []
    for path in sorted(photographs):
        picture = read_photograph(path)
        if min(picture.shape[:2]) >= side:
            large.append((path.stem, picture))
    if len(large) < count:
        raise IcmsrError(
            f"only {len(large)} held-out photographs have sides of {side} px or more, {count} are wanted: "
            "lower photographs or side, or add photographs"
        )
    for number in range(count):
        name, picture = large[number * len(large) // count]
        top, left = ((length - side) // 2 for length in picture.shape[:2])
        sharp = np.ascontiguousarray(picture[top : top + side, left : left + side])
        low = degrade(sharp, PRESETS["light"], np.random.default_rng(number))
        for part, image in (("hr", sharp), ("lr", low)):  # the input last: its number says that all is there
            (folder / part).mkdir(parents=True, exist_ok=True)
            write_picture(folder / part / f"{name}.png", Picture(rgb=image.astype(np.float32) / np.float32(255)))
    return folder


def pairs_of(folder: Path, every: int = 1) -> Pairs:
    """Every `every`-th pair of `folder`, in the order of the names.

    Raises `IcmsrError` unless its lr/ and hr/ hold pictures of the same names.
    """
    low, high = ({path.stem: path for path in find_pictures(folder / part)} for part in ("lr", "hr"))
    alone = sorted(low.keys() ^ high.keys())
    if alone or not low:
        what = f"{', '.join(alone[:4])} without a partner" if alone else "no pictures"
        raise IcmsrError(f"{folder}: lr/ and hr/ must hold pictures of the same names, found {what}")
    return [(name, low[name], high[name]) for name in sorted(low)[::every]]


def measure_pictures(
    base: Path,
    generator: Path | None,
    sets: Mapping[str, Pairs],
    metrics: Sequence[str],
    keep: str,
    folder: Path | None,
    fidelity: float | None = None,
) -> PictureValues:
    """The values of `metrics`, and the shift of the mean colour against the input, for `generator` on `base`.

    Without a generator, of bicubic resizing. Results are rounded to 8 bits, as a file has them; those of the set `keep`
    are written into `folder`, if there is one. `fidelity` as in `Recipe`.
    """
    backbone = None if generator is None else load_backbone(Recipe(base, generator, fidelity=fidelity))
    values: PictureValues = {kind: {} for kind in sets}
    for kind, name, low_file, high_file in ((kind, *files) for kind, pairs in sets.items() for files in pairs):
        low, truth = to_tensor(read_picture(low_file).rgb), read_picture(high_file).rgb
        height, width = truth.shape[:2]
        resized = resize(low, height, width)
        result = resized if backbone is None else upscale(backbone, low, UpscaleSettings(size=(width, height)))
        shown = from_tensor((result * 255).round() / 255)
        row = {entry: metric(entry)(shown, truth) for entry in metrics}
        row[COLOR] = mean_color_difference(shown, from_tensor(resized))
        values[kind][name] = {entry: None if math.isnan(value) else round(value, 6) for entry, value in row.items()}
        if folder is not None and kind == keep:
            folder.mkdir(parents=True, exist_ok=True)
            write_picture(folder / f"{name}.png", Picture(rgb=shown))
    return values
