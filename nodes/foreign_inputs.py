"""Inputs of a node for foreign weights: the prompt that they lack, and what their file does not say."""

from __future__ import annotations

from comfy_api.latest import io

from ..icmsr_core.backbone.prediction import PREDICTIONS
from ..icmsr_core.weights.sd_families import SD_FAMILIES

UNTOLD = "from the file"
"""The choice of a combo that says nothing."""


def foreign_inputs() -> list[io.Input]:
    """The optional inputs of ICM-SR Apply Generator for foreign weights, in the order of its `execute`."""
    return [
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip=(
                "CLIP of the same checkpoint. Foreign weights need it for their prompt; with other generators it "
                "replaces the file's own. A prompt in conditioning of ICM-SR Upscale goes first."
            ),
        ),
        io.String.Input(
            "prompt",
            default="",
            optional=True,
            tooltip="Text for clip. Most one-step models work best with none.",
        ),
        io.Combo.Input(
            "family",
            options=[UNTOLD, *sorted(SD_FAMILIES.values())],
            default=UNTOLD,
            optional=True,
            tooltip="Only for a LoRA of a one-step model that is not recognised: what it was trained on.",
            advanced=True,
        ),
        io.Int.Input(
            "timestep",
            default=-1,
            min=-1,
            max=999,
            optional=True,
            tooltip="Only for such a LoRA: the one timestep that it was trained for. -1: from the file.",
            advanced=True,
        ),
        io.Combo.Input(
            "prediction",
            options=[UNTOLD, *PREDICTIONS],
            default=UNTOLD,
            optional=True,
            tooltip="Only for such a LoRA: what the model's output means.",
            advanced=True,
        ),
        io.Int.Input(
            "coeff_t",
            default=-1,
            min=-1,
            max=999,
            optional=True,
            tooltip=(
                "The timestep of the last formula, HYPIR's coeff_t: lower than the generator's own is a weaker effect. "
                "-1: from the file."
            ),
            advanced=True,
        ),
        io.Boolean.Input(
            "save_converted",
            default=False,
            optional=True,
            tooltip="Foreign weights are converted when they are loaded. On: also write the result beside the file.",
            advanced=True,
        ),
    ]
