"""One step on Stable Diffusion 2.1's shapes and on nano, against OSEDiff's procedure: time, work, memory.

    python benchmarks/inference.py --sizes 512 2048 --dtypes fp32 bf16
    python benchmarks/inference.py --device cuda --dtypes bf16 fp16 --sizes 512 1024 2048 4096 8192 --runs 10
    python benchmarks/inference.py --models sd21 --dtypes fp32 bf16 --tiny     with the preview mode
    python benchmarks/inference.py --width 0.25 --sizes 256 --runs 1           a quick look

sd21 has random weights of SD2.1's shapes (nothing is downloaded; the time does not depend on the values), nano its own.
Each line is measured in a process of its own: warm-up runs, in the first of which the operations are counted, then the
runs whose medians are shown. "peak" is the most memory of the process during those runs, weights included; on CUDA what
torch allocated. "matmul" is the share of the rate that a large matrix product reached in the same process. The
reference is a stand-in (`_sd_networks.Reference`): unfused LoRA, a text encoder for every picture, a sampled posterior,
OSEDiff's tiles. Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _command_line import SCALE, add_common_options, checked_settings, machine, markdown, number, run_benchmark
from _measurement import DTYPES, STAGES, Measurement, Stopwatch, measure, measure_all, use_threads
from torch import Tensor

from icmsr_core.backbone.protocol import Backbone
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import VAE_MODES, UpscaleSettings

LIMITS = (64, 16384)
MODELS = ("sd21", "nano")
OURS, TINY, REFERENCE = "ICM-SR", "ICM-SR with a tiny VAE", "reference"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    """sd21 or nano."""
    procedure: str
    """`OURS`, `TINY` or `REFERENCE`."""
    dtype: str
    """A key of `DTYPES`."""
    size: int
    """Side of the result in pixels."""
    device: str
    """The device's name."""
    width: float
    """Share of SD2.1's widths."""
    runs: int
    """Runs whose time counts."""
    warmup: int
    """Runs before them."""
    threads: int
    """Torch's threads on the CPU; 0 for its own choice."""
    clock: str
    """One of `CLOCKS`."""
    settings: UpscaleSettings
    """Tiles and VAE mode of our procedure."""


def measure_case(case: Case) -> Measurement:
    """Loads the networks of `case` and measures it; for a process of its own."""
    use_threads(case.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    image = torch.rand(1, 3, case.size // SCALE, case.size // SCALE, device=device)
    if case.procedure == REFERENCE:
        from _sd_networks import Reference

        reference = Reference(case.width, device, dtype)
        return _measure(case, lambda: reference.upscale(image, case.size), reference.unet, reference.notes)
    backbone, unet = load_ours(case, device, dtype)
    return _measure(case, lambda: upscale(backbone, image, case.settings), unet)


def _measure(
    case: Case, procedure: Callable[[], Tensor], unet: torch.nn.Module, notes: Sequence[str] = ()
) -> Measurement:
    return measure(
        procedure,
        unet,
        Stopwatch(torch.device(case.device), case.clock),
        DTYPES[case.dtype],
        runs=case.runs,
        warmup=case.warmup,
        notes=notes,
    )


def load_ours(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Backbone, torch.nn.Module]:
    """The backbone of `case` and its UNet."""
    from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
    from icmsr_core.runtime.precision import use_full_float32
    from icmsr_core.runtime.recipe import Recipe
    from icmsr_core.weights.embedded import embedded_generator

    silence_diffusers()
    use_full_float32()
    if case.model == "nano":
        backbone = load_backbone(Recipe(generator=embedded_generator(), device=case.device, dtype=case.dtype))
    else:
        from _sd_networks import our_backbone

        backbone = our_backbone(case.width, device, dtype, tiny=case.procedure == TINY)
    return backbone, backbone.unet


def rows_of(results: dict[Case, Measurement | str]) -> list[list[str]]:
    """The table's lines; a text in the place of a measurement says why there is none."""
    rows = []
    for case, found in results.items():
        name = case.model if case.width == 1 or case.model == "nano" else f"{case.model} x {case.width:g}"
        head = [f"{name}, {case.procedure}, {case.dtype}", str(case.size)]
        if isinstance(found, str):
            rows.append([*head, *["-"] * 5, found, *["-"] * 4])
            continue
        same = _reference(results, case, case.dtype)
        first = _reference(results, case, "fp32")
        rows.append(
            [
                *head,
                *(number(seconds) for seconds in found.seconds),
                number(found.total),
                number(sum(found.operations) / 1e12),
                f"{found.peak_share:.0%}",
                number(found.peak_bytes / 1e9),
                *(number(other.total / found.total) if other else "-" for other in (same, first)),
                number(found.peak_bytes / same.peak_bytes) if same else "-",
            ]
        )
    return rows


def _reference(results: dict[Case, Measurement | str], case: Case, dtype: str) -> Measurement | None:
    for other, found in results.items():
        alike = (other.model, other.size, other.procedure, other.dtype) == (case.model, case.size, REFERENCE, dtype)
        if alike and isinstance(found, Measurement) and case.procedure != REFERENCE:
            return found
    return None


COLUMNS = (
    "model, procedure, precision",
    "px",
    *(f"{stage} s" for stage in STAGES),
    "total s",
    "TFLOP",
    "matmul",
    "peak GB",
    "x faster, same precision",
    "x faster than fp32",
    "memory / reference",
)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """What the command line asks for, checked before anything is loaded. Wrong usage leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[512],
        metavar="PX",
        help=f"sides of the square result, multiples of 64, {LIMITS[0]} to {LIMITS[1]} (default 512)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto, ... (default cpu)")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--width", type=float, default=1.0, help="share of SD2.1's widths, for a quick look")
    parser.add_argument("--warmup", type=int, default=1, help="runs before those that count (default 1)")
    parser.add_argument("--vae", choices=VAE_MODES, default=UpscaleSettings.vae, help="our VAE mode")
    add_common_options(parser, runs=3)
    parser.add_argument("--no-reference", action="store_true", help="measure our procedure alone")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="also measure sd21 with a tiny VAE (AutoencoderTiny of TAESD's size at any width)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run's values")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        if size % 64 or not LIMITS[0] <= size <= LIMITS[1]:
            parser.error(f"--sizes must be multiples of 64 from {LIMITS[0]} to {LIMITS[1]}, got {size}")
    if options.warmup < 0:
        parser.error(f"--warmup must be at least 0, got {options.warmup}")
    if not 0 < options.width <= 1:
        parser.error(f"--width must be above 0 and at most 1, got {options.width:g}")
    settings, device = checked_settings(parser, options, options.device, options.vae)
    counts = options.runs, options.warmup, options.threads, options.clock
    cases = [
        Case(model, procedure, dtype, size, device, options.width, *counts, settings)
        for model in options.models
        for size in options.sizes
        for dtype in options.dtypes
        for procedure in (REFERENCE, OURS, TINY)
        if procedure == OURS or (model == "sd21" and (options.tiny if procedure == TINY else not options.no_reference))
    ]
    return options, cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every line, prints the table and returns the exit code."""
    options, cases = parse(arguments)
    results = measure_all(
        cases, measure_case, lambda case: f"{case.model}, {case.procedure}, {case.dtype}, {case.size} px"
    )
    measured = [found for found in results.values() if isinstance(found, Measurement)]
    if options.json is not None:
        options.json.write_text(
            json.dumps(
                [
                    {
                        "model": case.model,
                        "procedure": case.procedure,
                        "dtype": case.dtype,
                        "size": case.size,
                        "width": case.width,
                        **(found._asdict() if isinstance(found, Measurement) else {"failed": found}),
                    }
                    for case, found in results.items()
                ],
                indent=1,
            )
            + "\n",
            encoding="utf-8",
        )
    print(f"{machine(torch.device(cases[0].device))}")
    if measured:
        matmul = ", ".join(f"{dtype} {number(rate / 1e12)}" for dtype, rate in rates(results).items())
        print(
            f"medians of {options.runs} runs after {options.warmup}, {options.clock} clock; {measured[0].threads} "
            f"threads; matmul {matmul} TFLOP/s"
        )
    for note in sorted({note for found in measured for note in found.notes}):
        print(note)
    print(f"\n{markdown(COLUMNS, rows_of(results))}")
    return 0 if len(measured) == len(cases) else 1


def rates(results: dict[Case, Measurement | str]) -> dict[str, float]:
    """The best matmul rate seen in each precision."""
    best: dict[str, float] = {}
    for case, found in results.items():
        if isinstance(found, Measurement):
            best[case.dtype] = max(best.get(case.dtype, 0.0), found.matmul_rate)
    return best


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
