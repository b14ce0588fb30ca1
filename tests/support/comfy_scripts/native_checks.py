"""Runs the pack's parts in a ComfyUI process on the files of a job folder: results.safetensors and report.json.

What comes out is judged by test_comfy_native.py, which computes the same with diffusers.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import comfy.controlnet  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from mapped_files import MAPS, mapped_files  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

job: Path = options.job
weights = job / "models" / "icmsr"

part = comfy_process.parts_of(pack)
load = partial(comfy_process.load_base, part)
description = part("nodes.native.description")
comfy_backbone = part("nodes.native.backbone")
generator_file = part("icmsr_core.weights.generator_file")
patches = part("nodes.native.generator_patches")
loaders = part("nodes.loaders")
apply_node = core.NODE_CLASS_MAPPINGS["ICMSR_ApplyGenerator"]
upscale_node = core.NODE_CLASS_MAPPINGS["ICMSR_Upscale"]
adapter_node = core.NODE_CLASS_MAPPINGS["ICMSR_LoadAdapter"]

results: dict[str, torch.Tensor] = {}
report: dict = {"errors": {}}
error_of = partial(comfy_process.note_error, report["errors"])
inputs = load_file(job / "inputs.safetensors")
picture, hint, latent, image = (inputs[name] for name in ("picture", "hint", "latent", "image"))


def upscaled(model, vae, pictures=picture, **settings):
    return upscale_node.execute(model, vae, pictures, **{"tile": 128, "overlap": 32, **settings}).result[0]


def bare(model, vae):
    """UNet, encoder and decoder of a MODEL and VAE as core itself would run them."""
    comfy.model_management.load_models_gpu([model])
    context = model.get_attachment(description.ATTACHMENT).prompt_embedding[None].expand(2, -1, -1)
    output = model.model.diffusion_model(latent, torch.full((2,), 200.0), context=context)
    return output, vae.encode(image.movedim(1, -1) / 2 + 0.5), vae.decode(latent)


with torch.inference_mode():
    model, vae = load(job / "base")
    before = [tensor.clone() for tensor in bare(model, vae)]

    model_a, vae_a = apply_node.execute(model, vae, "a.safetensors").result
    with comfy_backbone.ComfyBackbone(model_a, vae_a) as backbone:
        results["encode"] = backbone.encode(image)
        results["unet"] = backbone.predict_noise(latent, backbone.descriptor.timestep)
        results["decode"] = backbone.decode(latent)
    results["upscale"] = upscaled(model_a, vae_a)

    # The card of each network is CUDA's current one while it runs.
    own_context, report["cards"] = comfy.model_management.cuda_device_context, []

    @contextmanager
    def noted(device):
        report["cards"].append(device.type)
        with own_context(device):
            yield
        report["cards"].append("left")

    comfy.model_management.cuda_device_context = noted
    upscaled(model_a, vae_a)
    comfy.model_management.cuda_device_context = own_context

    # A second generator over the same base, then the first again; the base itself last.
    model_b, vae_b = apply_node.execute(model, vae, "b.safetensors").result
    results["upscale b"] = upscaled(model_b, vae_b)
    report["first again"] = float((upscaled(model_a, vae_a) - results["upscale"]).abs().max())
    report["base unchanged"] = [float((a - b).abs().max()) for a, b in zip(before, bare(model, vae))]
    report["patches on the base"] = len(model.patches) + len(vae.patcher.patches)
    half_model, half_vae = apply_node.execute(model, vae, "a.safetensors", strength=0.5).result
    results["upscale half"] = upscaled(half_model, half_vae)

    # Another shape of base: factor 4, three tokens, attention to the context alone.
    model_4, vae_4 = apply_node.execute(*load(job / "factor 4"), "factor 4.safetensors").result
    with comfy_backbone.ComfyBackbone(model_4, vae_4) as backbone:
        results["factor 4 encode"] = backbone.encode(image)
        results["factor 4 unet"] = backbone.predict_noise(latent[:, :8], backbone.descriptor.timestep)
        results["factor 4 decode"] = backbone.decode(latent[:, :8])
    results["factor 4"] = upscaled(model_4, vae_4)

    # Two sets of weights, and the fidelity between them.
    fidelities = {}
    for fidelity in (0.0, 0.5, 1.0, 2.0):
        fidelities[fidelity] = apply_node.execute(model, vae, "two sets.safetensors", fidelity=fidelity).result
        results[f"fidelity {fidelity}"] = upscaled(*fidelities[fidelity])
    for name, applied, expected in (
        # The faithful set of the file is the only one of a.safetensors.
        ("fidelity 0 and one set", fidelities[0.0], "upscale"),
        ("one set at fidelity 1", apply_node.execute(model, vae, "a.safetensors", fidelity=1.0).result, "upscale"),
        ("default fidelity", apply_node.execute(model, vae, "two sets.safetensors").result, "fidelity 1.0"),
    ):
        report[name] = float((upscaled(*applied) - results[expected]).abs().max())
    faithful = replace(generator_file.load_generator(weights / "vae above.safetensors"), realistic={})
    above = upscaled(*apply_node.execute(model, vae, "vae above.safetensors").result)
    below = upscaled(*patches.apply_generator(model, vae, faithful))
    report["vae above"] = float((above - below).abs().max())

    # The strength of both sets: how far the merged weights are from the base's, and whether half of it is half way.
    report["distances"], deltas = {}, {}
    fresh = load(job / "base")  # the networks above hold whatever core patched into them last
    for strength in (1.0, 0.5):
        applied = apply_node.execute(*fresh, "two sets.safetensors", strength=strength, fidelity=0.5).result
        for network, patcher in (("unet", applied[0]), ("vae", applied[1].patcher)):
            deltas[network, strength] = {
                key: comfy.lora.calculate_weight(entries, weight.clone(), key) - weight
                for key, weight in patcher.model_state_dict().items()
                if (entries := patcher.patches.get(key))
            }
            squares = sum(float(delta.double().square().sum()) for delta in deltas[network, strength].values())
            report["distances"][f"{network} {strength}"] = squares**0.5
    report["half way"] = max(
        float((deltas[network, 0.5][key] - 0.5 * delta).abs().max())
        for network in ("unet", "vae")
        for key, delta in deltas[network, 1.0].items()
    )

    # The adapter: one hint for a batch of two, so that kept features are used as well.
    control = adapter_node.execute("adapter.safetensors").result[0]
    embedded = loaders.LoadEmbedded.execute().result
    report["mapped"] = mapped_files(job, options.pack / "icmsr_core") if MAPS.is_file() else []
    del embedded
    pair = torch.cat([picture, picture.flip(1)])
    results["upscale adapter"] = upscaled(model_a, vae_a, pair, control_net=control, hint=hint, strength=0.7)
    report["adapter class"] = type(control).__name__
    report["batched tiles"] = float((upscaled(model_a, vae_a, tile_batch=3) - results["upscale"]).abs().max())
    four_levels = "four levels.safetensors"
    for name, control_net in (
        ("core's adapter", comfy.controlnet.load_t2i_adapter(load_file(weights / four_levels))),
        ("our adapter", adapter_node.execute(four_levels).result[0]),
    ):
        adapter = control_net.t2i_model
        report[name] = [control_net.channels_in, adapter.unshuffle_amount, len(adapter.channels)]

    # A LoRA of the user, on tensors that the generator changes too, before and after it.
    prefix = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    random = torch.Generator().manual_seed(5)
    lora = {
        f"{prefix}.lora_A.weight": torch.randn(2, 64, generator=random),
        f"{prefix}.lora_B.weight": torch.randn(64, 2, generator=random),
        "diffusion_model.input_blocks.0.0.lora_A.weight": torch.randn(2, 12, 3, 3, generator=random),
        "diffusion_model.input_blocks.0.0.lora_B.weight": torch.randn(64, 2, 1, 1, generator=random) * 0.1,
    }
    after, _ = comfy.sd.load_lora_for_models(model_a, None, dict(lora), 1.0, 1.0)
    first, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 1.0)
    first, vae_first = apply_node.execute(first, vae, "a.safetensors").result
    results["lora after"], results["lora before"] = upscaled(after, vae_a), upscaled(first, vae_first)
    report["lora survives"] = float((results["lora after"] - results["upscale"]).abs().max())

    settings = {"generator": "two sets.safetensors", "fidelity": 0.5}
    after, _ = comfy.sd.load_lora_for_models(fidelities[0.5][0], None, dict(lora), 1.0, 1.0)
    first, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 1.0)
    first, vae_first = apply_node.execute(first, vae, **settings).result
    results["two sets, lora after"] = upscaled(after, fidelities[0.5][1])
    results["two sets, lora before"] = upscaled(first, vae_first)
    report["lora survives both sets"] = float((results["two sets, lora after"] - results["fidelity 0.5"]).abs().max())

    # A conditioning overrides the generator's own embedding.
    own = model_a.get_attachment(description.ATTACHMENT).prompt_embedding[None]
    report["same conditioning"] = float(
        (upscaled(model_a, vae_a, conditioning=[[own, {}]]) - results["upscale"]).abs().max()
    )
    report["other conditioning"] = float(
        (upscaled(model_a, vae_a, conditioning=[[own + 3, {}]]) - results["upscale"]).abs().max()
    )

    # Out of memory above 64 px: the node goes on with smaller tiles.
    network = model_a.model.diffusion_model
    whole, attempts = network.forward, []

    def forward(x, *others, **named):
        attempts.append(x.shape[-1])
        if x.shape[-1] > 16:
            raise torch.OutOfMemoryError("too large for this test")
        return whole(x, *others, **named)

    network.forward = forward
    results["after oom"] = upscaled(model_a, vae_a, tile=256, overlap=32)
    error_of("out of memory", upscaled, model_a, vae_a, scale=1.0, tile=0)
    network.forward = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("always"))
    error_of("always out of memory", upscaled, model_a, vae_a)
    network.forward = whole
    report["attempts"] = attempts[:2]

    # A fourth channel: opaque, and with a hidden corner of two colours.
    results["upscale opaque"] = upscaled(model_a, vae_a, torch.cat([picture, torch.ones_like(picture[..., :1])], -1))
    alpha = torch.ones_like(picture[..., :1])
    alpha[:, :20, :20] = 0
    for name, hidden in (("upscale hidden", 0.0), ("upscale hidden too", 1.0)):
        results[name] = upscaled(model_a, vae_a, torch.cat([torch.where(alpha > 0, picture, hidden), alpha], -1))

    # Refusals at the door of every node that takes an IMAGE, and of what a CONDITIONING may hold.
    integers = (picture * 255).to(torch.uint8)
    error_of("integers", upscaled, model_a, vae_a, integers)
    error_of("integers as hint", upscaled, model_a, vae_a, control_net=control, hint=integers)
    error_of("integers to extract", part("nodes.conditions").ExtractCondition.execute, integers)
    error_of("integers to inspect", part("nodes.inspect_manifold").InspectManifold.execute, model, vae, integers)
    error_of("no picture", upscaled, model_a, vae_a, picture[:0])
    error_of("a mask", upscaled, model_a, vae_a, picture[..., 0])
    error_of("a number as model", upscaled, 1.0, vae_a)
    error_of("a number as vae", part("nodes.loaders").ApplyGenerator.execute, model, 1.0, "a.safetensors")
    error_of("a number as clip", part("nodes.loaders").ApplyGenerator.execute, model, vae, "a.safetensors", clip=1)
    error_of("a number as mask", upscaled, model_a, vae_a, mask=1.0)
    error_of("a text as vae", part("nodes.inspect_manifold").InspectManifold.execute, model, "vae", picture)
    prompt = torch.zeros(1, 77, 32)
    for name, found in (
        ("empty conditioning", []),
        ("two prompts", [[prompt, {}], [prompt, {}]]),
        ("a masked prompt", [[prompt, {"mask": torch.ones(1, 8, 8), "mask_strength": 1.0}]]),
        ("a weak prompt with a net", [[prompt, {"strength": 0.5, "control": object()}]]),
        ("an early prompt", [[prompt, {"start_percent": 0.0, "end_percent": 0.5}]]),
        ("a neutral prompt", [[prompt, {"strength": 1.0, "start_percent": 0.0, "pooled_output": None}]]),
    ):
        error_of(name, upscaled, model_a, vae_a, conditioning=found)

    # Refusals.
    error_of("no generator", upscaled, model, vae)
    error_of("second generator", apply_node.execute, model_a, vae_a, "b.safetensors")
    error_of("base's vae", upscaled, model_a, vae)
    error_of("other vae", upscaled, model_a, load(job / "four channels")[1])
    error_of("surplus", apply_node.execute, model, vae, "surplus.safetensors")
    error_of("surplus above", apply_node.execute, model, vae, "surplus above.safetensors", fidelity=0.0)
    error_of("fidelity of one set", apply_node.execute, model, vae, "a.safetensors", fidelity=0.95)
    error_of("fidelity beyond", apply_node.execute, model, vae, "two sets.safetensors", fidelity=2.5)
    single = replace(generator_file.load_generator(loaders.embedded_generator()), realistic={})
    loaders.load_generator = lambda path, name: replace(single, name=name)  # whatever the pack ships with
    error_of("fidelity of the embedded", loaders.LoadEmbedded.execute, fidelity=0.5)
    error_of("bare base at any fidelity", loaders.LoadEmbedded.execute, "none", fidelity=0.5)
    loaders.load_generator = generator_file.load_generator
    error_of("other shape", apply_node.execute, *load(job / "four channels"), "a.safetensors")
    error_of("conditioning", upscaled, model_a, vae_a, conditioning=[[torch.zeros(1, 77, 768), {}]])
    error_of("control_net alone", upscaled, model_a, vae_a, control_net=control)
    error_of("hint of 3 channels", upscaled, model_a, vae_a, control_net=control, hint=hint[..., :3])
    error_of("hint batch", upscaled, model_a, vae_a, control_net=control, hint=hint.expand(3, -1, -1, -1))
    wide = adapter_node.execute("wide.safetensors").result[0]
    error_of("adapter of another family", upscaled, model_a, vae_a, control_net=wide, hint=hint)
    error_of("no adapter", adapter_node.execute, "a.safetensors")
    error_of("a controlnet", upscaled, model_a, vae_a, control_net=comfy.controlnet.ControlNet(), hint=hint)
    error_of("tile", upscaled, model_a, vae_a, tile=100)
    damaged = load(job / "base")[0]
    damaged.set_attachments(description.ATTACHMENT, model_a.get_attachment(description.ATTACHMENT))
    damaged.model.diffusion_model.out[2].weight.fill_(float("nan"))
    error_of("nan in the unet", upscaled, damaged, vae_a)
    error_of("base with a missing tensor", load, job / "missing")

report["modules"] = [name for name in ("diffusers", "peft", "accelerate") if name in sys.modules]
save_file({key: value.contiguous() for key, value in results.items()}, job / "results.safetensors")
(job / "report.json").write_text(json.dumps(report, indent=1))
