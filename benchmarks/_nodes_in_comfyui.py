"""Times ICMSR_Upscale and the library in turns, in the ComfyUI process of `node_overhead.py`; JSON on the last line."""

import argparse
import json
import runpy
from pathlib import Path

import torch
from einops import rearrange

SCALE = 4


def main() -> None:
    """Loads nano through its node, then runs pairs on one MODEL and one VAE."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("comfyui", "pack", "job", "starter"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("size", "runs", "threads", "tile", "overlap"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--clock", required=True)
    options = parser.parse_args()
    starter = runpy.run_path(str(options.starter))
    core, pack = starter["start"](options)
    part = starter["parts_of"](pack)

    from _measurement import Stopwatch, use_threads

    use_threads(options.threads)
    one_step = part("icmsr_core.upscale.one_step")
    settings_module = part("icmsr_core.upscale.settings")
    backbones = part("nodes.native.backbone")
    model, vae = core.NODE_CLASS_MAPPINGS["ICMSR_LoadEmbedded"].execute().result
    node = core.NODE_CLASS_MAPPINGS["ICMSR_Upscale"]
    tiles = {"tile": options.tile, "overlap": options.overlap}
    settings = settings_module.UpscaleSettings(scale=SCALE, **tiles)
    image = torch.rand(1, options.size // SCALE, options.size // SCALE, 3, generator=torch.Generator().manual_seed(0))

    def by_node() -> torch.Tensor:
        return node.execute(model, vae, image, scale=float(SCALE), **tiles).result[0]

    def by_library() -> torch.Tensor:
        with backbones.ComfyBackbone(model, vae) as backbone:
            pictures = one_step.upscale(backbone, rearrange(image, "n h w c -> n c h w"), settings)
        return rearrange(pictures, "n c h w -> n h w c")

    watch = Stopwatch(torch.device("cpu"), options.clock)
    times: dict[str, list[float]] = {"node": [], "library": []}
    with torch.inference_mode():
        difference = float((by_node() - by_library()).abs().max())  # warms both up
        for number in range(options.runs):
            pair = [("node", by_node), ("library", by_library)]
            for name, run in pair if number % 2 else reversed(pair):
                started = watch.now()
                run()
                times[name].append(watch.now() - started)
    print(json.dumps({"times": times, "difference": difference, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
