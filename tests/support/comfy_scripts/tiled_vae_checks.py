"""Runs core's VAEs in stripes and untiled in a ComfyUI process: results.safetensors for test_comfy_tiled_vae.py."""

from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job

part = comfy_process.parts_of(pack)
tiled_vae = part("icmsr_core.tiled_vae.tiled")
comfy_backbone = part("nodes.native.backbone")
apply_node = core.NODE_CLASS_MAPPINGS["ICMSR_ApplyGenerator"]
inputs = load_file(job / "inputs.safetensors")
results: dict[str, torch.Tensor] = {}


def tiled(backbone, latent, **how):
    out = torch.empty_like(inputs["image"])
    tiled_vae.decode_tiled(backbone, latent, out, tiled_vae.plan_stripes(*latent.shape[2:], 6), **how)
    return out


class StandIn:
    """A ComfyBackbone's VAE with another network in it: the attention and the widths of a real one."""

    def __init__(self, backbone, network) -> None:
        self.descriptor = backbone.descriptor
        self._backbone, self._network = backbone, network

    def vae_half(self, name, pixels):
        own = self._backbone._vae.first_stage_model
        self._backbone._vae.first_stage_model = self._network
        try:
            return self._backbone.vae_half(name, pixels)
        finally:
            self._backbone._vae.first_stage_model = own


def kinds_of_attention(block) -> list[list[bool]]:
    """For each function of core, on NVIDIA and on AMD: whether torch's fused kernels are used, and whether it is."""
    core, management, found = comfy.ldm.modules.diffusionmodules.model, comfy.model_management, []
    kept = block.optimized_attention, management.is_amd
    for chosen in (core.pytorch_attention, core.normal_attention, core.xformers_attention):
        for amd in (False, True):
            block.optimized_attention, management.is_amd = chosen, lambda amd=amd: amd
            attention = part("nodes.native.vae_steps")._attention(block, torch.device("cpu"))[0].main[1]
            found.append([attention.fused, attention.own is chosen])
    block.optimized_attention, management.is_amd = kept
    return found


with torch.inference_mode():
    model, vae = apply_node.execute(*comfy_process.load_base(part, job / "base"), "generator.safetensors").result
    image = inputs["image"]
    with comfy_backbone.ComfyBackbone(model, vae) as backbone:
        latent = results["latent"] = backbone.encode(2 * image - 1)
        results["picture"] = backbone.decode(latent) / 2 + 0.5
        stripes = tiled_vae.plan_stripes(*latent.shape[2:], 6)
        for name, exact in (("exact", True), ("bounded", False)):
            results[f"{name} latent"] = tiled_vae.encode_tiled(backbone, image, stripes, exact=exact)
            results[f"{name} picture"] = tiled(backbone, latent, exact=exact)

        # Core's own layout with attention in the middle, two layers a level, with and without the outer convolutions.
        config = {
            "double_z": True,
            "z_channels": backbone.descriptor.latent_channels,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1, 2, 3],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        torch.manual_seed(3)
        network = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=config, embed_dim=config["z_channels"])
        for parameter in network.parameters():  # core leaves them uninitialised
            parameter.copy_(torch.randn_like(parameter) * 0.05)
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.add_(1)
        network.eval()
        for name in ("quant", "no quant"):
            if name == "no quant":
                network.quant_conv = network.post_quant_conv = None
            stand_in = StandIn(backbone, network)
            moments = network.encoder(2 * image - 1)
            moments = moments if network.quant_conv is None else network.quant_conv(moments)
            results[f"{name} latent"] = backbone._model.model.process_latent_in(
                moments[:, : config["z_channels"]]
            ).contiguous()
            raw = backbone._model.model.process_latent_out(latent)
            raw = raw if network.post_quant_conv is None else network.post_quant_conv(raw)
            results[f"{name} picture"] = network.decoder(raw) / 2 + 0.5
            results[f"{name} exact latent"] = tiled_vae.encode_tiled(stand_in, image, stripes)
            results[f"{name} exact picture"] = tiled(stand_in, latent)

        # As with xformers: an attention of core's that is neither of the two that torch's kernels and slices replace.
        block, calls = network.decoder.mid.attn_1, []
        own = block.optimized_attention

        def noted(query, key, value):
            calls.append(list(query.shape[2:]))
            return own(query, key, value)

        block.optimized_attention = noted
        results["own exact picture"] = tiled(stand_in, latent)
        results["own bounded picture"] = tiled(stand_in, latent, exact=False)
        block.optimized_attention = own
        results["cells of own attention"] = torch.tensor(calls)
        results["kinds of attention"] = torch.tensor(kinds_of_attention(block))

save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
