"""Nodes that bring weights: the embedded model, generator files, adapters."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..icmsr_core.weights.base import open_base
from ..icmsr_core.weights.embedded import EMBEDDED_FIDELITY, embedded_base, embedded_generator
from ..icmsr_core.weights.fidelity import MAX_FIDELITY
from ..icmsr_core.weights.generator_file import load_generator
from .category import CATEGORY
from .native.adapters import adapter_stamp, find_adapter, list_adapters, load_control_net
from .native.core_objects import Model, Vae
from .native.description import ATTACHMENT, ModelDescription
from .native.folders import EMBEDDED, FOLDER, file_stamp, find_file, list_files
from .native.generator_patches import apply_generator
from .native.models import load_unet, load_vae

log = logging.getLogger(__name__)

FIDELITY_RANGE = {"default": 1.0, "min": 0.0, "max": MAX_FIDELITY, "step": 0.05}
GENERATOR_FOLDERS = (FOLDER, "loras")
NO_ADAPTER = "none"


class LoadEmbedded(io.ComfyNode):
    """nano, the small model that ships with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_LoadEmbedded",
            display_name="ICM-SR Load Embedded",
            category=CATEGORY,
            description="Loads nano, the small super-resolution model that ships with the pack. No download.",
            search_aliases=["super resolution", "upscale model", "nano"],
            inputs=[
                io.Combo.Input(
                    "generator",
                    options=["embedded", "none"],
                    default="embedded",
                    tooltip=(
                        "embedded: ready for ICM-SR Upscale. none: the bare base, for a generator of your own through "
                        "ICM-SR Apply Generator."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "fidelity",
                    **{**FIDELITY_RANGE, "default": EMBEDDED_FIDELITY},
                    optional=True,  # prompts saved before it was there run as they did
                    tooltip=(
                        "0: trained by reconstruction alone, crisp. 1: with ICM as well, softer, with more faint "
                        "texture. Up to 2: more. Ignored when generator is none."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="nano's UNet, with its generator unless that is none."),
                io.Vae.Output(display_name="VAE", tooltip="nano's VAE. It belongs to this MODEL."),
            ],
        )

    @classmethod
    def execute(cls, generator: str = "embedded", fidelity: float = EMBEDDED_FIDELITY) -> io.NodeOutput:
        base = open_base(embedded_base())
        # Read first: nothing is built when the file is damaged.
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
    """A generator file over a base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_ApplyGenerator",
            display_name="ICM-SR Apply Generator",
            category=CATEGORY,
            description=(
                "Turns a base model into a one-step super-resolution generator, with a file of models/icmsr or "
                "models/loras. One generator per model; LoRAs of your own may stand before or after it."
            ),
            search_aliases=["super resolution", "one step", "lora"],
            inputs=[
                io.Model.Input("model", tooltip="The bare base that the generator was trained on."),
                io.Vae.Input("vae", tooltip="The VAE of the same base. Most generators change it too."),
                io.Combo.Input(
                    "generator",
                    options=[EMBEDDED, *list_files(*GENERATOR_FOLDERS)],
                    default=EMBEDDED,
                    tooltip="Generator files (.safetensors) in models/icmsr and models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the generator is applied. It was trained for 1.",
                    advanced=True,
                ),
                io.Float.Input(
                    "fidelity",
                    **FIDELITY_RANGE,
                    optional=True,
                    tooltip=(
                        "0: faithful to the image. 1: realistic, as trained. Up to 2: more. For a generator with both "
                        "sets of weights; leave it at 1 for others."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="A copy of the MODEL with the generator."),
                io.Vae.Output(display_name="VAE", tooltip="A copy of the VAE with the generator, for this MODEL."),
            ],
        )

    @classmethod
    def _path(cls, generator: str) -> Path:
        return embedded_generator() if generator == EMBEDDED else find_file(generator, *GENERATOR_FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, generator: str, **others: object) -> str:
        return file_stamp(cls._path(generator))

    @classmethod
    def execute(
        cls, model: Model, vae: Vae, generator: str, strength: float = 1.0, fidelity: float = 1.0
    ) -> io.NodeOutput:
        weights = load_generator(cls._path(generator), generator)
        patched = apply_generator(model, vae, weights, strength, fidelity)
        notes = weights.info.notes
        if notes:
            log.info("%s: %s", generator, notes)
        return io.NodeOutput(*patched, ui=ui.PreviewText(notes) if notes else None)


class LoadAdapter(io.ComfyNode):
    """A T2I-Adapter, or the pair of a colour and an edge adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = list_adapters()
        return io.Schema(
            node_id="ICMSR_LoadAdapter",
            display_name="ICM-SR Load Adapter",
            category=CATEGORY,
            description=(
                "Loads a T2I-Adapter for ICM-SR's condition (colours and edges), or a pair of them. Core's Load "
                "ControlNet Model would misread ICM-SR's own 4-channel files."
            ),
            search_aliases=["t2i adapter", "controlnet", "icm"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=files,
                    default=EMBEDDED,
                    tooltip=(
                        "nano's own, or T2I-Adapters of ICM-SR, diffusers or TencentARC in models/icmsr and "
                        "models/controlnet. For a diffusers folder choose the weights file in it."
                    ),
                ),
                io.Combo.Input(
                    "second_adapter",
                    options=[NO_ADAPTER, *(name for name in files if name != EMBEDDED)],
                    default=NO_ADAPTER,
                    optional=True,  # prompts saved before it was there run as they did
                    tooltip=(
                        "For the public pair of Stable Diffusion 1.5: the colour adapter in one input, the canny "
                        "adapter in the other. Their features are summed."
                    ),
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="CONTROL_NET",
                    tooltip="An ordinary CONTROL_NET, for ICM-SR Upscale or for core's Apply ControlNet.",
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
