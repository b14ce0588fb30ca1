"""What the ComfyUI node costs beside the library: ICMSR_Upscale against `upscale` on the same MODEL and VAE.

    python benchmarks/node_overhead.py --size 2048 --runs 5

Both run in one ComfyUI process on its CPU, in turns, nano in ComfyUI's own networks; the overhead is the median of the
pairs' ratios. ComfyUI is found as the tests find it: $COMFYUI_PATH, the folder that holds the pack, or
~/.cache/icm-sr/ComfyUI. Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _command_line import add_common_options, checked_settings, machine, markdown, number, run_benchmark

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"
"""What finds and starts a ComfyUI; read by path, because only tests import tests."""
COLUMNS = ("result", "node s", "library s", "overhead", "pairs from", "to")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pairs, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="side of the result in pixels, a multiple of 64")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which it is given up")
    add_common_options(parser, runs=5)
    options = parser.parse_args(arguments)
    if options.size < 64 or options.size % 64:
        parser.error(f"--size must be a multiple of 64, got {options.size}")
    checked_settings(parser, options, "cpu")
    try:
        found = run_in_comfyui(options)
    except (FileNotFoundError, subprocess.SubprocessError) as error:
        print(f"node_overhead: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    node, library = found["times"]["node"], found["times"]["library"]
    ratios = [one / other - 1 for one, other in zip(node, library)]
    print(machine(torch.device("cpu")))
    print(
        f"nano in ComfyUI, {found['threads']} threads, {len(ratios)} pairs, {options.clock} clock; largest difference "
        f"of the two results {found['difference']:.1e}\n"
    )
    seconds = (number(statistics.median(times)) for times in (node, library))
    shares = (statistics.median(ratios), min(ratios), max(ratios))
    size = f"{options.size} x {options.size}"
    print(markdown(COLUMNS, [[size, *seconds, *(f"{share:+.1%}" for share in shares)]]))
    return 0


def run_in_comfyui(options: argparse.Namespace) -> dict[str, Any]:
    """What `_nodes_in_comfyui.py` reports. Raises `FileNotFoundError` without a ComfyUI, and when its process fails."""
    harness = runpy.run_path(str(SUPPORT / "comfy_harness.py"))
    comfyui = harness["find_comfyui"]()
    if comfyui is None:
        raise FileNotFoundError("no ComfyUI: set COMFYUI_PATH, or clone it to ~/.cache/icm-sr/ComfyUI")
    python = harness["prepare_python"](comfyui)
    with tempfile.TemporaryDirectory() as job:
        pack = harness["make_base_directory"](Path(job))
        values = {
            "comfyui": comfyui,
            "pack": pack,
            "job": job,
            "starter": SUPPORT / "comfy_scripts" / "comfy_process.py",
            **{name: getattr(options, name) for name in ("size", "runs", "threads", "tile", "overlap", "clock")},
        }
        command = [str(python), str(ROOT / "benchmarks" / "_nodes_in_comfyui.py")]
        for name, value in values.items():
            command += [f"--{name}", str(value)]
        done = subprocess.run(
            command,
            cwd=comfyui,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=options.timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        raise subprocess.SubprocessError(f"ComfyUI's process ended with {done.returncode}: {' / '.join(lines[-3:])}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
