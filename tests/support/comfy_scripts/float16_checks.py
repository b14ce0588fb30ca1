"""Runs nano on a pretend card that computes in 16 bits: results.safetensors and report.json.

What comes out is judged by test_comfy_float16.py.
"""

import json
import logging
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)
comfy_process.find_support(options)

import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402
from pretend_card import Card, card  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

job: Path = options.job
FORCED = ("fp16_unet", "fp16_vae")
WAYS = {
    "chosen by core": Card(half=True),
    "chosen by core, MPS": Card("mps", state="SHARED", half=True),
    "chosen by core, DynamicVRAM": Card(half=True, dynamic=True),
    "forced": Card(half=True, options=FORCED),
    "forced, DynamicVRAM": Card(half=True, dynamic=True, options=FORCED),
    "forced, --novram": Card(half=True, state="NO_VRAM", options=FORCED),
}
EVERYTHING = ("CPU", "CPU, forced", "chosen by core", "forced", "forced, DynamicVRAM")
"""Where the adapter and the grid run, too."""
TOO_MUCH = 1e6
"""The largest value of a map that leaves float16's range."""
nodes = {name.removeprefix("ICMSR_"): node for name, node in core.NODE_CLASS_MAPPINGS.items() if "ICMSR_" in name}
picture = torch.rand(1, 16, 24, 3, generator=torch.Generator().manual_seed(0))
results: dict[str, torch.Tensor] = {}
report: dict = {"precisions": {}, "warnings": {}, "repeated": {}}
warnings: list[str] = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger(pack.__name__).addHandler(handler)


def upscaled(name: str, model, vae, **settings) -> torch.Tensor:
    """One upscale, whose warnings are noted under `name`."""
    warnings.clear()
    result = nodes["Upscale"].execute(model, vae, picture, **{"tile": 64, "overlap": 16, **settings}).result[0].cpu()
    report["warnings"][name] = list(warnings)
    return result


def with_nodes(name: str) -> None:
    """The nodes under the present rules; results, precisions and warnings are noted under `name`."""
    bare = nodes["LoadEmbedded"].execute("none").result
    model, vae = nodes["ApplyGenerator"].execute(*bare, "nano (embedded)", fidelity=0.0).result
    report["precisions"][name] = [str(model.model.get_dtype_inference()), str(vae.vae_dtype), model.is_dynamic()]
    if "forced" in name:
        overflow(model.model.diffusion_model.output_blocks[-1][0])
    results[name] = upscaled(name, model, vae)
    report["repeated"][name] = bool(torch.equal(upscaled(f"{name}, again", model, vae), results[name]))
    if name not in EVERYTHING:
        return
    hint = nodes["ExtractCondition"].execute(picture).result[0]
    guided = {"control_net": nodes["LoadAdapter"].execute("nano (embedded)").result[0], "hint": hint}
    results[f"{name}, adapter"] = upscaled(f"{name}, adapter", model, vae, **guided)
    grid = nodes["InspectManifold"].execute(*bare, picture, timesteps="500", **guided).result[0]
    results[f"{name}, grid"] = grid.cpu()


def overflow(layer: torch.nn.Module) -> None:
    """Takes the layer's result out of float16's range, before a norm that takes the size out again."""
    layer.register_forward_hook(lambda _module, _inputs, result: result * TOO_MUCH)


def overflowing_vae(part: str, forced: bool) -> None:
    """A VAE with a part that leaves float16's range, before a norm that takes the size out again."""
    with card(Card(half=True, options=("fp32_unet", "fp16_vae" if forced else "fp32_vae"))):
        model, vae = nodes["LoadEmbedded"].execute().result
        layer = getattr(vae.first_stage_model, part).conv_in
        seen: list[float] = []
        noting = layer.register_forward_hook(lambda _module, _inputs, result: seen.append(float(result.abs().max())))
        upscaled("ordinary", model, vae, tile=0)
        noting.remove()
        layer.register_forward_hook(lambda _module, _inputs, result: result * (TOO_MUCH / max(seen)))
        for kind, settings in {"whole": {"tile": 0}, "exact": {}, "bounded": {"vae_mode": "bounded"}}.items():
            name = f"{part}, {kind}, {'forced' if forced else 'float32'}"
            results[name] = upscaled(name, model, vae, color_fix="none", **settings)


with torch.inference_mode():
    with_nodes("CPU")
    with_nodes("CPU, forced")
    management.unload_all_models()
    for way, given in WAYS.items():
        with card(given):
            with_nodes(way)
    for part in ("encoder", "decoder"):
        for forced in (False, True):
            overflowing_vae(part, forced)
    with card(WAYS["forced"]):
        model, vae = nodes["LoadEmbedded"].execute().result
        model.model.diffusion_model.out[2].weight.fill_(float("nan"))
        report["errors"] = {}
        comfy_process.note_error(report["errors"], "damaged", upscaled, "damaged", model, vae)

save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "report.json").write_text(json.dumps(report, indent=1))
