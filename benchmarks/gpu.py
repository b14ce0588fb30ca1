"""One step on an accelerator: the tests that need one, then times and memory, ready to paste into an issue.

    uv run --extra test python benchmarks/gpu.py                     CUDA, ROCm, XPU or MPS, whichever torch finds
    uv run python benchmarks/gpu.py --device cpu --width 0.05 --sizes 64 128 --no-tests        a rehearsal

sd21 has random weights of Stable Diffusion 2.1's shapes (nothing is downloaded; the time does not depend on the
values): 4.44 TFLOP for 512 px. nano is the embedded model. Each line is measured in a process of its own. "rate" is
what the networks reach, "matmul" its share of the rate of a large matrix product in the same process; "against the
first" is the time for a pixel against that of the smallest size. Exit codes: 0 done, 1 something failed (said in one
line), 2 wrong usage, 3 no accelerator.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _command_line import machine, markdown, number, run_benchmark
from _measurement import DTYPES, Measurement, Stopwatch, measure_all
from inference import OURS, Case, load_ours, measure_case

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.device import pick_device
from icmsr_core.upscale.settings import UpscaleSettings

ROOT = Path(__file__).resolve().parent.parent
STEP_TFLOP = 4.44
"""Of one step of Stable Diffusion 2.1 at 512 px: 2 for each multiply-add, attention counted."""
BATCHES = (1, 2, 4, 8)
"""Tiles that the UNet takes together."""
SD_SIZES = (512, 1024)
"""Sizes that Stable Diffusion's shape is measured at; larger ones take minutes on small cards."""
COLUMNS = (
    "model, precision",
    "px",
    "encode s",
    "unet s",
    "decode s",
    "total s",
    "TFLOP",
    "rate, TFLOP/s",
    "matmul",
    "peak GB",
    "against the first",
)
NO_ACCELERATOR = (
    "gpu: no accelerator: torch finds no CUDA, ROCm, XPU or MPS device here (torch {version}): install the torch build "
    "for your card, or rehearse with --device cpu --width 0.05 --sizes 64 128 --no-tests"
)


def rows_of(results: dict[Case, Measurement | str]) -> list[list[str]]:
    """The lines of the table of steps; a text in the place of a measurement says why there is none."""
    rows: list[list[str]] = []
    first: dict[tuple[str, str], float] = {}
    for case, found in results.items():
        kind = (case.model, case.dtype)
        name = f"{label(case)}, {case.dtype}"
        if isinstance(found, str):
            rows.append([name, str(case.size), *["-"] * 4, found, *["-"] * 4])
            continue
        per_pixel = found.total / case.size**2
        base = first.setdefault(kind, per_pixel)
        rows.append(
            [
                name,
                str(case.size),
                *(number(seconds) for seconds in found.seconds),
                number(found.total),
                number(sum(found.operations) / 1e12),
                number(sum(found.operations) / found.total / 1e12),
                f"{found.peak_share:.0%}",
                number(found.peak_bytes / 1e9),
                number(per_pixel / base),
            ]
        )
    return rows


def label(case: Case) -> str:
    """The model of `case`, with the share of Stable Diffusion's widths where it is less than 1."""
    return case.model if case.width == 1 or case.model == "nano" else f"{case.model} x {case.width:g}"


def measure_batches(case: Case) -> list[float]:
    """Seconds of the UNet for each number of tiles in `BATCHES`; for a process of its own."""
    device = torch.device(case.device)
    backbone, _ = load_ours(case, device, DTYPES[case.dtype])
    about, watch = backbone.descriptor, Stopwatch(device)
    side = min(case.settings.tile, case.size) // about.latent_factor
    seconds = []
    with torch.inference_mode():
        for batch in BATCHES:
            latent = torch.randn(batch, about.latent_channels, side, side, device=device)
            times = []
            for _ in range(case.warmup + case.runs):
                started = watch.now()
                backbone.predict_noise(latent, about.timestep)
                times.append(watch.now() - started)
            seconds.append(statistics.median(times[case.warmup :]))
    return seconds


def batch_rows(results: dict[Case, list[float] | str]) -> list[list[str]]:
    """The lines of the table of batches."""
    rows = []
    for case, found in results.items():
        name = f"{label(case)}, {case.dtype}"
        if isinstance(found, str):
            rows.append([name, found, *["-"] * (2 * len(BATCHES) - 1)])
            continue
        single = [seconds / batch for seconds, batch in zip(found, BATCHES)]
        rows.append([name, *(f"{1000 * one:.1f}" for one in single), *(number(single[0] / one) for one in single[1:])])
    return rows


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """The options and the device's name; "" without an accelerator. Wrong usage leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, xpu, mps, cpu, ... (default: the accelerator)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096], metavar="PX")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp16", "fp32"])
    parser.add_argument("--width", type=float, default=1.0, help="share of Stable Diffusion's widths (default 1)")
    parser.add_argument("--runs", type=int, default=3, help="runs whose median counts (default 3)")
    parser.add_argument("--no-tests", action="store_true", help="measure only, without `pytest -m gpu`")
    options = parser.parse_args(arguments)
    if any(size % 64 or not 64 <= size <= 16384 for size in options.sizes):
        parser.error(f"--sizes must be multiples of 64 from 64 to 16384, got {options.sizes}")
    if not 0 < options.width <= 1 or options.runs < 1:
        parser.error(
            f"--width must be above 0 and at most 1, --runs at least 1, got {options.width:g} and {options.runs}"
        )
    try:
        device = pick_device(options.device)
    except IcmsrError as error:
        parser.error(str(error))
    return options, "" if options.device == "auto" and device.type == "cpu" else str(device)


def cases_of(options: argparse.Namespace, device: str) -> list[Case]:
    """The lines of the table of steps; a size above `SD_SIZES` is for nano alone."""
    sizes = {"sd21": [size for size in options.sizes if size <= max(SD_SIZES)], "nano": options.sizes}
    return [
        Case(model, OURS, dtype, size, device, options.width, options.runs, 2, 0, "wall", UpscaleSettings())
        for model in ("sd21", "nano")
        for dtype in options.dtypes
        if (model, dtype) != ("nano", "fp16")  # it overflows, and float32 would be measured
        for size in sorted(sizes[model])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests and every measurement, prints the tables and returns the exit code."""
    options, device = parse(arguments)
    if not device:
        print(NO_ACCELERATOR.format(version=torch.__version__), file=sys.stderr)
        return 3
    code = 0
    if not options.no_tests:
        file = ROOT / "tests" / "devices" / "test_gpu.py"
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s", str(file)]
        environment = {**os.environ, "ICMSR_GPU_TESTS_ON": device}
        code = min(1, subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode)
    cases = cases_of(options, device)
    steps = measure_all(cases, measure_case, lambda case: f"{label(case)}, {case.dtype}, {case.size} px")
    smallest = [case for case in cases if case.size == min(other.size for other in cases)]
    batches = measure_all(smallest, measure_batches, lambda case: f"{label(case)}, {case.dtype}, batches")
    print(f"{machine(torch.device(device))}; medians of {options.runs} runs\n")
    print(markdown(COLUMNS, rows_of(steps)))
    print(f"\nA step of sd21 at 512 px and full width is {STEP_TFLOP} TFLOP. The UNet, tiles together:\n")
    heads = [*(f"ms a tile, {batch}" for batch in BATCHES), *(f"x faster, {batch}" for batch in BATCHES[1:])]
    print(markdown(["model, precision", *heads], batch_rows(batches)))
    failed = any(isinstance(found, str) for found in [*steps.values(), *batches.values()])
    return 1 if failed else code


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
