"""The command `icmsr`: demo, upscale, conditions, evaluate, inspect, import, export.

Exit codes: 0 done; 1 something failed, said in one line on stderr; 2 wrong usage; 130 interrupted.

What a command needs (torch, diffusers, OpenCV, tqdm) is imported by the command, inside its function: help, version and
wrong usage answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..console import escape_unprintable
from ..errors import IcmsrError
from ..foreign.told import Told
from ..runtime.recipe import Recipe
from ..upscale.settings import UpscaleSettings
from ..weights.embedded import embedded_generator
from ..whole_file import replace_file
from .arguments import AUTO, make_parser
from .asked import check_cluster, for_workers, recipe_of, settings_of

SETTINGS_OF_A_FILE = ("color_fix", "tile", "overlap", "smallest", "resize")
"""Options that a generator file may recommend a value for."""

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.diffusers_backbone import DiffusersBackbone
    from ..steps import Steps
    from .job_list import Job
    from .picture_jobs import UntilItFits


def run() -> None:
    """Entry point of the console script: runs `main` and leaves with its exit code."""
    code = main(sys.argv[1:])
    # Threads of the libraries must not turn an interrupt into a second traceback on the way out.
    sys.stdout.flush()
    sys.exit(code)


def main(arguments: list[str]) -> int:
    """Runs one command and returns its exit code. Wrong usage leaves through argparse with code 2."""
    escape_unprintable()
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return RUN[options.command](options)
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


def run_demo_command(options: argparse.Namespace) -> int:
    """``icmsr demo``."""
    from tqdm import tqdm

    from ..runtime.ingredients import check_recipe
    from .demo import run_demo

    recipe = Recipe(generator=embedded_generator(), device=options.device, dtype=options.dtype)
    loaded: list[DiffusersBackbone] = []

    def load() -> DiffusersBackbone:
        loaded.append(load_networks(recipe))
        return loaded[0]

    check_recipe(recipe)

    with tqdm(desc="upscaling", unit="tile", disable=None) as bar:
        result = run_demo(load, options.out, bar_steps(bar))
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
    settings = settings_of(options)
    if options.ray is not None:
        check_cluster(options)

    from tqdm import tqdm

    from ..runtime.ingredients import check_recipe
    from ..upscale.free_memory import free_system_memory
    from .job_list import NamingRules, plan_jobs, too_large_results, too_much_memory
    from .picture_jobs import read_mask, upscale_jobs
    from .start_line import Announcer

    recipe = recipe_of(options)
    # Another machine may have the card and the compiler.
    check_recipe(recipe if options.ray is None else replace(recipe, device="cpu", compile_unet=False))
    extension = f".{options.format}" if options.format else ""
    rules = NamingRules(extension, options.recursive, options.skip_existing, options.shard)
    listed = plan_jobs(options.inputs, options.output, rules)
    if listed.passed_over():
        print(listed.passed_over(), file=sys.stderr)
    if options.ray is not None:
        return upscale_on_cluster(options, settings, listed.jobs)
    too_large = too_large_results(listed.jobs, settings)
    too_large |= too_much_memory(listed.jobs, settings, free_system_memory())
    jobs = [job for job in listed.jobs if job not in too_large]
    for reason in too_large.values():
        print(f"icmsr: error: {reason}", file=sys.stderr)
    if not jobs:
        return 1 if too_large else 0
    mask = None if options.mask is None else read_mask(options.mask)
    started = time.perf_counter()
    fitting, backbone, settings = prepared(options, settings, recipe, mask)
    announcer = Announcer(backbone.descriptor, settings, mask)
    line = announcer.start_line([job.source for job in jobs])
    if line is not None:
        print(line, flush=True)
    with (
        tqdm(total=len(jobs), unit="picture", disable=None if len(jobs) > 1 else True) as files,
        tqdm(unit="step", leave=False, disable=None) as tiles,
    ):

        def steps(job: Job) -> Steps:
            tiles.set_description(announcer.bar_words(job.source))
            tiles.reset()
            return bar_steps(tiles)

        failed = upscale_jobs(
            fitting,
            jobs,
            report=lambda line: tqdm.write(f"icmsr: error: {line}", file=sys.stderr),
            steps=steps,
            done=lambda _: files.update(),
            quality=options.quality,
        )
    done = len(jobs) - failed
    where = jobs[0].target if len(jobs) == 1 else options.output
    if done:
        print(f"{done} of {len(jobs) + len(too_large)} written to {where} in {time.perf_counter() - started:.1f} s")
    return 1 if failed or too_large else 0


def prepared(
    options: argparse.Namespace, settings: UpscaleSettings, recipe: Recipe, mask: Tensor | None = None
) -> tuple[UntilItFits, DiffusersBackbone, UpscaleSettings]:
    """What upscales pictures, its networks, and `settings` with what the generator file recommends."""
    from ..upscale.tile_choice import Automatic
    from .picture_jobs import UntilItFits, planner

    backbone = load_networks(recipe)
    told = [name for name in SETTINGS_OF_A_FILE if getattr(options, name) is not None]
    settings = settings.following(backbone.descriptor.recommended, told)
    automatic = Automatic(tile=options.tile == AUTO, batch=options.batch == AUTO)
    plan_for = planner(backbone.descriptor, settings, automatic, backbone.device, backbone.dtype)
    fitting = UntilItFits(backbone, plan_for, tile_too=not isinstance(options.tile, int), mask=mask)
    return fitting, backbone, settings


def prepared_in_worker(options: argparse.Namespace) -> UntilItFits:
    """`prepared` in another process, perhaps on another machine: its package has its own embedded files."""
    return prepared(options, settings_of(options), recipe_of(options))[0]


def upscale_on_cluster(options: argparse.Namespace, settings: UpscaleSettings, jobs: list[Job]) -> int:
    """``icmsr upscale --ray``, from the list of jobs on."""
    from tqdm import tqdm

    from .cluster import connected

    if not jobs:
        return 0
    started, failed = time.perf_counter(), 0
    jobs = [replace(job, source=job.source.absolute(), target=job.target.absolute()) for job in jobs]
    prepare = partial(prepared_in_worker, for_workers(options))
    with connected(options.ray, options.device) as cluster:
        print(f"{len(jobs)} pictures; {cluster.workers.words()}, {cluster.machines} machines", flush=True)
        with tqdm(total=len(jobs), unit="picture", disable=None) as bar:
            for job, line in cluster.upscale(jobs, prepare, settings, options.quality):
                bar.update(job is not None)
                failed += bool(job is not None and line)
                if line:
                    kind = "WARNING" if job is None else "icmsr: error"
                    tqdm.write(f"{kind}: {line}", file=sys.stderr)
    if failed < len(jobs):
        seconds = time.perf_counter() - started
        print(f"{len(jobs) - failed} of {len(jobs)} written to {options.output} in {seconds:.1f} s")
    return 1 if failed else 0


def run_conditions(options: argparse.Namespace) -> int:
    """``icmsr conditions``."""
    from ..conditions import canny_edges, colormap
    from ..pictures.channels import as_rgb
    from ..pictures.files import Picture, from_tensor, read_picture, to_tensor, write_picture
    from .job_list import check_writable

    image = to_tensor(read_picture(options.input).rgb)
    edges = canny_edges(image, options.low, options.high)
    colors = from_tensor(colormap(image))
    check_writable(options.out)
    pictures = {
        "colormap": Picture(rgb=colors),
        "edges": Picture(rgb=from_tensor(as_rgb(edges)), grey=True),
        # Four channels as one file: the edges are the alpha channel.
        "hint": Picture(rgb=colors, alpha=from_tensor(edges)),
    }
    paths = {name: options.out / f"{options.input.stem}_{name}.png" for name in pictures}
    for name, path in paths.items():
        write_picture(path, pictures[name])
    for path in paths.values():
        print(f"wrote {path}")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """``icmsr evaluate``."""
    import json

    from tqdm import tqdm

    from ..measures.evaluation import evaluate_folders

    if options.json is not None and not options.json.parent.is_dir():
        raise IcmsrError(f"{options.json}: the folder {options.json.parent} does not exist: create it first")
    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    with tqdm(unit="picture", leave=False, disable=None) as bar:
        evaluation = evaluate_folders(options.sr, options.hr, options.lq, names, bar_steps(bar), options.weights_dir)
    if options.json is not None:
        replace_file(options.json, (json.dumps(evaluation.to_json(), indent=2) + "\n").encode())
    print(evaluation.table())
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """``icmsr inspect``."""
    from .inspection import file_report

    print(file_report(options.file))
    return 0


def run_import(options: argparse.Namespace) -> int:
    """``icmsr import``."""
    from ..exchange.importers import ImportSettings, import_checkpoint
    from ..weights.hub import find_base
    from .inspection import file_report

    base = None if options.base is None else find_base(options.base, options.prompt is not None)
    told = Told(options.family, options.timestep, options.prediction, options.coeff_t)
    settings = ImportSettings(told, base, options.prompt, options.half)
    import_checkpoint(options.kind, options.source, options.dest, settings)
    print(f"wrote {options.dest}")
    print(file_report(options.dest))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """``icmsr export``."""
    from ..exchange.exporters import export_generator

    exported = export_generator(options.format, options.file, options.dest, options.fidelity)
    print(f"wrote {exported.path}: the UNet's LoRA on {exported.modules} modules")
    print(f"not in the file: {'; '.join(exported.dropped)}")
    return 0


def bar_steps(bar: Any) -> Steps:
    """Steps that a tqdm bar shows."""
    from ..steps import Steps

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return Steps(show)


def load_networks(recipe: Recipe) -> DiffusersBackbone:
    """The networks of `recipe`, loaded without advice from diffusers to programmers."""
    from ..runtime import ingredients
    from ..runtime.diffusers_backbone import load_backbone, silence_diffusers
    from ..runtime.precision import use_full_float32

    logging.getLogger(ingredients.__name__).setLevel(logging.INFO)  # says what a foreign file is
    silence_diffusers()
    use_full_float32()
    return load_backbone(recipe)


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": run_demo_command,
    "upscale": run_upscale,
    "conditions": run_conditions,
    "evaluate": run_evaluate,
    "inspect": run_inspect,
    "import": run_import,
    "export": run_export,
}
