"""Runs core's TAESD under ICMSR_Upscale in a ComfyUI process: results.safetensors and errors.json."""

import json
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job
part = comfy_process.parts_of(pack)
apply_node, upscale_node = (core.NODE_CLASS_MAPPINGS[f"ICMSR_{name}"] for name in ("ApplyGenerator", "Upscale"))
inputs = load_file(job / "inputs.safetensors")
results: dict[str, torch.Tensor] = {}
errors: dict[str, str | None] = {}

(tiny,) = core.VAELoader().load_vae("taesd")
base = comfy_process.load_base(part, job / "base")
with torch.inference_mode():
    model, same = apply_node.execute(base[0], tiny, "plain.safetensors").result
    assert same is tiny
    for name, tile in (("untiled", 0), ("tiled", 64)):
        results[name] = upscale_node.execute(
            model, tiny, inputs["picture"], tile=tile, overlap=16, color_fix="none"
        ).result[0]
    # One that changes the VAE's encoder, with a VAE that has none of its layers.
    comfy_process.note_error(errors, "apply", apply_node.execute, base[0], tiny, "changing.safetensors")
    changing, _ = apply_node.execute(*base, "changing.safetensors").result
    comfy_process.note_error(errors, "upscale", upscale_node.execute, changing, tiny, inputs["picture"])

save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "errors.json").write_text(json.dumps(errors))
