"""The nodes that load weights: the embedded model, generator files, adapters."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.foreign.conversion import load_any_generator, stored_dtype
from ..icmsr_core.foreign.told import Told
from ..icmsr_core.weights.base import open_base
from ..icmsr_core.weights.embedded import EMBEDDED_FIDELITY, embedded_base, embedded_generator
from ..icmsr_core.weights.fidelity import MAX_FIDELITY
from ..icmsr_core.weights.generator_file import load_generator, save_generator
from .category import CATEGORY
from .foreign_inputs import UNTOLD, foreign_inputs
from .native.adapters import adapter_stamp, find_adapter, list_adapters, load_control_net
from .native.core_objects import Clip, Model, Vae
from .native.description import ATTACHMENT, ModelDescription, describe
from .native.folders import EMBEDDED, FOLDER, LORAS, find_file, generator_stamp, list_generators
from .native.generator_patches import apply_generator
from .native.keys import native_layout
from .native.models import load_unet, load_vae
from .native.prompt import embed
from .native.sockets import check_sockets

log = logging.getLogger(__name__)

FIDELITY_RANGE = {"default": 1.0, "min": 0.0, "max": MAX_FIDELITY, "step": 0.05}
NO_ADAPTER = "none"


class LoadEmbedded(io.ComfyNode):
    """Loads nano, the small model that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_LoadEmbedded",
            display_name="ICM-SR Load Embedded",
            category=CATEGORY,
            description="Loads nano, the small upscaling model that comes with this node pack. Nothing is downloaded.",
            search_aliases=["super resolution", "upscale model", "nano"],
            inputs=[
                io.Combo.Input(
                    "generator",
                    options=["embedded", "none"],
                    default="embedded",
                    tooltip=(
                        "embedded: nano, ready for ICM-SR Upscale. none: only its base model, for ICM-SR Apply "
                        "Generator (with a generator file of your own) or ICM-SR Inspect Manifold."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "fidelity",
                    **{**FIDELITY_RANGE, "default": EMBEDDED_FIDELITY},
                    optional=True,  # workflows saved before this input existed still run
                    tooltip=(
                        "0: closest to your image. 1: more invented detail. Values between mix the "
                        "two, values up to 2 exaggerate. No effect when generator is none."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="nano's MODEL. Connect it to ICM-SR Upscale."),
                io.Vae.Output(display_name="VAE", tooltip="nano's VAE. It works only with this MODEL."),
            ],
        )

    @classmethod
    def execute(cls, generator: str = "embedded", fidelity: float = EMBEDDED_FIDELITY) -> io.NodeOutput:
        base = open_base(embedded_base())
        # Read first, so that a damaged file is reported before anything is built.
        weights = load_generator(embedded_generator(), EMBEDDED) if generator == "embedded" else None
        model, vae = load_unet(base), load_vae(base)
        description = ModelDescription(
            base.descriptor(), base.info.name, base.hash(), prompt_embedding=base.prompt_embedding()
        )
        model.set_attachments(ATTACHMENT, description)
        if weights is not None:
            model, vae = apply_generator(model, vae, weights, fidelity=fidelity)
        return io.NodeOutput(model, vae)


class ApplyGenerator(io.ComfyNode):
    """Applies a generator file to a base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_ApplyGenerator",
            display_name="ICM-SR Apply Generator",
            category=CATEGORY,
            description=(
                "Turns a Stable Diffusion model into a one-step upscaler, with a generator file, or with weights of "
                "OSEDiff, PiSA-SR, HYPIR or OMGSR-S as they are published. Use one generator per model. LoRAs of your "
                "own may come before or after this node."
            ),
            search_aliases=["super resolution", "one step", "lora"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model that the generator was made for, from Load Checkpoint (Stable Diffusion 1.5 or "
                        "2.1) or from ICM-SR Load Embedded with generator = none."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE from the same node as the model. Most generators change it too."),
                io.Combo.Input(
                    "generator",
                    options=[EMBEDDED, *list_generators()],
                    default=EMBEDDED,
                    tooltip=(
                        "A generator file, or published weights of OSEDiff, PiSA-SR, HYPIR or OMGSR-S, from "
                        "models/icmsr or models/loras. Of a folder, choose the weights file in it."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the generator is applied. Best at 1, the value that it was trained for.",
                    advanced=True,
                ),
                io.Float.Input(
                    "fidelity",
                    **FIDELITY_RANGE,
                    optional=True,
                    tooltip=(
                        "0: closest to your image. 1: more invented detail. Values between mix the two, values up to 2 "
                        "exaggerate. Only for generator files that hold both versions; leave it at 1 for others."
                    ),
                ),
                *foreign_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="A copy of the model with the generator. Connect it to ICM-SR Upscale.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="The VAE for this MODEL. Always use the two together."),
            ],
        )

    @classmethod
    def _path(cls, generator: str) -> Path:
        return embedded_generator() if generator == EMBEDDED else find_file(generator, FOLDER, LORAS)

    @classmethod
    def fingerprint_inputs(cls, generator: str, **others: object) -> str:
        return generator_stamp(cls._path(generator))

    @classmethod
    def execute(
        cls,
        model: Model,
        vae: Vae,
        generator: str,
        strength: float = 1.0,
        fidelity: float = 1.0,
        clip: Clip | None = None,
        prompt: str = "",
        family: str = UNTOLD,
        timestep: int = -1,
        prediction: str = UNTOLD,
        coeff_t: int = -1,
        save_converted: bool = False,
    ) -> io.NodeOutput:
        check_sockets(model=model, vae=vae, clip=clip)
        if prompt and clip is None:
            raise IcmsrError(
                f"the prompt {prompt!r} needs a text encoder: connect CLIP of Load Checkpoint to clip, or clear prompt"
            )
        told = Told(
            "" if family == UNTOLD else family,
            None if timestep < 0 else timestep,
            None if prediction == UNTOLD else prediction,
            None if coeff_t < 0 else coeff_t,
        )
        path, layouts = cls._path(generator), {describe(model).descriptor.family: native_layout(model, vae)}
        weights, found = load_any_generator(path, told, generator, layouts)
        said = [text for text in (found and f"{found}.", weights.info.notes) if text]
        if found and save_converted:
            converted = path.with_name(f"{path.stem}.icmsr.safetensors")
            save_generator(converted, weights, stored_dtype(weights))
            said.append(f"Wrote {converted.name} beside it, which loads faster: press R, then choose it.")
        if clip is not None:
            width = model.model.model_config.unet_config["context_dim"]
            weights = replace(weights, prompt_embedding=embed(clip, prompt, width))
        patched = apply_generator(model, vae, weights, strength, fidelity)
        notes = " ".join(said)
        if notes:
            log.info("%s: %s", generator, notes)
        return io.NodeOutput(*patched, ui=ui.PreviewText(notes) if notes else None)


class LoadAdapter(io.ComfyNode):
    """Loads a T2I-Adapter, or a colour and an edge adapter that work as a pair."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = list_adapters()
        return io.Schema(
            node_id="ICMSR_LoadAdapter",
            display_name="ICM-SR Load Adapter",
            category=CATEGORY,
            description=(
                "Loads a T2I-Adapter, a small network that guides a model with the colours and edges of a picture. Use "
                "this node for ICM-SR's own adapters: Load ControlNet Model misreads them."
            ),
            search_aliases=["t2i adapter", "controlnet", "icm"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=files,
                    default=EMBEDDED,
                    tooltip=(
                        "nano (embedded) is for nano. For other models, choose a T2I-Adapter from models/icmsr or "
                        "models/controlnet; of a diffusers folder, the weights file in it."
                    ),
                ),
                io.Combo.Input(
                    "second_adapter",
                    options=[NO_ADAPTER, *(name for name in files if name != EMBEDDED)],
                    default=NO_ADAPTER,
                    optional=True,  # workflows saved before this input existed still run
                    tooltip=(
                        "For a pair of adapters, such as the public ones for Stable Diffusion 1.5: one for colours, "
                        "one for canny edges, in any order. Otherwise none."
                    ),
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="CONTROL_NET",
                    tooltip=(
                        "Connect it to ICM-SR Upscale, ICM-SR Inspect Manifold or Apply ControlNet, with the hint from "
                        "ICM-SR Extract Condition."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str, second_adapter: str = NO_ADAPTER) -> str:
        return " ".join(adapter_stamp(name) for name in (adapter, second_adapter) if name != NO_ADAPTER)

    @classmethod
    def execute(cls, adapter: str, second_adapter: str = NO_ADAPTER) -> io.NodeOutput:
        second = None if second_adapter == NO_ADAPTER else find_adapter(second_adapter)
        return io.NodeOutput(load_control_net(find_adapter(adapter), second))
