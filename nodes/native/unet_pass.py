"""One pass of a MODEL's UNet with everything that other nodes have put around it."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from .core_objects import Model

SAMPLER_OPTIONS = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "denoise_mask_function",
    "model_function_wrapper",
)
"""Entries of `model_options` that core's samplers alone use."""
SAMPLER_WRAPPERS = ("outer_sample", "prepare_sampling", "sampler_sample", "predict_noise", "calc_cond_batch")
"""Kinds of wrappers (comfy.patcher_extension.WrappersMP) around the parts of a sampler."""


def check_changes(model: Model) -> None:
    """Raises `IcmsrError` for a MODEL with a change that cannot work here.

    One that only a sampler applies would be lost silently. One of self-attention does not fit a UNet without it (nano).
    """
    wrappers = _wrappers(model)
    found = [name for name in SAMPLER_OPTIONS if model.model_options.get(name)]
    found += [kind for kind in SAMPLER_WRAPPERS if any(wrappers.get(kind, {}).values())]
    if found:
        raise IcmsrError(
            f"this MODEL carries a change that only a sampler applies ({', '.join(found)}), and ICM-SR works in one "
            "step without a sampler: take the MODEL from before the node that makes the change (such as RescaleCFG, "
            "Perturbed-Attention Guidance or EasyCache)"
        )
    options = model.model_options["transformer_options"]
    changed = options.get("patches", {}).get("attn1_patch") or options.get("patches_replace", {}).get("attn1")
    if changed and any(model.model.model_config.unet_config.get("disable_self_attentions") or ()):
        raise IcmsrError(
            "this MODEL carries a change of self-attention, which this model does not have: take the MODEL from before "
            "the node that makes the change (such as HyperTile or TomePatchModel)"
        )


def run_unet(
    model: Model, latent: Tensor, timestep: int, context: Tensor, control: dict[str, list[Tensor | None]] | None
) -> Tensor:
    """The UNet's raw output [N, C, h, w], float32, for `latent` at `timestep`; `model` is loaded.

    Patches of the UNet act as they do in a sampler, and so do wrappers around the model (core's TorchCompileModel).
    These see the latent as the UNet takes it, and the sigma of the timestep.
    """
    network = model.model
    sigma = model.get_model_object("model_sampling").sigmas[timestep : timestep + 1]
    times = torch.full((latent.shape[0],), float(timestep), device=latent.device)

    def apply(
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        output: Tensor = network.diffusion_model(
            x, times, context=c_crossattn, control=control, transformer_options=transformer_options
        )
        return output.float()

    # A new copy, because networks write into it.
    options = comfy.utils.deepcopy_list_dict(model.model_options["transformer_options"])
    options["wrappers"] = wrappers = _wrappers(model)
    options["callbacks"] = comfy.patcher_extension.merge_nested_dicts(options.get("callbacks", {}), model.callbacks)
    options |= {"cond_or_uncond": [0], "sigmas": sigma}
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    around = [wrapper for some in wrappers.get(kind, {}).values() for wrapper in some]
    run = comfy.patcher_extension.WrapperExecutor.new_class_executor(apply, network, around)
    seen = sigma.to(latent.device).expand(latent.shape[0]) if around else sigma
    found: Tensor = run.execute(latent, seen, None, context, control, options)
    return found


def _wrappers(model: Model) -> dict[str, dict[str, list[Any]]]:
    """All wrappers of `model` by kind and key, as a sampler collects them."""
    own = model.model_options["transformer_options"].get("wrappers", {})
    merged: dict[str, dict[str, list[Any]]] = comfy.patcher_extension.merge_nested_dicts(own, model.wrappers)
    return merged
