"""The node that shows what a diffusion model makes of a noised picture, with a condition and without."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.pictures.channels import as_rgb
from ..icmsr_core.pictures.ranges import unit_to_signed
from ..icmsr_core.steps import Steps
from ..icmsr_core.upscale.framing import scaled_frame
from ..icmsr_core.upscale.sizes import pad_to_multiple, resize
from ..icmsr_core.upscale.tiling import plan_tiles
from .category import CATEGORY
from .native.backbone import ComfyBackbone
from .native.condition import Condition, condition_inputs
from .native.core_objects import Conditioning, Model, Vae
from .native.description import ModelDescription, describe
from .native.sockets import check_image, check_sockets, check_values, to_image, to_pictures

if TYPE_CHECKING:
    from ..icmsr_core.pictures.files import FloatArray

log = logging.getLogger(__name__)

LONGEST_SIDE = 512
"""Longest side of a picture in the grid, in pixels: the size that the bases are trained on. Larger ones are shrunk."""
MOST_TIMESTEPS = 16
"""Most columns of a grid."""


class InspectManifold(io.ComfyNode):
    """Shows the clean estimates of a diffusion model as a labelled grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_InspectManifold",
            display_name="ICM-SR Inspect Manifold",
            category=CATEGORY,
            description=(
                "Adds noise to a picture and shows what a diffusion model makes of it, without an adapter and with "
                "one: how well the adapter keeps the picture when noise hides it. Upscaling does not need this node."
            ),
            search_aliases=["teacher", "clean estimate", "x0", "icm"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A model without a generator: from ICM-SR Load Embedded with generator = none, or from Load "
                        "Checkpoint (Stable Diffusion 1.5 or 2.1)."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE from the same node as the model."),
                io.Image.Input(
                    "image",
                    tooltip=(
                        f"A sharp picture. Larger ones are shrunk to {LONGEST_SIDE} pixels. Several pictures get a "
                        "grid each."
                    ),
                ),
                io.String.Input(
                    "timesteps",
                    default="200, 500, 800",
                    tooltip=(
                        f"1 to {MOST_TIMESTEPS} noise levels, separated by commas, from 0 (hardly any noise) to 999 "
                        "(hardly any picture)."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Chooses the random noise, the same at all noise levels, with the adapter and without.",
                ),
                *condition_inputs(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="How strongly the adapter in control_net guides the model.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="A prompt from CLIP Text Encode; it may be empty. Checkpoints need one, nano has its own.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip=(
                        "One grid for each picture, with a column for each noise level. The dB numbers (PSNR) say how "
                        "close an estimate is to your picture: higher is closer."
                    ),
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Model,
        vae: Vae,
        image: Tensor,
        timesteps: str = "200, 500, 800",
        seed: int = 0,
        control_net: object = None,
        hint: Tensor | None = None,
        strength: float = 1.0,
        conditioning: Conditioning | None = None,
    ) -> io.NodeOutput:
        check_image("image", image)
        check_values("image", image)
        check_sockets(model=model, vae=vae)
        levels = NoiseLevels(parse_timesteps(timesteps), seed)
        condition = Condition.connected(control_net, hint, strength, image.shape[0])
        description = describe(model)
        _check_prior(description, conditioning is not None)
        for t in levels.timesteps:
            description.descriptor.schedule.check_timestep(t)
        pictures = to_pictures(image)
        size = _size_to_show(*pictures.shape[-2:])
        label = "truth" if size == pictures.shape[-2:] else "truth, shrunk"
        rows = 1 if condition is None else 2
        total = len(pictures) * rows * len(levels.timesteps)
        steps = Steps(comfy.utils.ProgressBar(total).update_absolute)
        steps.begin(total)
        grids = []
        with ComfyBackbone(model, vae, conditioning, bare=True) as backbone:
            for index, picture in enumerate(pictures.split(1)):
                view = PriorView(backbone, resize(picture, *size), levels, steps)
                grids.append(view.grid(label, condition, index))
        return io.NodeOutput(to_image(torch.cat(grids)))


@dataclass(frozen=True)
class NoiseLevels:
    """How a picture is noised."""

    timesteps: tuple[int, ...]
    """One for each column of the grid."""
    seed: int
    """Of the noise, which is the same at all timesteps."""


def parse_timesteps(text: str) -> tuple[int, ...]:
    """The whole numbers in `text`, separated by commas or spaces; `IcmsrError` for anything else, none or too many."""
    words = text.replace(",", " ").split()
    if not 1 <= len(words) <= MOST_TIMESTEPS or not all(word.isascii() and word.isdigit() for word in words):
        raise IcmsrError(
            f"timesteps must be 1 to {MOST_TIMESTEPS} whole numbers separated by commas, got {text!r}: "
            "try 200, 500, 800"
        )
    return tuple(map(int, words))


def _check_prior(description: ModelDescription, prompted: bool) -> None:
    if description.descriptor.prediction == "residual":
        raise IcmsrError(
            f"this MODEL carries the generator {description.generator!r}, which upscales in one step and cannot remove "
            "noise: connect the model without it (ICM-SR Load Embedded with generator = none, or Load Checkpoint)"
        )
    if description.prompt_embedding is None and not prompted:
        raise IcmsrError(
            f"the {description.base} has no prompt of its own: connect CLIP Text Encode to conditioning (an empty "
            "prompt will do)"
        )


def _size_to_show(height: int, width: int) -> tuple[int, int]:
    """Height and width, shrunk so that no side is above `LONGEST_SIDE`; shrinking is logged."""
    factor = LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return height, width
    shown = max(1, round(height * factor)), max(1, round(width * factor))
    log.info("ICM-SR Inspect Manifold shows %d x %d pixels, shrunk from %d x %d", *shown[::-1], width, height)
    return shown


class PriorView:
    """One picture [1, 3, H, W] in [0, 1] as the prior of `backbone` sees it through noise."""

    def __init__(self, backbone: ComfyBackbone, picture: Tensor, levels: NoiseLevels, steps: Steps) -> None:
        # These modules import OpenCV, so only when it is needed.
        from ..icmsr_core.measures.manifold import seeded_noise

        self._backbone, self._picture, self._timesteps, self._steps = backbone, picture, levels.timesteps, steps
        self._size: tuple[int, int] = (picture.shape[2], picture.shape[3])
        self._latent = backbone.encode(unit_to_signed(pad_to_multiple(picture, backbone.descriptor.multiple_of)))
        self._noise = seeded_noise(self._latent, levels.seed)

    def grid(self, label: str, condition: Condition | None, index: int) -> Tensor:
        """The grid [1, 3, h, w]; the picture has the number `index` of its batch and is called `label`."""
        from ..icmsr_core.measures.manifold import manifold_grid
        from ..icmsr_core.pictures.files import from_tensor, to_tensor

        schedule = self._backbone.descriptor.schedule
        latents = {
            "noised": [schedule.add_noise(self._latent, self._noise, t) for t in self._timesteps],
            "no condition": self._estimates(None),
        }
        maps = {"noised": {"its latent, decoded": self._decoded(self._latent)}}
        if condition is not None:
            features = condition.features(index, scaled_frame(self._size, 1), self._backbone)
            whole = plan_tiles(*self._latent.shape[-2:], max(self._latent.shape[-2:]), 0)
            latents["with condition"] = self._estimates(features(whole.boxes))
            shown = _shown(condition.hint_of(index), *self._size)
            maps["with condition"] = {name: from_tensor(picture) for name, picture in shown.items()}
        rows = {name: [self._decoded(one) for one in some] for name, some in latents.items()}
        return to_tensor(manifold_grid(from_tensor(self._picture), self._timesteps, rows, maps, label))

    def _estimates(self, features: list[Tensor] | None) -> list[Tensor]:
        """The clean estimate of the picture's latent at each timestep."""
        from ..icmsr_core.measures.manifold import clean_estimates

        found = []
        for t in self._timesteps:
            found += clean_estimates(self._backbone, self._latent, [t], self._noise, features)
            self._steps.advance()
        return found

    def _decoded(self, latent: Tensor) -> FloatArray:
        from ..icmsr_core.measures.manifold import decoded_pictures

        height, width = self._size
        return decoded_pictures(self._backbone, latent)[0][:height, :width]


def _shown(hint: Tensor, height: int, width: int) -> dict[str, Tensor]:
    """The parts of a hint [1, C, H, W] as pictures [1, 3, height, width], by name."""
    hint = torch.nn.functional.interpolate(hint.float().clamp(0, 1), (height, width), mode="nearest-exact")
    if hint.shape[1] == 4:
        return {"colormap": as_rgb(hint), "edges": as_rgb(hint[:, 3:])}
    return {"hint": as_rgb(hint)}
