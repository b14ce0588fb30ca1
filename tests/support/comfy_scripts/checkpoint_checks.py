"""Stable Diffusion checkpoints through core's own loaders: results.safetensors and report.json in the job folder.

plan.json says which families, at which size, and whether for the parity or for the memory. What comes out is judged by
test_comfy_checkpoints.py, which computes the same with diffusers, and by test_comfy_memory.py.
"""

import ctypes
import gc
import json
import logging
import math
import weakref
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import comfy.diffusers_load  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job
plan = json.loads((job / "plan.json").read_text())
inputs = load_file(job / "inputs.safetensors")
results: dict[str, torch.Tensor] = {}
report: dict = {}

part = comfy_process.parts_of(pack)
comfy_backbone = part("nodes.native.backbone")
load_node = core.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]
apply_node = core.NODE_CLASS_MAPPINGS["ICMSR_ApplyGenerator"]
upscale_node = core.NODE_CLASS_MAPPINGS["ICMSR_Upscale"]
adapter_node = core.NODE_CLASS_MAPPINGS["ICMSR_LoadAdapter"]

seen: list[tuple[torch.Tensor, torch.Tensor]] = []
predict = comfy_backbone.ComfyBackbone.predict_noise


def noted(self, latent, timestep, features=None):
    """The UNet as it is, its input and output kept."""
    output = predict(self, latent, timestep, features)
    seen.append((latent.cpu(), output.cpu()))
    return output


comfy_backbone.ComfyBackbone.predict_noise = noted


def load(name: str):
    """MODEL and VAE of a checkpoint; core finds no text encoder in these and gives None for it."""
    model, clip, vae = load_node().load_checkpoint(f"{name}.safetensors")
    assert clip is None
    return model, vae


def load_folder(family: str, model):
    """The same base from its diffusers folder, through core. Of a UNet, core takes the published size alone there.

    At another size `model` goes with the folder's VAE.
    """
    folder = job / "folders" / family
    if plan["full"]:
        model, _, vae = comfy.diffusers_load.load_diffusers(str(folder), output_clip=False)
        return model, vae
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "vae" / "diffusion_pytorch_model.safetensors")))
    return model, vae


def run(name: str, model, vae, picture=inputs["picture"], **settings) -> torch.Tensor:
    """Notes latent, UNet output and picture of the node's one run, whose picture is a single tile."""
    seen.clear()
    result = upscale_node.execute(model, vae, picture, **{"tile": 512, **settings}).result[0]
    assert len(seen) == 1
    results[f"{name} latent"], results[f"{name} output"] = seen[0]
    results[f"{name} picture"] = result
    return result


def counted(patcher) -> dict[str, int]:
    """How many weights a generator patches, how many of them are weights of the network, and how many it changes."""
    state = patcher.model_state_dict()
    changed = sum(
        bool((comfy.lora.calculate_weight(entries, state[key].float().clone(), key) != state[key].float()).any())
        for key, entries in patcher.patches.items()
        if key in state
    )
    return {"patches": len(patcher.patches), "known": len(patcher.patches.keys() & state.keys()), "changed": changed}


def precision(patcher) -> list[str]:
    return sorted({str(value.dtype).removeprefix("torch.") for value in patcher.model_state_dict().values()})


def resident() -> float:
    """Megabytes of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def forget() -> None:
    """What core does on POST /free; then the C library gives back what it keeps for later, where it can be told to."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    comfy.model_management.soft_empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def parity(family: str) -> None:
    """Both sources, with the generator; the checkpoint also with the adapter."""
    model, vae = load(family)
    applied, applied_vae = apply_node.execute(model, vae, f"{family}.safetensors").result
    report[f"{family} lora"] = [counted(applied), counted(applied_vae.patcher)]
    run(family, applied, applied_vae)
    control = adapter_node.execute(f"{family} adapter.safetensors").result[0]
    run(f"{family} adapter", applied, applied_vae, control_net=control, hint=inputs["hint"], strength=0.7)
    del vae, applied, applied_vae, control
    if plan["full"]:
        model = None  # one of these at a time
        forget()
    run(f"{family} folder", *apply_node.execute(*load_folder(family, model), f"{family}.safetensors").result)
    del model
    forget()


def release(family: str) -> None:
    """A whole run with the adapter, and what is left of it once the graph's outputs are gone."""
    before = resident()
    model, vae = load(family)
    applied, applied_vae = apply_node.execute(model, vae, f"{family}.safetensors").result
    control = adapter_node.execute(f"{family} adapter.safetensors").result[0]
    run(f"{family} adapter", applied, applied_vae, control_net=control, hint=inputs["hint"])
    held = resident() - before
    networks = [weakref.ref(network) for network in (model.model, vae.first_stage_model, control.t2i_model)]
    size = sum(comfy.model_management.module_size(network()) for network in networks) / 2**20
    del model, vae, applied, applied_vae, control
    forget()
    alive = sum(network() is not None for network in networks)
    report["release"] = {"alive": alive, "networks": size, "held": held, "left": resident() - before}


def partly_loaded(family: str) -> None:
    """The networks with half of their weights, or none, loaded, as on a card that is too small for them.

    Core never does that on a CPU of its own accord; told to, it leaves the rest behind and patches each weight when
    it is needed.
    """
    model, vae = apply_node.execute(*load(family), f"{family}.safetensors").result
    run(family, model, vae)
    loaded = comfy.model_management.LoadedModel
    whole = loaded.model_load
    budgets = {"half loaded": lambda size: size / 2, "nothing loaded": lambda size: 0.1}
    for name, budget in budgets.items():
        comfy.model_management.unload_all_models()
        loaded.model_load = lambda self, _=0, force_patch_weights=False, budget=budget: whole(
            self, budget(self.model.model_size()) if self.model.loaded_size() == 0 else 0.1, force_patch_weights
        )
        try:
            run(name, model, vae)
            report[name] = {
                part: [patcher.loaded_size() / patcher.model_size(), patcher.lowvram_patch_counter()]
                for part, patcher in (("unet", model), ("vae", vae.patcher))
            }
        finally:
            loaded.model_load = whole


def in_other_precisions(family: str) -> None:
    """Checkpoints in bf16 and fp8, and the UNet kept in fp16 and fp8, each weight cast when it is needed."""
    files = job / "models" / "checkpoints"
    state = load_file(files / f"{family}.safetensors")
    with safe_open(files / f"{family}.safetensors", "pt") as file:
        metadata = file.metadata()
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        # As core's Save Checkpoint and the usual converters write them: the UNet alone is in 8 bits.
        saved = {
            key: value.to(dtype if name != "fp8" or key.startswith("model.diffusion_model.") else value.dtype)
            for key, value in state.items()
        }
        save_file(saved, files / f"{name}.safetensors", metadata)
        model, vae = load(name)
        report[f"{name} file"] = precision(model)
        run(name, *apply_node.execute(model, vae, f"{family}.safetensors").result)
        del model, vae
        forget()
    for option, name in (("fp16_unet", family), ("fp8_e4m3fn_unet", "fp8")):
        warnings = []
        handler = logging.Handler()
        handler.emit = lambda record, warnings=warnings: warnings.append(record.getMessage())
        logging.getLogger(pack.__name__).addHandler(handler)
        setattr(args, option, True)
        try:
            model, vae = apply_node.execute(*load(name), f"{family}.safetensors").result
            first = run(option, model, vae)
            comfy.model_management.unload_all_models()
            again = run(option, model, vae)
        finally:
            setattr(args, option, False)
            logging.getLogger(pack.__name__).removeHandler(handler)
        report[option] = {"kept": precision(model), "repeated": bool(torch.equal(first, again)), "warnings": warnings}
        del model, vae
        forget()
    networks = job / "models" / "diffusion_models"
    networks.mkdir()
    (networks / f"{family}.safetensors").hardlink_to(files / f"{family}.safetensors")
    model = core.NODE_CLASS_MAPPINGS["UNETLoader"]().load_unet(f"{family}.safetensors", "fp8_e4m3fn")[0]
    report["UNETLoader"] = precision(model)
    run("UNETLoader", *apply_node.execute(model, load(family)[1], f"{family}.safetensors").result)
    del model
    forget()


with torch.inference_mode():
    for family in plan["families"]:
        if plan["memory"]:
            release(family)  # first, while the process is small
            partly_loaded(family)
            forget()
            in_other_precisions(family)
        else:
            parity(family)

assert all(math.isfinite(float(value.sum())) for value in results.values())
save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "report.json").write_text(json.dumps(report, indent=1))
