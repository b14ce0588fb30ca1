"""The node that upscales."""

from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.tiled_vae.tiled import VAE_MODES
from ..icmsr_core.upscale.color import COLOR_FIXES
from ..icmsr_core.upscale.one_step import (
    MAX_SCALE,
    MIN_SCALE,
    TILE_MULTIPLE,
    UpscaleSettings,
    count_tiles,
    make_plan,
    upscale,
)
from ..icmsr_core.upscale.sizes import padded_size
from .loaders import CATEGORY
from .native.adapter_features import AdapterFeatures, check_hint, condition_inputs
from .native.backbone import ComfyBackbone
from .native.sockets import to_image, to_pictures

log = logging.getLogger(__name__)

SMALLEST_TILE = 128
LARGEST_TILE_AFTER_NONE = 1024
"""Tile to try when the whole picture at once does not fit."""


class Upscale(io.ComfyNode):
    """One-step super-resolution."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_Upscale",
            display_name="ICM-SR Upscale",
            category=CATEGORY,
            description=(
                "Upscales pictures in one diffusion step, in tiles that blend without seams. The same picture and "
                "settings always give the same result."
            ),
            search_aliases=["super resolution", "upscale", "restore", "real-isr", "enhance"],
            inputs=[
                io.Model.Input("model", tooltip="From ICM-SR Load Embedded or ICM-SR Apply Generator."),
                io.Vae.Input("vae", tooltip="The VAE from the same node as the MODEL."),
                io.Image.Input("image", tooltip="Pictures of any size. A batch runs one after another."),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=MIN_SCALE,
                    max=MAX_SCALE,
                    step=0.25,
                    tooltip="Size of the result over size of the image. The models are trained for 4.",
                ),
                io.Int.Input(
                    "tile",
                    default=512,
                    min=0,
                    max=4096,
                    step=TILE_MULTIPLE,
                    tooltip=(
                        "Largest tile in pixels of the result, a multiple of 64. Smaller needs less memory; 0 takes "
                        "the whole picture at once. Halved on its own when memory runs out."
                    ),
                ),
                io.Int.Input(
                    "overlap",
                    default=128,
                    min=0,
                    max=2048,
                    step=16,
                    tooltip="Least overlap of neighbouring tiles in pixels of the result, at most half a tile.",
                ),
                io.Combo.Input(
                    "color_fix",
                    options=list(COLOR_FIXES),
                    default="wavelet",
                    tooltip=(
                        "Colours after the image: wavelet takes its low frequencies, adain its mean and contrast, none "
                        "leaves the model's."
                    ),
                ),
                io.Int.Input(
                    "tile_batch",
                    default=1,
                    min=0,
                    max=64,
                    tooltip=(
                        "Tiles that run together: faster on a large graphics card, for more memory. 0 takes as many as "
                        "fit into the memory that is free, up to 8; one on a CPU, where more are slower."
                    ),
                    advanced=True,
                ),
                *condition_inputs(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="For control_net: how strongly the condition acts. 0 switches it off.",
                    advanced=True,
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Optional: replaces the constant prompt embedding of the generator.",
                ),
                io.Combo.Input(
                    "vae_mode",
                    options=list(VAE_MODES),
                    default="auto",
                    optional=True,
                    tooltip=(
                        "exact: as if the VAE saw the whole picture at once. bounded: its memory is set by the tile, "
                        "for a small difference. auto: exact up to the area of 2048 x 2048 pixels of the result."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The upscaled pictures.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image: torch.Tensor,
        scale: float = 4.0,
        tile: int = 512,
        overlap: int = 128,
        color_fix: str = "wavelet",
        tile_batch: int = 1,
        control_net=None,
        hint: torch.Tensor | None = None,
        strength: float = 1.0,
        conditioning=None,
        vae_mode: str = "auto",
    ) -> io.NodeOutput:
        settings = UpscaleSettings(
            scale=scale, tile=tile, overlap=overlap, batch=tile_batch or 1, color_fix=color_fix, vae=vae_mode
        )
        check_hint(control_net, hint, image.shape[0])
        if strength == 0:
            control_net = hint = None
        with ComfyBackbone(model, vae, conditioning) as backbone:
            if tile_batch == 0:
                size = settings.target_size(*image.shape[1:3])
                plan = make_plan(backbone, *padded_size(*size, backbone.descriptor), settings)
                settings = replace(settings, batch=backbone.tiles_together(plan))
            return io.NodeOutput(_upscale_batch(backbone, image, settings, control_net, hint, strength))


def _upscale_batch(
    backbone: ComfyBackbone,
    image: torch.Tensor,
    settings: UpscaleSettings,
    control_net,
    hint: torch.Tensor | None,
    strength: float,
) -> torch.Tensor:
    """The result for every picture of the IMAGE, each on its own, with one progress bar over all their tiles.

    The result is one tensor from the start, so that beside it memory holds one picture at a time. A picture that does
    not fit is begun again with smaller tiles, which the rest of the batch keeps; those before it stand.
    """
    count, height, width = image.shape[:3]
    result = _empty_image(count, *settings.target_size(height, width))
    _check_finite(image)
    bar, before = comfy.utils.ProgressBar(count), 0
    features: AdapterFeatures | None = None
    for index in range(count):
        picture = to_pictures(image[index : index + 1])
        while True:
            tiles = count_tiles(backbone, height, width, settings)
            total = before + (count - index) * tiles
            if control_net is not None and (features is None or hint.shape[0] > 1):
                features = AdapterFeatures(
                    control_net,
                    hint[index : index + 1].movedim(-1, 1),
                    settings.target_size(height, width),
                    backbone.descriptor.multiple_of,
                    strength=strength,
                    dtype=backbone.dtype,
                    keep=hint.shape[0] == 1 and count > 1,
                )

            def progress(done: int, _own: int, before: int = before, total: int = total) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(before + done, total)

            try:
                result[index] = to_image(upscale(backbone, picture, settings, progress=progress, features=features))[0]
                break
            except Exception as error:
                comfy.model_management.raise_non_oom(error)
                smaller = _smaller(settings)
                if smaller is None:
                    raise
            # Out of the except block, where the error no longer holds the tensors that did not fit.
            log.warning(
                "picture %d of %d: out of memory with %s: trying again with %s",
                index + 1,
                count,
                _words(settings),
                _words(smaller),
            )
            settings, features = smaller, None  # what is kept of an adapter belongs to the larger tiles
            comfy.model_management.soft_empty_cache()
        before += tiles
    return result


def _check_finite(image: torch.Tensor) -> None:
    """Looks at a whole batch before its first picture is computed, one at a time: a video's last frame comes late."""
    for index in range(image.shape[0]):
        if not bool(image[index, ..., :3].isfinite().all()):
            raise IcmsrError(
                f"image: NaN or infinite values in picture {index + 1} of {image.shape[0]}: mend the step that made it"
            )


def _empty_image(count: int, height: int, width: int) -> torch.Tensor:
    """An IMAGE [N, H, W, 3] to be filled, where core keeps what passes between nodes."""
    try:
        return torch.empty(
            (count, height, width, 3), dtype=torch.float32, device=comfy.model_management.intermediate_device()
        )
    except RuntimeError as error:
        gigabytes = count * height * width * 12 / 1e9
        raise IcmsrError(
            f"the result, {count} pictures of {width} x {height}, needs {gigabytes:.1f} GB of memory, more than is "
            "free: upscale fewer pictures at a time or at a smaller scale"
        ) from error


def _smaller(settings: UpscaleSettings) -> UpscaleSettings | None:
    """Settings that need less memory: first one tile at a time, then half the tile; None when there is no less."""
    if settings.batch > 1:
        return replace(settings, batch=1)
    tile = settings.tile // 2 // TILE_MULTIPLE * TILE_MULTIPLE if settings.tile else LARGEST_TILE_AFTER_NONE
    if tile < SMALLEST_TILE:
        return None
    return replace(settings, tile=tile, overlap=min(settings.overlap, tile // 4))


def _words(settings: UpscaleSettings) -> str:
    return f"tile {settings.tile}, {settings.batch} at a time"
