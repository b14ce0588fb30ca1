"""Nodes for the campaign's ComfyUI: they let ICM-SR Upscale run out of memory, and tell what came of a run."""

import json
import sys

import folder_paths
import torch
from safetensors.torch import save_file

planted = {"errors": 0}
plans: list[dict] = []


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


class Plant:
    """Passes an IMAGE on; the next passes of ICM-SR Upscale run out of memory so many times."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "plant", "campaign"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "errors": ("INT", {"default": 0}), "run": ("INT", {"default": 0})}}

    def plant(self, images, errors, run):
        _wrap()
        planted["errors"] = errors
        plans.clear()
        return (images,)


class Keep:
    """Writes an IMAGE, and the plan of each of its pictures, into the output folder."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "campaign", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "run": ("INT", {"default": 0})}}

    def keep(self, images, run):
        name = f"{folder_paths.get_output_directory()}/run_{run}.safetensors"
        save_file({"images": images.to(torch.float32).contiguous()}, name, {"plans": json.dumps(plans)})
        return {"ui": {"text": [name]}}


NODE_CLASS_MAPPINGS = {"CampaignPlant": Plant, "CampaignKeep": Keep}
