"""Puts core's nodes for MODEL before and after ICM-SR Apply Generator: results.safetensors and report.json.

What comes out is judged by test_comfy_graphs.py.
"""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)
comfy_process.find_support(options)

import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply  # noqa: E402
from comfy_extras.nodes_easycache import EasyCacheNode  # noqa: E402
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2  # noqa: E402
from comfy_extras.nodes_hypertile import HyperTile  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelComputeDtype, RescaleCFG  # noqa: E402
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale  # noqa: E402
from comfy_extras.nodes_pag import PerturbedAttentionGuidance  # noqa: E402
from comfy_extras.nodes_sag import SelfAttentionGuidance  # noqa: E402
from comfy_extras.nodes_torch_compile import TorchCompileModel  # noqa: E402
from pretend_card import Card, card  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

job: Path = options.job
nodes = {name.removeprefix("ICMSR_"): node for name, node in core.NODE_CLASS_MAPPINGS.items() if "ICMSR_" in name}
picture = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
results: dict[str, torch.Tensor] = {}
report: dict = {"errors": {}, "compiled": {}}
compiled = report["compiled"]


def counting(module, inputs):
    """A backend of torch.compile that runs the graphs as they are and counts that."""

    def run(*arguments):
        compiled["calls"] = compiled.get("calls", 0) + 1
        return module.forward(*arguments)

    return run


def write_lora(model) -> None:
    """A LoRA of a user, on a linear layer and a convolution that the generator changes too."""
    shapes = {key: value.shape for key, value in model.model_state_dict().items()}
    linear = next(key for key in shapes if key.endswith("attn2.to_v.weight"))
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for key, amount in ((linear, 1.0), ("diffusion_model.input_blocks.0.0.weight", 0.05)):
        name, (out, *rest) = key.removesuffix(".weight"), shapes[key]
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, *rest, generator=random) * amount
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, *[1] * (len(rest) - 1), generator=random)
    (job / "models" / "loras").mkdir(exist_ok=True)
    save_file(tensors, job / "models" / "loras" / "style.safetensors")


def applied(model, vae):
    return nodes["ApplyGenerator"].execute(model, vae, "nano (embedded)", fidelity=0.5).result


def upscaled(model, vae, **settings) -> torch.Tensor:
    result = nodes["Upscale"].execute(model, vae, picture, **{"tile": 0, "color_fix": "none", **settings}).result[0]
    return result.cpu()


CHANGES = {
    "FreeU": lambda model: FreeU.execute(model, 1.3, 1.4, 0.9, 0.2).result[0],
    "FreeU_V2": lambda model: FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0],
    "attention multiply": lambda model: UNetCrossAttentionMultiply.execute(model, 1.0, 1.0, 5.0, 3.0).result[0],
    "deep shrink": lambda model: PatchModelAddDownscale.execute(
        model, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    ).result[0],
    "LoraLoaderModelOnly": lambda model: core.LoraLoaderModelOnly().load_lora_model_only(
        model, "style.safetensors", 0.8
    )[0],
    "LoraLoader": lambda model: core.LoraLoader().load_lora(model, None, "style.safetensors", 0.8, 0.8)[0],
    "compute type": lambda model: ModelComputeDtype().patch(model, "bf16")[0],
    "TorchCompileModel": lambda model: TorchCompileModel.execute(model, counting).result[0],
}
REFUSED = {
    "RescaleCFG": lambda model: RescaleCFG().patch(model, 0.7)[0],
    "Perturbed-Attention Guidance": lambda model: PerturbedAttentionGuidance.execute(model, 3.0).result[0],
    "Self-Attention Guidance": lambda model: SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0],
    "EasyCache": lambda model: EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0],
    "HyperTile": lambda model: HyperTile.execute(model, 32, 2, 1, False)[0],
}


def before_and_after() -> None:
    """Each change at both places, and the plain result."""
    base, vae = nodes["LoadEmbedded"].execute("none").result
    write_lora(base)
    results["plain"] = upscaled(*applied(base, vae))
    for name, change in CHANGES.items():
        results[f"{name}, before"] = upscaled(*applied(change(base), vae))
        model, own_vae = applied(base, vae)
        results[f"{name}, after"] = upscaled(change(model), own_vae)
    results["plain, again"] = upscaled(*applied(base, vae))


def refused() -> None:
    """Changes that only a sampler applies, and one of self-attention, which nano does not have."""
    base, vae = nodes["LoadEmbedded"].execute("none").result
    model, own_vae = applied(base, vae)
    error_of = partial(comfy_process.note_error, report["errors"])
    for name, change in REFUSED.items():
        error_of(name, upscaled, change(model), own_vae)
        error_of(f"{name}, before", lambda change=change: upscaled(*applied(change(base), vae)))
        error_of(f"{name}, grid", nodes["InspectManifold"].execute, change(base), vae, picture)


def on_other_cards() -> None:
    """What core's multi-GPU nodes make of MODEL and VAE: networks of their own, loaded from the base again."""
    model, vae = applied(*nodes["LoadEmbedded"].execute("none").result)
    expected = upscaled(model, vae)
    copied = model.deepclone_multigpu(torch.device("cpu"))
    vae.patcher = vae.patcher.deepclone_multigpu(torch.device("cpu"))
    report["own networks"] = [copied.model is not model.model, vae.patcher.model is not vae.first_stage_model]
    vae.first_stage_model = vae.patcher.model
    report["deep copy"] = float((upscaled(copied, vae) - expected).abs().max())
    copied.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [copied])
    management.unload_all_models()
    report["with a copy"] = float((upscaled(model, vae) - expected).abs().max())
    report["copy loaded"] = any(loaded.model is copied.model for loaded in management.loaded_models())


def with_dynamic_loading() -> None:
    """A plain copy of a MODEL of DynamicVRAM, as TorchCompileModel asks for it."""
    with card(Card(dynamic=True)):
        model, vae = applied(*nodes["LoadEmbedded"].execute("none").result)
        results["dynamic"] = upscaled(model, vae)
        copied = model.clone(disable_dynamic=True)
        results["dynamic, plain copy"] = upscaled(copied, vae)
        results["dynamic, again"] = upscaled(model, vae)
        report["dynamic"] = [model.is_dynamic(), copied.is_dynamic()]


def in_eight_bits() -> None:
    """nano with its UNet kept in fp8, as --fp8_e4m3fn-unet does."""
    with mock.patch.object(args, "fp8_e4m3fn_unet", True):
        model, vae = applied(*nodes["LoadEmbedded"].execute("none").result)
    report["kept"] = str(model.model_state_dict()["diffusion_model.input_blocks.0.0.weight"].dtype)
    results["8 bits"] = upscaled(model, vae)
    results["8 bits, again"] = upscaled(model, vae)


with torch.inference_mode():
    before_and_after()
    refused()
    on_other_cards()
    management.unload_all_models()
    with_dynamic_loading()
    in_eight_bits()

save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "report.json").write_text(json.dumps(report, indent=1))
