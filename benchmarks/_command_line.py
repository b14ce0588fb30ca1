"""What the benchmarks share on their command line and in their tables."""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _measurement import CLOCKS

from icmsr_core.console import escape_unprintable
from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.device import pick_device
from icmsr_core.upscale.settings import UpscaleSettings

SCALE = 4
"""The result's size over the input's: what the models are made for."""


def run_benchmark(main: Callable[[], int]) -> int:
    """Runs the main function of a benchmark and returns its exit code; no character of its output stops it."""
    escape_unprintable()
    return main()


def add_common_options(parser: argparse.ArgumentParser, runs: int) -> None:
    """``--runs``, ``--threads``, ``--clock``, and the tiles of our procedure."""
    parser.add_argument("--runs", type=int, default=runs, help=f"runs whose median counts (default {runs})")
    add_clock_options(parser)
    parser.add_argument("--tile", type=int, default=UpscaleSettings.tile, help="our tile in pixels of the result")
    parser.add_argument("--overlap", type=int, default=UpscaleSettings.overlap, help="overlap of our tiles")


def add_clock_options(parser: argparse.ArgumentParser) -> None:
    """``--threads`` and ``--clock``."""
    add_threads_option(parser)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time over the threads, for a machine that does other work (CPU only)",
    )


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """``--threads``, for `use_threads`."""
    parser.add_argument("--threads", type=int, default=0, help="torch's threads on the CPU (default: its own choice)")


def checked_settings(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: str, vae: str = UpscaleSettings.vae
) -> tuple[UpscaleSettings, str]:
    """Settings and the device's name, from `add_common_options`, a device and a VAE mode.

    Leaves with code 2 if they are wrong.
    """
    if options.runs < 1 or options.threads < 0:
        parser.error("--runs must be at least 1, --threads at least 0")
    try:
        settings = UpscaleSettings(scale=SCALE, tile=options.tile, overlap=options.overlap, vae=vae)
        name = str(pick_device(device))
    except IcmsrError as error:
        parser.error(str(error))
    if options.clock == "cpu" and name != "cpu":
        parser.error(f"--clock cpu times the processor, got --device {name}: leave it out")
    return settings, name


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def machine(device: torch.device) -> str:
    """The device and the versions, for the line above a table."""
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
    else:
        name = f"{_cpu_name()}, {os.cpu_count()} cores{', MPS' if device.type == 'mps' else ''}"
    versions = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}; {versions}; {time.strftime('%Y-%m-%d')}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant ones, without an exponent; a dash for NaN."""
    if value != value:
        return "-"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"
