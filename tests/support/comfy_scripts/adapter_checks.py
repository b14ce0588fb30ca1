"""Loads adapters through the node in a ComfyUI process and notes their features: results.safetensors, report.json.

What comes out is judged by test_comfy_adapters.py, which computes the same with diffusers.
"""

import json
import sys
from functools import partial
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import torch  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job
inputs = load_file(job / "inputs.safetensors")
wanted = json.loads((job / "wanted.json").read_text())
results: dict[str, torch.Tensor] = {}
report: dict = {"errors": {}, "loaded": {}, "modules at import": comfy_process.loaded_modules(pack)}
report["new packages"] = comfy_process.new_packages

part = comfy_process.parts_of(pack)
error_of = partial(comfy_process.note_error, report["errors"])
load_base = partial(comfy_process.load_base, part)
description = part("nodes.native.description")
adapter_node = core.NODE_CLASS_MAPPINGS["ICMSR_LoadAdapter"]
apply_node = core.NODE_CLASS_MAPPINGS["ICMSR_ApplyGenerator"]
upscale_node = core.NODE_CLASS_MAPPINGS["ICMSR_Upscale"]


def features_of(control, hint: torch.Tensor) -> list[torch.Tensor]:
    """As core's samplers ask for them; the hint [1, C, H, W] has the size that the latent stands for."""
    control = control.copy().set_cond_hint(hint, 1.0)
    cells = [length // control.compression_ratio for length in hint.shape[-2:]]
    found = control.get_control(torch.zeros(1, 4, *cells), None, None, 1, {})["input"]
    return [level for level in reversed(found) if level is not None]


with torch.inference_mode():
    for name, entry in wanted["features"].items():
        control = adapter_node.execute(*entry["files"]).result[0]
        report["loaded"][name] = [type(control).__name__, control.compression_ratio]
        for number, level in enumerate(features_of(control, inputs[entry["hint"]])):
            results[f"{name}/{number}"] = level
    for name, files in wanted["refused"].items():
        error_of(name, adapter_node.execute, *files)
    for name, entry in wanted["wrong hints"].items():
        error_of(name, features_of, adapter_node.execute(*entry["files"]).result[0], inputs[entry["hint"]])

    # ICM-SR Upscale over a base of factor 4, and the adapters that do not belong to it.
    bare, bare_vae = load_base(job / "base of factor 4")
    model, vae = apply_node.execute(bare, bare_vae, "generator.safetensors").result
    settings = {"hint": inputs["hint"].movedim(1, -1), "tile": 128, "overlap": 32, "strength": 0.7}
    picture = inputs["picture"]
    for name, files in wanted["upscale"].items():
        control = adapter_node.execute(*files).result[0]
        results[name] = upscale_node.execute(model, vae, picture, control_net=control, **settings).result[0]
    for name, files in wanted["upscale refused"].items():
        control = adapter_node.execute(*files).result[0]
        error_of(name, upscale_node.execute, model, vae, picture, control_net=control, **settings)

    # Core's own nodes: Apply ControlNet and a sampler, on the bare base as a diffusion model.
    context = [[bare.get_attachment(description.ATTACHMENT).prompt_embedding[None], {}]]
    for name, files in {"no adapter": None, **wanted["sampled"]}.items():
        positive = context
        if files is not None:
            control = adapter_node.execute(*files).result[0]
            apply_control = core.NODE_CLASS_MAPPINGS["ControlNetApplyAdvanced"]().apply_controlnet
            positive, _ = apply_control(context, context, control, settings["hint"], 1.0, 0.0, 1.0)
        sampler = core.NODE_CLASS_MAPPINGS["KSampler"]()
        latent = {"samples": torch.zeros(1, 8, 16, 24)}
        sampled = sampler.sample(bare, 5, 2, 1.0, "euler", "normal", positive, context, latent)[0]["samples"]
        results[f"sampled {name}"] = sampled

    # What the teacher sees, of a batch that shares a hint; and of a checkpoint as core's loader leaves it.
    inspect_node = core.NODE_CLASS_MAPPINGS["ICMSR_InspectManifold"]
    control = adapter_node.execute(*wanted["sampled"]["adapter"]).result[0]
    pair = torch.cat([picture, picture.flip(1)])
    seen = {"timesteps": "100 900", "seed": 4, "control_net": control, "hint": settings["hint"]}
    results["seen"] = inspect_node.execute(bare, bare_vae, pair, **seen).result[0]
    results["seen alone"] = inspect_node.execute(bare, bare_vae, picture, **seen).result[0]
    report["seen large"] = list(inspect_node.execute(bare, bare_vae, torch.rand(1, 90, 1024, 3), "900").result[0].shape)
    plain, plain_vae = load_base(job / "base like sd15")
    plain.set_attachments(description.ATTACHMENT, None)
    velocity = ModelSamplingDiscrete().patch(plain, "v_prediction", False)[0]
    report["predictions"] = [description.describe(one).descriptor.prediction for one in (plain, velocity)]
    prompt = [[torch.zeros(1, 77, 768), {}]]
    for name, one in (("seen eps", plain), ("seen v", velocity)):
        results[name] = inspect_node.execute(one, plain_vae, picture, "900", conditioning=prompt).result[0]
    error_of("eps generator on v", apply_node.execute, velocity, plain_vae, "sd15.safetensors")
    applied = apply_node.execute(velocity, plain_vae, "sd15 v.safetensors").result
    results["v generator on v"] = upscale_node.execute(*applied, picture, tile=128, overlap=32).result[0]
    error_of("v generator on eps", apply_node.execute, plain, plain_vae, "sd15 v.safetensors")
    error_of("eps generator on eps", apply_node.execute, plain, plain_vae, "sd15.safetensors")
    error_of("no prompt", inspect_node.execute, plain, plain_vae, picture, "900")
    error_of("hint alone", inspect_node.execute, bare, bare_vae, picture, hint=settings["hint"])
    error_of(
        "another base's adapter",
        inspect_node.execute,
        plain,
        plain_vae,
        picture,
        "900",
        0,
        control,
        settings["hint"],
        conditioning=prompt,
    )

report["modules at the end"] = comfy_process.loaded_modules(pack)
report["modules"] = [name for name in ("diffusers", "peft", "accelerate") if name in sys.modules]
save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "report.json").write_text(json.dumps(report, indent=1))
