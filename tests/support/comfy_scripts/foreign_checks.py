"""Published weights of another method through the nodes, and core's text encoder: results.safetensors, report.json.

What comes out is judged by test_comfy_foreign.py, which computes the same with the command line.
"""

import json
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job
picture = load_file(job / "inputs.safetensors")["picture"]
results: dict[str, torch.Tensor] = {}
errors: dict = {}
nodes = core.NODE_CLASS_MAPPINGS
apply, upscale = nodes["ICMSR_ApplyGenerator"], nodes["ICMSR_Upscale"]

report: dict = {"listed": apply.define_schema().inputs[2].options}
for family in ("sd15", "sd21"):
    model, clip, vae = nodes["CheckpointLoaderSimple"]().load_checkpoint(f"{family}.safetensors")
    results[f"{family} text"] = nodes["CLIPTextEncode"]().encode(clip, "")[0][0][0][0].float()

small = {"authors_settings": False}
applied = apply.execute(model, vae, "HYPIR_sd2.pth", clip=clip)
report["said"] = applied.ui.as_dict()["text"][0]
results["picture"] = upscale.execute(*applied.result, picture, **small).result[0]
weaker = apply.execute(model, vae, "HYPIR_sd2.pth", clip=clip, coeff_t=100, save_converted=True).result
results["weaker"] = upscale.execute(*weaker, picture, **small).result[0]
converted = apply.execute(model, vae, "HYPIR_sd2.icmsr.safetensors", clip=clip).result
results["converted"] = upscale.execute(*converted, picture, **small).result[0]
promptless = apply.execute(model, vae, "HYPIR_sd2.pth").result
comfy_process.note_error(errors, "no prompt", upscale.execute, *promptless, picture, **small)
comfy_process.note_error(errors, "no clip", apply.execute, model, vae, "HYPIR_sd2.pth", prompt="a cat")
for name in ("evil.pkl", "evil.pth", "evil.pt", "evil.bin"):
    comfy_process.note_error(errors, name, apply.execute, model, vae, name)
comfy_process.note_error(errors, "timestep", apply.execute, model, vae, "HYPIR_sd2.pth", timestep=999)
comfy_process.note_error(errors, "lora", apply.execute, model, vae, "lora.safetensors")

save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "report.json").write_text(json.dumps({**report, "errors": errors}))
