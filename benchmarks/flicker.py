"""How much a still scene with noise flickers when its frames are upscaled one by one: a table.

    python benchmarks/flicker.py --frames 8 --noise 5

Every frame is the bundled photograph with new Gaussian noise, in 8 bits. Flicker is the standard deviation over time of
each sample, as a root mean square over the picture, in levels of 255: of the input, of its bicubic enlargement and of
the embedded generator's results. "x bicubic" is the last over the second: above 1 the model adds flicker. Exit codes: 0
done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from _command_line import SCALE, add_threads_option, machine, markdown, run_benchmark
from _measurement import use_threads
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import demo_picture, embedded_generator

COLUMNS = ("frames", "flicker", "x input", "x bicubic")
FIDELITIES = (0.0, 1.0)


def noisy_frames(picture: Tensor, count: int, noise: float, seed: int = 0) -> Tensor:
    """[count, 3, H, W]: the picture [1, 3, H, W] in [0, 1] with noise of `noise` levels, rounded to 8 bits."""
    random = torch.Generator().manual_seed(seed)
    frames = picture + torch.randn(count, *picture.shape[1:], generator=random) * noise / 255
    return (frames.clamp(0, 1) * 255).round() / 255


def flicker(frames: Tensor) -> float:
    """Root mean square of the standard deviation over the frames [N, 3, H, W], in levels of 255."""
    return float(frames.double().var(dim=0).mean().sqrt() * 255)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8, help="number of frames, at least 2 (default 8)")
    parser.add_argument("--noise", type=float, default=5.0, help="standard deviation in levels of 255 (default 5)")
    parser.add_argument("--width", type=int, default=96, help="of the photograph's part, in pixels (default 96)")
    parser.add_argument("--height", type=int, default=64, help="of the photograph's part, in pixels (default 64)")
    add_threads_option(parser)
    options = parser.parse_args(arguments)
    if options.frames < 2:
        parser.error(f"--frames must be at least 2, got {options.frames}")
    if not 0 < options.noise <= 255:
        parser.error(f"--noise must be above 0 and at most 255, got {options.noise:g}")
    use_threads(options.threads)
    silence_diffusers()
    whole = to_tensor(read_picture(demo_picture()).rgb)
    top, left = (whole.shape[2] - options.height) // 2, (whole.shape[3] - options.width) // 2
    if min(top, left) < 0 or min(options.width, options.height) < 1:
        parser.error(f"--width and --height must be 1 to {whole.shape[3]} and 1 to {whole.shape[2]}")
    picture = whole[:, :, top : top + options.height, left : left + options.width]
    frames = noisy_frames(picture, options.frames, options.noise)
    enlarged = resize(frames, options.height * SCALE, options.width * SCALE).clamp(0, 1)
    measured = {"input": flicker(frames), "bicubic": flicker(enlarged)}
    try:
        for fidelity in FIDELITIES:
            backbone = load_backbone(Recipe(generator=embedded_generator(), fidelity=fidelity))
            results = torch.cat([upscale(backbone, frame) for frame in frames.split(1)])
            measured[f"nano, fidelity {fidelity:g}"] = flicker(results)
    except IcmsrError as error:
        print(f"flicker: {error}", file=sys.stderr)
        return 1
    print(machine(torch.device("cpu")))
    size = f"{options.width} x {options.height}"
    print(f"{options.frames} frames of {size}, noise {options.noise:g}/255, upscaled {SCALE} times\n")
    rows = [
        [name, f"{value:.2f}", f"{value / measured['input']:.2f}", f"{value / measured['bicubic']:.2f}"]
        for name, value in measured.items()
    ]
    print(markdown(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
