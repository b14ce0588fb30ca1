"""What the options of `icmsr upscale` ask for: settings, weights, a cluster. Needs no torch."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..errors import IcmsrError
from ..foreign.told import Told
from ..pictures.storage import place_of
from ..runtime.recipe import Recipe
from ..upscale.settings import UpscaleSettings
from ..weights.embedded import embedded_base, embedded_generator

CLUSTER_DEVICES = ("auto", "cpu", "cuda")
"""What ``--device`` may be with ``--ray``."""


def settings_of(options: argparse.Namespace) -> UpscaleSettings:
    """The settings that ``icmsr upscale`` was given. Leaves through argparse when they are wrong."""
    if options.fit is not None and options.size is None:
        options.parser.error(f"--fit {options.fit} is for an exact size: give --size WxH, or leave it out")
    try:
        settings = UpscaleSettings(
            scale=options.scale,
            size=options.size,
            overlap=UpscaleSettings.overlap if options.overlap is None else options.overlap,
            color_fix=options.color_fix or UpscaleSettings.color_fix,
            tile=options.tile if isinstance(options.tile, int) else UpscaleSettings.tile,
            batch=options.batch if isinstance(options.batch, int) else UpscaleSettings.batch,
            vae=options.vae_mode,
            longest=options.longest,
            shortest=options.shortest,
            megapixels=options.megapixels,
            fit=options.fit or UpscaleSettings.fit,
            smallest=options.smallest or UpscaleSettings.smallest,
            resize=options.resize or UpscaleSettings.resize,
        )
    except IcmsrError as error:
        options.parser.error(str(error))
    return settings


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What ``icmsr upscale`` was asked to load."""
    return Recipe(
        base=embedded_base() if options.base == "nano" else options.base,
        generator=embedded_generator() if options.model == "nano" else Path(options.model),
        told=Told(options.family, options.timestep, options.prediction, options.coeff_t),
        fidelity=options.fidelity,
        prompt=options.prompt,
        tiny_vae=options.tiny_vae,
        device=options.device,
        dtype=options.dtype,
        compile_unet=options.compile,
    )


def check_cluster(options: argparse.Namespace) -> None:
    """Refuses what ``--ray`` cannot do: wrong usage leaves through argparse, what is missing raises `IcmsrError`."""
    if options.shard is not None:
        options.parser.error("--shard: --ray divides the pictures itself: leave out one of the two")
    if options.mask is not None:
        options.parser.error("--mask: a mask belongs to one picture, --ray is for many: leave out one of the two")
    if options.device not in CLUSTER_DEVICES:
        options.parser.error(
            f"--device {options.device}: with --ray each worker gets its own device: use one of "
            f"{', '.join(CLUSTER_DEVICES)}"
        )
    if importlib.util.find_spec("ray") is None:
        raise IcmsrError("--ray needs the package Ray, which is not installed: pip install 'icm-sr[ray]'")
    first = options.inputs[0]
    if len(options.inputs) == 1 and place_of(first).is_file():
        options.parser.error(f"{first}: is one picture, --ray is for many: name a folder, or leave out --ray")


def for_workers(options: argparse.Namespace) -> argparse.Namespace:
    """`options` as another process can use them, in another folder: without the parser, with absolute paths."""
    kept = {name: value for name, value in vars(options).items() if name != "parser"}
    for name in ("model", "base", "tiny_vae"):
        if kept[name] not in (None, "nano") and Path(kept[name]).exists():  # it may be a hub id
            kept[name] = type(kept[name])(Path(kept[name]).absolute())
    return argparse.Namespace(**kept)
