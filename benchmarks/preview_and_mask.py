"""What a preview costs, and what a mask saves and changes, with the embedded model.

    python benchmarks/preview_and_mask.py --picture PHOTO
    python benchmarks/preview_and_mask.py --picture PHOTO --sizes 1024 2048 --vae exact bounded --clock cpu --threads 1

The photograph is resized to a quarter of each size (pixels, square) and upscaled four times. The mask is a square of
`--area` of the picture in its middle. Times are those of one run. "tiles" are the UNet's; "VAE" is the area over which
the VAE runs and "UNet" the area of the tiles, each over those of the run without a mask, the fields that bounded mode
takes its statistics from included. "difference" is the largest inside the mask to the run without one, of 255, and
"mean" the mean one. "preview" is the share of the run without a mask that painting and sending takes, the encoding as
JPEG included, which ComfyUI does in another thread.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from _command_line import SCALE, add_clock_options, machine, markdown, run_benchmark
from _measurement import Stopwatch, use_threads
from PIL import Image
from torch import Tensor

from icmsr_core.pictures.files import read_picture, to_tensor
from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.tiled_vae.estimate import drawn_windows
from icmsr_core.upscale.masking import MaskPlan, plan_mask
from icmsr_core.upscale.one_step import run_plan
from icmsr_core.upscale.plan import UpscalePlan, plan_upscale
from icmsr_core.upscale.preview import Preview
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.upscale.tiling import TilePlan
from icmsr_core.weights.embedded import demo_picture, embedded_generator

COLUMNS = ("px", "VAE mode", "tiles", "of", "UNet", "VAE", "s", "without, s", "ratio", "difference", "mean", "preview")


def cells_of(tiles: TilePlan) -> int:
    """Cells of all tiles together."""
    sizes = ((box.rows.stop - box.rows.start, box.columns.stop - box.columns.start) for box in tiles.boxes)
    return sum(height * width for height, width in sizes)


def unet_share(plan: UpscalePlan, mask: MaskPlan) -> float:
    """Area of the tiles that run under `mask` over that of all tiles."""
    run = sum(map(cells_of, mask.region_tiles)) if mask.regions else cells_of(mask.tiles)
    return run / cells_of(plan.tiles)


def vae_share(plan: UpscalePlan, mask: MaskPlan, factor: int) -> float:
    """Area over which the VAE runs under `mask` over that without it."""
    if not mask.regions:
        return 1.0
    number, window = drawn_windows(plan.tiles.height, plan.tiles.width, factor)
    fields, whole = number * window, plan.tiles.height * plan.tiles.width
    return (fields + sum(region.height * region.width for region in mask.regions)) / (fields + whole)


def encoded(pixels: Tensor) -> None:
    """What ComfyUI does with a preview."""
    Image.fromarray(pixels.numpy()).save(io.BytesIO(), "JPEG", quality=95)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, default=demo_picture(), help="a photograph (default: the demo's)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="sides of the results in pixels")
    parser.add_argument("--area", type=float, default=0.1, help="share of the picture that the mask covers")
    parser.add_argument("--vae", nargs="+", default=["exact", "bounded"], help="VAE modes")
    add_clock_options(parser)
    options = parser.parse_args()
    use_threads(options.threads)
    silence_diffusers()
    backbone = load_backbone(Recipe(generator=embedded_generator()))
    photograph = to_tensor(read_picture(options.picture).rgb)
    rows: list[list[str]] = []
    watch = Stopwatch(torch.device("cpu"), options.clock)
    run_plan(backbone, photograph[..., :64, :64], plan_upscale(backbone.descriptor, 64, 64, UpscaleSettings()))
    for size in options.sizes:
        side = size // SCALE
        image = resize(photograph, side, side)
        inner = round(side * options.area**0.5)
        first = (side - inner) // 2
        mask = torch.zeros(1, 1, side, side)
        mask[:, :, first : first + inner, first : first + inner] = 1
        inside = slice(first * SCALE, (first + inner) * SCALE)
        for vae in options.vae:
            plan = plan_upscale(backbone.descriptor, side, side, UpscaleSettings(vae=vae))
            masked = plan_mask(backbone.descriptor, plan, mask)
            if masked is None:
                parser.error(f"a mask of {options.area} leaves nothing out at {size} px")
            preview = Preview(encoded, watch.now)
            started = watch.now()
            whole = run_plan(backbone, image, plan, preview=preview)
            without = watch.now() - started
            started = watch.now()
            part = run_plan(backbone, image, plan, mask=mask)
            seconds = watch.now() - started
            difference = 255 * (part - whole)[:, :, inside, inside].abs()
            shares = unet_share(plan, masked), vae_share(plan, masked, backbone.descriptor.latent_factor)
            rows.append(
                [
                    *(str(size), vae, str(masked.tile_count), str(len(plan.tiles))),
                    *(f"{share:.3f}" for share in shares),
                    *(f"{seconds:.1f}", f"{without:.1f}", f"{seconds / without:.3f}"),
                    *(f"{float(difference.max()):.2f}", f"{float(difference.mean()):.3f}"),
                    f"{preview.spent / without:.2%}",
                ]
            )
            print(markdown(COLUMNS, rows[-1:]), flush=True)
    print(machine(torch.device("cpu")))
    print(markdown(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
