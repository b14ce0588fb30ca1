"""What the control between a generator's two sets of weights does: measures over `--fidelity`, as a table and a curve.

    python benchmarks/fidelity.py --pairs realsr --every 4 --plot docs/images/fidelity.png
    python benchmarks/fidelity.py --pairs FOLDER --generator FILE --base BASE --fidelities 0 0.5 1

FOLDER holds lr/ and hr/ of the same names. 0 is the faithful set of weights alone, 1 the realistic one laid over it,
beyond 1 is more of it. The plot needs the extra `train`, FSIM, DSS and SR-SIM the extra `eval`. Exit codes: 0 done,
1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from _command_line import add_threads_option, machine, markdown, run_benchmark
from _measurement import use_threads

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import silence_diffusers
from icmsr_core.train.experiments.ablation_pictures import measure_pictures, pairs_of
from icmsr_core.weights.embedded import embedded_base, embedded_generator
from icmsr_core.weights.fidelity import check_fidelity, check_fidelity_applies
from icmsr_core.weights.generator_file import holds_two_sets

METRICS = {
    "psnr": "PSNR-Y",
    "ssim": "SSIM-Y",
    "fsim": "FSIM",
    "dss": "DSS",
    "srsim": "SR-SIM",
    "hf": "high-frequency ratio",
}
CURVES = ("dss", "hf")
"""Drawn against PSNR-Y."""
SET = "pairs"


def row_of(name: str, values: Mapping[str, float]) -> list[str]:
    """A line of the table."""
    return [name, *(f"{values[entry]:.2f}" if entry in ("psnr", "hf") else f"{values[entry]:.4f}" for entry in METRICS)]


def mean_of(values: Iterable[float | None]) -> float:
    """The mean over the pictures for which a measure is defined; NaN when there are none."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else math.nan


def draw(path: Path, points: Mapping[float, Mapping[str, float]], bicubic: Mapping[str, float]) -> None:
    """One panel for each of `CURVES`: the measure over PSNR-Y along the control, and bicubic as a point."""
    from matplotlib.figure import Figure

    from icmsr_core.train.run.plots import write_figure

    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVES)), CURVES):
        across, up = ([values[entry] for values in points.values()] for entry in ("psnr", name))
        axes.plot(across, up, "-o", color="tab:blue", markersize=4, label="fidelity")
        for fidelity, x, y in zip(points, across, up):
            axes.annotate(f"{fidelity:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)
        axes.plot(bicubic["psnr"], bicubic[name], "s", color="tab:gray", markersize=5, label="bicubic")
        axes.set_xlabel("PSNR-Y, dB")
        axes.set_ylabel(METRICS[name])
        axes.grid(alpha=0.3)
        axes.margins(0.12)
        axes.legend(frameon=False)
    write_figure(figure, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is loaded. Wrong usage leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, metavar="FOLDER", help="with lr/ and hr/")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every how many of the pairs (default 1)")
    parser.add_argument("--fidelities", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1, 1.5, 2], metavar="F")
    parser.add_argument("--generator", type=Path, default=embedded_generator(), metavar="FILE")
    parser.add_argument("--base", type=Path, default=embedded_base(), metavar="FOLDER", help="the generator's base")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve into this PNG")
    add_threads_option(parser)
    options = parser.parse_args(arguments)
    if options.every < 1 or options.threads < 0:
        parser.error("--every must be at least 1, --threads at least 0")
    try:
        for fidelity in options.fidelities:
            check_fidelity(fidelity)
        check_fidelity_applies(str(options.generator), holds_two_sets(options.generator), options.fidelities[0])
        options.sets = {SET: pairs_of(options.pairs, options.every)}
    except IcmsrError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every fidelity, prints the table and returns the exit code."""
    options = parse(arguments)
    use_threads(options.threads)
    silence_diffusers()

    def means(generator: Path | None, fidelity: float | None) -> dict[str, float]:
        print("bicubic" if generator is None else f"fidelity {fidelity:g}", file=sys.stderr, flush=True)
        rows = measure_pictures(options.base, generator, options.sets, list(METRICS), SET, None, fidelity)[SET].values()
        return {name: mean_of(row[name] for row in rows) for name in METRICS}

    try:
        bicubic = means(None, None)
        points = {fidelity: means(options.generator, fidelity) for fidelity in sorted(set(options.fidelities))}
        if options.plot is not None:
            draw(options.plot, points, bicubic)
    except IcmsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [row_of("bicubic", bicubic), *(row_of(f"{fidelity:g}", values) for fidelity, values in points.items())]
    print(f"{machine(torch.device('cpu'))}; means of {len(options.sets[SET])} pairs\n")
    print(markdown(["fidelity", *METRICS.values()], rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
