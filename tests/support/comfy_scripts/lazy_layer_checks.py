"""Loads bases with core's dynamic loading switched on: results.safetensors and report.json.

What comes out is judged by test_comfy_lazy_layers.py.
"""

import json
from functools import partial
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import comfy.memory_management  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job
report: dict = {"errors": {}, "lazy layers": {}, "loaded": []}
results: dict[str, torch.Tensor] = {}
load = partial(comfy_process.load_base, comfy_process.parts_of(pack))
latent = load_file(job / "inputs.safetensors")["latent"]
load_model_weights = comfy.model_base.BaseModel.load_model_weights
case = ""


def noted(model, *arguments, **settings):
    """Notes that weights are loaded, and how many layers have none before that."""
    linear = [module for module in model.diffusion_model.modules() if isinstance(module, torch.nn.Linear)]
    report["lazy layers"][case] = [sum(layer.weight is None for layer in linear), len(linear)]
    report["loaded"].append(case)
    return load_model_weights(model, *arguments, **settings)


comfy.model_base.BaseModel.load_model_weights = noted
with torch.inference_mode():
    for case, lazy in (("ordinary", False), ("lazy", True)):
        comfy.memory_management.aimdo_enabled = lazy  # as main.py does where DynamicVRAM is supported
        model, _ = load(job / "base")
        comfy.model_management.load_models_gpu([model])
        context = model.get_attachment("icmsr").prompt_embedding[None]
        results[case] = model.model.diffusion_model(latent, torch.full((1,), 200.0), context=context)
    for folder in sorted((job / "damaged").iterdir()):
        case = folder.name
        comfy_process.note_error(report["errors"], case, load, folder)
    embedded = core.NODE_CLASS_MAPPINGS["ICMSR_LoadEmbedded"]
    case = "embedded"
    comfy_process.note_error(report["errors"], case, embedded.execute)

save_file(results, job / "results.safetensors")
(job / "report.json").write_text(json.dumps(report, indent=1))
