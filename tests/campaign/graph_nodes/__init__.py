"""Nodes for the campaign's ComfyUI: they let ICM-SR Upscale run out of memory, and tell what came of a run."""

import json
import sys
import weakref

import folder_paths
import torch
from safetensors.torch import save_file

planted: dict = {"errors": 0, "changed": []}
plans: list[dict] = []
first_seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _changed(model, vae) -> list[str]:
    """What of the patchers of MODEL and VAE is not as it was when they were first seen."""
    found = []
    for name, patcher in (("MODEL", model), ("VAE", vae.patcher)):
        now = _marks(patcher)
        before = first_seen.setdefault(patcher, now)
        found += [f"{name}: {key}" for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    return found


def _marks(patcher) -> dict[str, str]:
    """Patches of a patcher by their place, and what hangs on the modules of its network."""
    marks = {f"patches of {key}": str(len(value)) for key, value in patcher.patches.items()}
    marks |= {f"object patch {key}": str(id(value)) for key, value in patcher.object_patches.items()}
    marks["options"] = repr(_keys(patcher.model_options))
    for name in ("attachments", "additional_models", "callbacks", "wrappers", "injections"):
        marks[name] = repr(_keys(getattr(patcher, name, None)))
    for name, module in patcher.model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)]
        if any(hooks):
            marks[f"hooks of {name}"] = str(hooks)
    return marks


def _keys(value):
    """The keys of nested mappings, and how many entries lists have."""
    if isinstance(value, dict):
        return sorted((str(key), _keys(entry)) for key, entry in value.items())
    return len(value) if isinstance(value, (list, tuple)) else None


def _upscale_module():
    return next(module for name, module in sys.modules.items() if name.endswith(".nodes.upscale"))


def _wrap() -> None:
    """`run_plan`, as the node sees it, from now on fails where an error is planted, and notes the plan otherwise."""
    module = _upscale_module()
    real = module.run_plan
    if getattr(real, "campaign", False):
        return

    def run_plan(backbone, picture, plan, **others):
        if planted["errors"] > 0:
            planted["errors"] -= 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (planted)")
        result = real(backbone, picture, plan, **others)
        plans.append({"tile": plan.settings.tile, "overlap": plan.settings.overlap, "vae": plan.settings.vae})
        return result

    run_plan.campaign = True
    module.run_plan = run_plan


ORIGINALS = {"model": ("MODEL",), "vae": ("VAE",)}


class Plant:
    """Passes an IMAGE on; the next passes of ICM-SR Upscale run out of memory so many times."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "plant", "campaign"

    @classmethod
    def INPUT_TYPES(cls):
        own = {"images": ("IMAGE",), "errors": ("INT", {"default": 0}), "run": ("INT", {"default": 0})}
        return {"required": {**own, **ORIGINALS}}

    def plant(self, images, errors, run, model, vae):
        _wrap()
        planted.update(errors=errors, changed=_changed(model, vae))  # also by a run before that was interrupted
        plans.clear()
        return (images,)


class Keep:
    """Writes an IMAGE into the output folder, the plan of each of its pictures, and what became of the originals."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "campaign", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "run": ("INT", {"default": 0}), **ORIGINALS}}

    def keep(self, images, run, model, vae):
        name = f"{folder_paths.get_output_directory()}/run_{run}.safetensors"
        told = {"plans": plans, "errors": planted["errors"], "changed": planted["changed"] + _changed(model, vae)}
        save_file({"images": images.to(torch.float32).contiguous()}, name, {"told": json.dumps(told)})
        return {"ui": {"text": [name]}}


NODE_CLASS_MAPPINGS = {"CampaignPlant": Plant, "CampaignKeep": Keep}
