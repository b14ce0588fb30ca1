"""What a base's autoencoder makes of pictures and of plain colours: the bound of everything that runs in its latent.

    python benchmarks/autoencoder.py --pictures FOLDER nano runs/nano_base/prior/base

Pictures are encoded and decoded as they are (the mode of the posterior, sides cropped to a multiple of 16), and
measured against themselves. Plain colours are squares of 128 pixels, of which the mean is shown.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _command_line import machine, markdown, number, run_benchmark

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.metrics import dss, high_frequency_ratio, psnr_y
from icmsr_core.pictures.files import find_pictures, from_tensor, read_picture, to_tensor
from icmsr_core.pictures.ranges import signed_to_unit, unit_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks, silence_diffusers
from icmsr_core.runtime.latents import posterior_mode
from icmsr_core.weights.base import open_base
from icmsr_core.weights.embedded import embedded_base

PLAIN = {"red": (0.8, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.1, 0.9)}
COLUMNS = (
    "base",
    "pictures",
    "PSNR, RGB",
    "worst",
    "PSNR-Y",
    "DSS",
    "high-frequency ratio",
    *(f"{name} {colour}" for name, colour in PLAIN.items()),
)
MULTIPLE = 16


@torch.inference_mode()
def row(name: str, paths: Sequence[Path]) -> list[str]:
    """The line of the base called `name`. Raises `IcmsrError` where it cannot be read."""
    vae = build_networks(open_base(embedded_base() if name == "nano" else Path(name)))[1].eval()

    def again(image: torch.Tensor) -> torch.Tensor:
        latent = posterior_mode(vae, unit_to_signed(image))
        return signed_to_unit(vae.decode(latent).sample).clamp(0, 1)

    found = []
    for path in paths:
        image = to_tensor(read_picture(path).rgb)
        image = image[:, :, : image.shape[2] // MULTIPLE * MULTIPLE, : image.shape[3] // MULTIPLE * MULTIPLE]
        result, truth = from_tensor(again(image)), from_tensor(image)
        rgb = -10 * math.log10(float(((result - truth) ** 2).mean()))
        found.append((rgb, psnr_y(result, truth), dss(result, truth), high_frequency_ratio(result, truth)))
    colours = [
        again(torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 128, 128)).mean((0, 2, 3)).tolist()
        for colour in PLAIN.values()
    ]
    rgb, *others = np.mean(found, axis=0).tolist()
    return [
        name,
        str(len(found)),
        number(rgb),
        number(min(entry[0] for entry in found)),
        *map(number, others),
        *("(" + ", ".join(f"{value:.2f}" for value in colour) + ")" for colour in colours),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", metavar="BASE", help="base folders, or nano for the embedded one")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures")
    options = parser.parse_args(arguments)
    silence_diffusers()
    try:
        paths = find_pictures(options.pictures)
        rows = [row(name, paths) for name in options.bases]
    except IcmsrError as error:
        print(f"autoencoder: {error}", file=sys.stderr)
        return 1
    print(f"{machine(torch.device('cpu'))}\n\n{markdown(COLUMNS, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
