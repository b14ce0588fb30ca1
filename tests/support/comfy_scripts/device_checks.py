"""Runs the nodes on the pretend device, which core's model management takes for a card: report.json.

The job's ways.json names those of `WAYS` that are asked for.

What comes out is judged by test_comfy_devices.py.
"""

import json
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)
comfy_process.find_support(options)

import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402
from pretend_card import Card, card  # noqa: E402

job: Path = options.job
WAYS = {
    "CUDA": Card(),
    "MPS": Card("mps", state="SHARED"),
    "DynamicVRAM": Card(dynamic=True),
    "DynamicVRAM, a third resident": Card(dynamic=True, resident=6 * 10**6),
    "half of the UNet": Card(free=9 * 10**6, options=("disable_dynamic_vram",)),
    "--novram": Card(state="NO_VRAM", options=("novram",)),
    "--gpu-only": Card(state="HIGH_VRAM", options=("gpu_only",)),
    "--cpu-vae": Card(options=("cpu_vae",)),
}
TILES = {"tile": 64, "overlap": 16}
CASES = {
    "exact": {**TILES, "vae_mode": "exact"},
    "bounded": {**TILES, "vae_mode": "bounded"},
    "whole": {"tile": 0},
    "tile_batch 0": {**TILES, "tile_batch": 0},
}
EVERYTHING = ("CPU", "CUDA", "MPS", "DynamicVRAM")
"""Where all cases run; elsewhere those that load the weights in another order."""
report: dict = {name: {} for name in ("differences", "devices", "dynamic", "loaded", "left pinned", "copied")}
nodes = {name.removeprefix("ICMSR_"): node for name, node in core.NODE_CLASS_MAPPINGS.items() if "ICMSR_" in name}
pictures = torch.rand(2, 16, 24, 3, generator=torch.Generator().manual_seed(0))


def results(way: str) -> dict[str, torch.Tensor]:
    """What the nodes give on the present device; notes where the weights are after an upscale."""
    image = pictures.to(management.intermediate_device())
    hint = nodes["ExtractCondition"].execute(image[:1]).result[0]
    model, vae = nodes["LoadEmbedded"].execute().result
    adapter = nodes["LoadAdapter"].execute("nano (embedded)").result[0]
    upscale = nodes["Upscale"].execute
    cases = CASES if way in EVERYTHING else {"exact": CASES["exact"]}
    found = {name: upscale(model, vae, image[:1], **settings).result[0] for name, settings in cases.items()}
    # Two pictures share the hint, so features that were kept for the first are used as well.
    found["adapter"] = upscale(model, vae, image, **TILES, control_net=adapter, hint=hint).result[0]
    report["dynamic"][way] = [model.is_dynamic(), vae.patcher.is_dynamic()]
    report["loaded"][way] = model.loaded_size() / model.model_size()
    report["devices"][way] = [str(patcher.model.device).partition(":")[0] for patcher in (model, vae.patcher)]
    bare = nodes["LoadEmbedded"].execute("none").result
    applied = nodes["ApplyGenerator"].execute(*bare, "nano (embedded)", fidelity=0.5).result
    found["applied"] = upscale(*applied, image[:1], **TILES).result[0]
    seen = {"timesteps": "500", "control_net": adapter, "hint": hint}
    found["grid"] = nodes["InspectManifold"].execute(*bare, image[:1], **seen).result[0]
    return {"hint": hint, **found}


def copied_again(way: str) -> None:
    """Notes what a second run with the same networks brings to the device: bytes, and how often memory is pinned."""
    with card(WAYS[way]) as (device, loading):
        hint = nodes["ExtractCondition"].execute(pictures).result[0]
        control = nodes["LoadAdapter"].execute("nano (embedded)").result[0]
        noted = report["copied"][way] = {"adapter": management.module_size(control.t2i_model)}
        model, vae = nodes["LoadEmbedded"].execute().result
        for name, settings in {"first": {}, "again": {}, "conditioned": {"control_net": control, "hint": hint}}.items():
            device.trace.clear()
            pinned = 0 if loading is None else loading.pinned
            nodes["Upscale"].execute(model, vae, pictures, tile=64, overlap=16, **settings)
            noted[name] = device.trace.copied("to device")
            noted[f"{name}, pinned"] = 0 if loading is None else loading.pinned - pinned
        noted["networks"] = model.model_size() + vae.patcher.model_size()


with torch.inference_mode():
    expected = results("CPU")
    management.unload_all_models()
    ways = json.loads((job / "ways.json").read_text(encoding="utf-8"))
    for way in ways:
        with card(WAYS[way]) as (_, loading):
            got = {name: result.cpu() for name, result in results(way).items()}
            report["left pinned"][way] = 0 if loading is None else loading.left_pinned
        report["differences"][way] = {name: float((got[name] - expected[name]).abs().max()) for name in got}
    for way in ("CUDA", "DynamicVRAM"):
        if way in ways:
            copied_again(way)

(job / "report.json").write_text(json.dumps(report, indent=1))
