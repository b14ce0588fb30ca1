"""The node that upscales."""

from __future__ import annotations

import logging
import time

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..icmsr_core.errors import IcmsrError
from ..icmsr_core.steps import Steps
from ..icmsr_core.upscale.framing import MAX_SCALE, MIN_SCALE
from ..icmsr_core.upscale.masking import checked_mask, plan_mask
from ..icmsr_core.upscale.one_step import run_plan
from ..icmsr_core.upscale.out_of_memory import TooLittleMemory, is_out_of_memory, retries_of, until_it_fits, words
from ..icmsr_core.upscale.plan import UpscalePlan
from ..icmsr_core.upscale.preview import LONGEST, Preview
from ..icmsr_core.upscale.settings import COLOR_FIXES, TILE_MULTIPLE, VAE_MODES, UpscaleSettings
from ..icmsr_core.upscale.sizes import resized_into
from ..icmsr_core.upscale.tile_choice import Automatic, change_for_memory, needed_memory, plan_for_memory
from .category import CATEGORY
from .native.backbone import ComfyBackbone
from .native.condition import AdapterFeatures, Condition, condition_inputs
from .native.core_objects import Conditioning, Model, Vae
from .native.sockets import check_image, check_sockets, check_values, to_image, visible_picture
from .sizes import size_inputs, size_settings

log = logging.getLogger(__name__)

SHARED = ("tile", "overlap", "color_fix")
"""Settings that are inputs here and that a generator may recommend."""

WORTH_A_WORD = 1.0
"""Gigabytes of a batch's results from which on the log says beforehand what they take."""


class Upscale(io.ComfyNode):
    """Upscales pictures in one diffusion step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_Upscale",
            display_name="ICM-SR Upscale",
            category=CATEGORY,
            description=(
                "Makes pictures larger and clearer in a single step. Large pictures run in tiles that blend without "
                "seams. The same picture and settings give the same result, unless memory runs short."
            ),
            search_aliases=["super resolution", "upscale", "restore", "real-isr", "enhance"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL from ICM-SR Load Embedded or ICM-SR Apply Generator."),
                io.Vae.Input("vae", tooltip="The VAE from the same node as the MODEL."),
                io.Image.Input(
                    "image", tooltip="The pictures to upscale, of any size. Several are upscaled one after another."
                ),
                io.Float.Input(
                    "scale",
                    default=UpscaleSettings.scale,
                    min=MIN_SCALE,
                    max=MAX_SCALE,
                    step=0.25,
                    tooltip="How many times wider and higher the result is. The models are trained for 4.",
                ),
                io.Int.Input(
                    "tile",
                    default=UpscaleSettings.tile,
                    min=0,
                    max=4096,
                    step=TILE_MULTIPLE,
                    tooltip=(
                        "Largest size of a tile, in pixels of the result: a multiple of 64. Smaller tiles need less "
                        "memory, and 0 runs the whole picture at once. Halved automatically when memory runs out."
                    ),
                ),
                io.Int.Input(
                    "overlap",
                    default=UpscaleSettings.overlap,
                    min=0,
                    max=2048,
                    step=16,
                    tooltip=(
                        "Neighbouring tiles overlap by at least this many pixels of the result, and are blended "
                        "there. At most half a tile; more takes longer."
                    ),
                ),
                io.Combo.Input(
                    "color_fix",
                    options=list(COLOR_FIXES),
                    default=UpscaleSettings.color_fix,
                    tooltip=(
                        "How the result gets the colours of your image. wavelet: its coarse colours, area by area. "
                        "adain: its average colour and contrast. none: the colours stay as the model made them."
                    ),
                ),
                io.Int.Input(
                    "tile_batch",
                    default=UpscaleSettings.batch,
                    min=0,
                    max=64,
                    tooltip=(
                        "How many tiles run at once. More is faster on a large graphics card and needs more memory. "
                        "0: as many as fit into free memory, up to 8 (on a CPU 1, because more would be slower)."
                    ),
                    advanced=True,
                ),
                *condition_inputs(
                    "A generator trained by ICM-SR has never seen a condition, so the result hardly changes."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="How strongly the adapter in control_net guides the result. 0 switches it off.",
                    advanced=True,
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "Optional: a prompt from CLIP Text Encode that replaces the generator's own. Only imported "
                        "generators without a prompt need it."
                    ),
                ),
                io.Combo.Input(
                    "vae_mode",
                    options=list(VAE_MODES),
                    default=UpscaleSettings.vae,
                    optional=True,
                    tooltip=(
                        "How the VAE treats large pictures. exact: the same result as without tiles; stops if memory "
                        "runs out. bounded: much less memory, with a very small difference. auto: exact for results "
                        "of up to 2048 x 2048 pixels if memory allows, otherwise bounded."
                    ),
                    advanced=True,
                ),
                *size_inputs(),
                io.Boolean.Input(
                    "authors_settings",
                    default=True,
                    optional=True,
                    tooltip=(
                        "On: where tile, overlap and color_fix are left at their defaults, those of the generator's "
                        "authors are used, and their smallest size and resizing, if the generator states them. Off: "
                        "what is set here."
                    ),
                    advanced=True,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Optional: upscale only where the mask is 1; elsewhere the result is the image, resized. One "
                        "mask for all images or one for each, of any size. A mask that is all 0 means the whole image."
                    ),
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The upscaled pictures.")],
        )

    @classmethod
    def execute(
        cls,
        model: Model,
        vae: Vae,
        image: torch.Tensor,
        scale: float = UpscaleSettings.scale,
        tile: int = UpscaleSettings.tile,
        overlap: int = UpscaleSettings.overlap,
        color_fix: str = UpscaleSettings.color_fix,
        tile_batch: int = UpscaleSettings.batch,
        control_net: object = None,
        hint: torch.Tensor | None = None,
        strength: float = 1.0,
        conditioning: Conditioning | None = None,
        vae_mode: str = UpscaleSettings.vae,
        longest: int = 0,
        shortest: int = 0,
        megapixels: float = 0.0,
        width: int = 0,
        height: int = 0,
        fit: str = UpscaleSettings.fit,
        authors_settings: bool = True,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        settings = UpscaleSettings(
            scale=scale,
            tile=tile,
            overlap=overlap,
            batch=tile_batch or 1,
            color_fix=color_fix,
            vae=vae_mode,
            **size_settings(longest, shortest, megapixels, width, height, fit),
        )
        check_image("image", image)
        check_sockets(model=model, vae=vae, mask=mask)
        maps = None if mask is None else checked_mask(mask, image.shape[0])
        condition = Condition.connected(control_net, hint, strength, image.shape[0])
        if strength == 0:
            condition = None
        if condition is not None:
            log.info(
                "control_net: a generator trained by ICM-SR has never seen a condition, so the result hardly changes"
            )
        with ComfyBackbone(model, vae, conditioning) as backbone:
            if authors_settings:
                changed = [name for name in SHARED if getattr(settings, name) != getattr(UpscaleSettings, name)]
                settings = settings.following(backbone.descriptor.recommended, changed)
            plan = _plan(backbone, image.shape[1], image.shape[2], settings)
            if tile_batch == 0:
                plan = plan.with_batch(backbone.tiles_together(plan.tiles))
            return io.NodeOutput(_Batch(backbone, image, plan, condition, maps).upscaled())


def _plan(backbone: ComfyBackbone, height: int, width: int, settings: UpscaleSettings) -> UpscalePlan:
    """The plan for these settings; says so where the VAE mode auto is bounded because exact does not fit."""
    descriptor, memory = backbone.descriptor, backbone.memory()
    plan = plan_for_memory(descriptor, height, width, settings, memory, Automatic(tile=False, batch=False))
    change = change_for_memory(descriptor, plan, settings, memory)
    if change is not None:
        log.warning("ICM-SR Upscale, %s", change)
    backbone.make_room_for(needed_memory(descriptor, plan.frame.work, plan.settings, memory))
    return plan


class _Batch:
    """The pictures of an IMAGE, upscaled one by one with one progress bar over the tiles of all.

    A picture that does not fit into memory is started again with smaller tiles, and so are those after it.
    """

    def __init__(
        self,
        backbone: ComfyBackbone,
        image: torch.Tensor,
        plan: UpscalePlan,
        condition: Condition | None,
        masks: torch.Tensor | None,
    ) -> None:
        """`masks` are those of `checked_mask`."""
        self._backbone, self._image, self._condition, self._masks = backbone, image, condition, masks
        self._plan = plan  # for the next picture
        self._features: AdapterFeatures | None = None
        self._bar = comfy.utils.ProgressBar(image.shape[0] * plan.steps)
        self._preview = Preview(self._show_picture)
        self._done = 0  # steps of the bar, for the pictures that are finished
        self._own_steps = 0  # those of the picture that runs

    def upscaled(self) -> torch.Tensor:
        """The results as one IMAGE, which is the only memory that grows with the batch."""
        started, count = time.perf_counter(), self._image.shape[0]
        height, width = self._plan.target
        channels = 4 if self._image.shape[-1] == 4 else 3
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        log.info("ICM-SR Upscale: %s, %s", pictures, self._plan.words())
        if self._masks is not None:
            masked = plan_mask(self._backbone.descriptor, self._plan, self._masks[:1])
            if masked is not None:
                log.info("ICM-SR Upscale: the mask of the first needs %s", masked.words(self._plan))
        gigabytes = count * height * width * channels * 4 / 1e9
        if count > 1 and gigabytes > WORTH_A_WORD:
            log.info("ICM-SR Upscale: the results of all %d pictures take %.1f GB of main memory", count, gigabytes)
        result = _empty_image(count, height, width, channels)
        check_values("image", self._image)
        for index in range(count):
            result[index] = self._upscale_until_it_fits(index)
            self._done += self._own_steps
        log.info("ICM-SR Upscale: %s in %.1f s", pictures, time.perf_counter() - started)
        return result

    def _upscale_until_it_fits(self, index: int) -> torch.Tensor:
        def again(failed: UpscalePlan, following: UpscalePlan) -> None:
            log.warning(
                "picture %d of %d: out of memory with %s: trying again with %s",
                index + 1,
                self._image.shape[0],
                words(failed.settings),
                words(following.settings),
            )
            self._plan = following
            self._features = None  # the kept ones are those of the larger tiles
            comfy.model_management.soft_empty_cache()

        def run(plan: UpscalePlan) -> torch.Tensor:
            return self._upscale(index, plan)

        retries = retries_of(self._backbone.descriptor, self._plan)
        try:
            return until_it_fits(run, self._plan, retries, again, _lacks_memory)
        except TooLittleMemory:
            comfy.model_management.unload_all_models()  # as core does for an error of its own kind
            raise

    def _upscale(self, index: int, plan: UpscalePlan) -> torch.Tensor:
        """The result [H', W', 3] of one picture."""
        condition = self._condition
        if condition is not None and (self._features is None or not condition.shared):
            self._features = condition.features(index, plan.frame, self._backbone)
        following = (self._image.shape[0] - index - 1) * plan.steps

        def show(done: int, own: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._own_steps = own  # with a mask, every picture has its own number
            self._bar.update_absolute(self._done + done, self._done + own + following)

        picture, alpha = visible_picture(self._image[index : index + 1])
        masks = self._masks
        upscaled = run_plan(
            self._backbone,
            picture,
            plan,
            steps=Steps(show),
            features=self._features,
            preview=self._preview,
            mask=masks if masks is None or len(masks) == 1 else masks[index : index + 1],
        )
        if alpha is not None:
            upscaled = torch.cat([upscaled, resized_into(alpha, plan.frame).to(upscaled)], dim=1)
        return to_image(upscaled)[0]

    def _show_picture(self, pixels: torch.Tensor) -> None:
        """Shows a preview, uint8 [h, w, 3], on the node; raises if the user has cancelled."""
        from PIL import Image

        bar = self._bar
        bar.update_absolute(bar.current, bar.total, ("JPEG", Image.fromarray(pixels.numpy()), LONGEST))


def _empty_image(count: int, height: int, width: int, channels: int) -> torch.Tensor:
    """An IMAGE [N, H, W, C] to be filled, on the device where core keeps the outputs of nodes."""
    shape = (count, height, width, channels)
    try:
        return torch.empty(shape, dtype=torch.float32, device=comfy.model_management.intermediate_device())
    except Exception as error:
        if not _lacks_memory(error):
            raise
        gigabytes = count * height * width * channels * 4 / 1e9
        raise IcmsrError(
            f"the result, {count} pictures of {width} x {height}, needs {gigabytes:.1f} GB of memory, which is more "
            "than is free: upscale fewer pictures at a time, or choose a smaller scale"
        ) from error


def _lacks_memory(error: Exception) -> bool:
    """Whether memory ran out, by our signs or by core's, which also clears what CUDA remembers of it."""
    return comfy.model_management.is_oom(error) or is_out_of_memory(error)
