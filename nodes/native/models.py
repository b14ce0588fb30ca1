"""Loads a base folder of ICM-SR into ComfyUI's native UNet and VAE, without diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.weights.base import BaseFolder
from .core_objects import Model, Patcher, Vae
from .keys import native_unet_keys, native_vae_key

CORE_WIDTH = 320
"""First width of Stable Diffusion's UNet, for which core's memory factor is 1."""
MIDDLES = {"UNetMidBlock2DCrossAttn": 1, "UNetMidBlock2D": -1}
"""Core's `transformer_depth_middle` for each of diffusers' middle blocks; -1 is a single residual block."""
CORE_VAE_WIDTH = 128
"""First width of Stable Diffusion's VAE, for which core estimates memory."""


def load_unet(base: BaseFolder, disable_dynamic: bool = False) -> Model:
    """The MODEL (a ModelPatcher) of `base`, in the precision that core chooses for the device.

    With `disable_dynamic` never one of DynamicVRAM: core asks for it when a node needs plain weights, and loads `base`
    again with this function for that, and for another card. Raises `IcmsrError` if the configuration does not have
    Stable Diffusion's layout or a tensor does not fit.
    """
    config = _model_config(base)
    keys = native_unet_keys(config.unet_config)
    source = base.unet_state()
    state = {keys.get(key, f"(no native name) {key}"): value for key, value in source.items()}
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=sum(value.numel() for value in state.values()),
        supported_dtypes=config.supported_inference_dtypes,
    )
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(state)
    _check_fit(f"{base.path}/unet", state, model.diffusion_model)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    # Where core takes the tensors as they are (DynamicVRAM), it would round patched ones to the file's precision.
    state = {key: value.to(dtype) for key, value in state.items()}
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_unet, (base,))
    return patcher


def load_vae(base: BaseFolder) -> Vae:
    """The VAE of `base`, in the precision that core chooses for the device.

    Raises `IcmsrError` if core has no network for the configuration or a tensor does not fit.
    """
    config = base.vae_config
    widths: list[int] = config["block_out_channels"]
    levels, channels = len(widths), int(config["latent_channels"])
    if any(width % widths[0] or width % 32 for width in widths):
        raise IcmsrError(f"{base.path}/vae: widths must be multiples of 32 and of the first one, got {widths}")
    if not (config.get("use_quant_conv", True) and config.get("use_post_quant_conv", True)):
        raise IcmsrError(f"{base.path}/vae: without quant_conv or post_quant_conv, which ComfyUI's AutoencoderKL needs")
    # In float32 for the same reason as in `load_unet`; core chooses the precision later.
    state = {native_vae_key(key, levels): _as_conv(key, value).float() for key, value in base.vae_state().items()}
    given = set(state)
    attends = bool(config.get("mid_block_add_attention", True))
    if not attends:
        state |= _silent_attention(widths[-1])
    shape = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": int(config["layers_per_block"]),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    try:
        vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": shape, "embed_dim": channels}})
    except RuntimeError as error:  # a tensor of another shape; missing and surplus names are only logged by core
        raise IcmsrError(f"{base.path}/vae: {' '.join(str(error).split())}") from error
    network = vae.first_stage_model
    if not attends:
        network.encoder.mid.attn_1 = torch.nn.Identity()
        network.decoder.mid.attn_1 = torch.nn.Identity()
    _check_fit(f"{base.path}/vae", {key: state[key] for key in given}, network)
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = int(config["norm_num_groups"])  # core builds all of them with 32
    vae.latent_channels = channels
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (levels - 1)
    narrower = widths[0] / CORE_VAE_WIDTH
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: encode(shape, dtype) * narrower
    vae.memory_used_decode = lambda shape, dtype: decode(shape, dtype) * narrower * 4 ** (levels - 1) / 64
    vae.patcher.cached_patcher_init = (_load_vae_patcher, (base,))
    return vae


def _load_vae_patcher(base: BaseFolder, disable_dynamic: bool = False) -> Patcher:
    """The patcher of `load_vae`, which core asks for to have a VAE for another card."""
    return load_vae(base).patcher


def _as_conv(key: str, value: Tensor) -> Tensor:
    # The attention's projections are linear layers in diffusers and 1x1 convolutions in core.
    return value[..., None, None] if ".attentions." in key and value.ndim == 2 else value


def _silent_attention(width: int) -> dict[str, Tensor]:
    """Weights for the attention that core builds into every VAE; `load_vae` then removes it."""
    state: dict[str, Tensor] = {}
    for part in ("encoder", "decoder"):
        for name in ("norm", "q", "k", "v", "proj_out"):
            weight = torch.zeros(width) if name == "norm" else torch.zeros(width, width, 1, 1)
            state[f"{part}.mid.attn_1.{name}.weight"] = weight
            state[f"{part}.mid.attn_1.{name}.bias"] = torch.zeros(width)
    return state


def _model_config(base: BaseFolder) -> Any:
    """Core's model configuration for the UNet of `base`."""
    info, vae_config = base.info, base.vae_config

    class Format(comfy.latent_formats.LatentFormat):
        scale_factor = float(vae_config["scaling_factor"])
        latent_channels = int(vae_config["latent_channels"])
        spacial_downscale_ratio = 2 ** (len(vae_config["block_out_channels"]) - 1)

    native = _unet_config(base)

    class Config(comfy.supported_models_base.BASE):
        # BASE would silently set 64 channels per head, which changes the number of heads.
        unet_extra_config: dict[str, Any] = {  # noqa: RUF012
            "num_heads": -1,
            "num_head_channels": native.pop("num_head_channels"),
        }
        latent_format = Format
        # In core's order: the fastest first.
        supported_inference_dtypes: list[torch.dtype] = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
        memory_usage_factor = native["model_channels"] / CORE_WIDTH
        sampling_settings: dict[str, Any] = {  # noqa: RUF012
            "beta_schedule": "linear",
            "linear_start": info.beta_start,
            "linear_end": info.beta_end,
            "timesteps": info.steps,
        }

        def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> Any:
            kinds = comfy.model_base.ModelType
            return kinds.V_PREDICTION if info.prediction == "v" else kinds.EPS

        def inpaint_model(self) -> bool:
            return False  # BASE says yes for every UNet with more than 4 input channels

    return Config(native)


def _unet_config(base: BaseFolder) -> dict[str, Any]:
    """Native parameters for a diffusers UNet2DConditionModel of Stable Diffusion's layout."""
    config: Mapping[str, Any] = base.unet_config
    widths: list[int] = config["block_out_channels"]
    levels, layers = len(widths), config["layers_per_block"]
    expected = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    if list(config["down_block_types"]) != expected or layers != 2:
        raise IcmsrError(
            f"{base.path}/unet: ComfyUI's UNet needs the blocks {expected} with 2 layers, "
            f"got {config['down_block_types']} with {layers}"
        )
    heads = config["attention_head_dim"]
    heads = list(heads) if isinstance(heads, Iterable) else [heads] * levels
    head_widths = {width // count for width, count in zip(widths, heads)}
    if len(head_widths) != 1 or any(width % widths[0] or width % 32 for width in widths):
        raise IcmsrError(
            f"{base.path}/unet: widths must be multiples of 32 and of the first one, with heads of one width, "
            f"got {widths} with {heads} heads"
        )
    attends = [1] * (levels - 1) + [0]
    # The middle block always has self-attention, in diffusers and here.
    only_cross = config.get("only_cross_attention", False)
    only_cross = list(only_cross) if isinstance(only_cross, Iterable) else [only_cross] * levels
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle not in MIDDLES:
        raise IcmsrError(
            f"{base.path}/unet: ComfyUI's UNet needs the middle block {' or '.join(MIDDLES)}, got {middle}"
        )
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * levels,
        "transformer_depth": [depth for depth in attends for _ in range(layers)],
        "transformer_depth_output": [depth for depth in attends for _ in range(layers + 1)],
        "transformer_depth_middle": MIDDLES[middle],
        "disable_self_attentions": only_cross,
        "num_head_channels": head_widths.pop(),
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "use_spatial_transformer": True,
        "use_checkpoint": False,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def _check_fit(name: str, given: Mapping[str, Tensor], network: torch.nn.Module) -> None:
    """Raises `IcmsrError` unless `given` has the names and shapes of `network`'s tensors.

    Core itself only logs names that do not match, and its lazy layers accept any shape.
    """
    wanted = _tensor_shapes(network)
    wrong = [f"{key} is surplus" for key in given if key not in wanted]
    wrong += [f"{key} is missing" for key in wanted if key not in given]
    wrong += [
        f"{key} is {list(given[key].shape)}, expected {list(shape)}"
        for key, shape in wanted.items()
        if key in given and given[key].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise IcmsrError(f"{name}: the weights do not fit the configuration: {', '.join(wrong[:4])}{more}")


def _tensor_shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor that `network` needs, by name, before or after its weights are loaded.

    With core's DynamicVRAM a Linear layer (`comfy.ops.disable_weight_init.Linear`) has no tensors until they are
    loaded: their shapes follow from its features.
    """
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight is None:
            shapes[f"{name}.weight"] = torch.Size((module.out_features, module.in_features))
            if module.comfy_need_lazy_init_bias:
                shapes[f"{name}.bias"] = torch.Size((module.out_features,))
    return shapes
