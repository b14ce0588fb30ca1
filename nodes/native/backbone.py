"""MODEL and VAE as a Backbone of icmsr_core. Memory, precision, patches, attention and hooks stay with core."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import comfy.model_management
import torch
from torch import Tensor

from ...icmsr_core.backbone.context import repeated_context
from ...icmsr_core.backbone.protocol import BackboneDescriptor
from ...icmsr_core.backbone.vae_steps import Pointwise, VaeHalf, VaePart, Widened
from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.upscale.free_memory import free_memory, free_system_memory
from ...icmsr_core.upscale.tile_choice import FREE_SHARE, UNIFIED, DeviceMemory, Need, batch_for
from ...icmsr_core.upscale.tiling import TilePlan
from .core_objects import Conditioning, Model, Patcher, Vae
from .description import ATTACHMENT, ModelDescription, describe
from .float32 import model_in_float32, vae_in_float32
from .generator_patches import wrong_vae
from .prompt import check_conditioning
from .unet_pass import check_changes, run_unet
from .vae_steps import decoder_steps, encoder_steps, is_tiny

log = logging.getLogger(__name__)

UNET = "the UNet"
"""Its name in messages; the VAE has two parts."""


class ComfyBackbone:
    """`Backbone` over core's objects. Use it in a ``with`` statement, which tells core when the run ends.

    It asks core for one network at a time, so a card needs memory for the larger of the two only. A network that
    overflows in 16 bits goes on in float32.
    """

    def __init__(self, model: Model, vae: Vae, conditioning: Conditioning | None = None, *, bare: bool = False) -> None:
        """Checks that the parts belong together, without loading them. Raises `IcmsrError` if they do not.

        With `bare`, a MODEL without a generator is accepted too, also a checkpoint from core's loaders.
        """
        description: ModelDescription | None = describe(model) if bare else model.get_attachment(ATTACHMENT)
        if description is None or not (bare or description.generator):
            raise IcmsrError(
                "this MODEL has no ICM-SR generator: put ICM-SR Apply Generator before this node, or take MODEL and "
                "VAE from ICM-SR Load Embedded with generator = embedded"
            )
        self._descriptor = description.descriptor
        if vae.latent_channels != self._descriptor.latent_channels:
            raise wrong_vae(vae.latent_channels, self._descriptor.latent_channels)
        if description.changes_vae and vae.patcher.get_attachment(ATTACHMENT) is not description:
            tiny = " (a tiny VAE cannot be used with this generator)" if is_tiny(vae.first_stage_model) else ""
            raise IcmsrError(
                f"the generator {description.generator!r} changes the VAE too: connect the VAE output of the same node "
                f"as the MODEL{tiny}"
            )
        check_changes(model)
        self._prompt = _context(model, description, conditioning)
        self._context = self._prompt
        """The prompt where and as the UNet takes it."""
        self._model, self._vae = model, vae
        config = model.model.model_config.unet_config
        self._layers: list[int] = list(config["num_res_blocks"])
        self._widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
        self._active: Patcher | None = None
        self._card = ExitStack()
        """Until it is closed, the card of the network that was loaded last is torch's current one."""
        self._reserved, self._running = 0.0, False
        self._maps = 0.0

    def __enter__(self) -> ComfyBackbone:
        return self

    def __exit__(self, *exception: object) -> None:
        self._card.close()
        self._end_run()

    @property
    def descriptor(self) -> BackboneDescriptor:
        """See `Backbone`."""
        return self._descriptor

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the UNet computes in."""
        cast: torch.dtype | None = self._model.get_model_object("manual_cast_dtype")
        return self._model.model.get_dtype() if cast is None else cast

    def encode(self, image: Tensor) -> Tensor:
        """See `Backbone`; core's AutoencoderKL gives the posterior's mode. Errors as in `_overflowed`."""

        def compute() -> Tensor:
            vae = self._vae
            self._load(vae.patcher, image.shape[0] * vae.memory_used_encode(image.shape, vae.vae_dtype))
            latent: Tensor = vae.first_stage_model.encode(image.to(vae.device, vae.vae_dtype))
            return latent.float()

        return self._scaled(self._guarded("the VAE's encoder", compute))

    def predict_noise(self, latent: Tensor, timestep: int, features: Sequence[Tensor] | None = None) -> Tensor:
        """See `Backbone`. Raises `IcmsrError` when the features are not of this UNet's widths, and as `_overflowed`."""

        def compute() -> Tensor:
            patcher = self._model
            self._load(patcher, patcher.memory_required(list(latent.shape)))
            device, dtype = patcher.load_device, self.dtype
            self._context = self._context.to(device, dtype)  # copied once, and then left as it is
            given = latent.to(device, dtype)
            control = None if features is None else self._control(latent, features)
            return run_unet(patcher, given, timestep, repeated_context(self._context, given), control)

        return self._guarded(UNET, compute)

    def decode(self, latent: Tensor) -> Tensor:
        """See `Backbone`. Errors as in `_overflowed`."""

        def compute() -> Tensor:
            vae = self._vae
            self._load(vae.patcher, latent.shape[0] * vae.memory_used_decode(latent.shape, vae.vae_dtype))
            unscaled = self._model.model.process_latent_out(latent)
            image: Tensor = vae.first_stage_model.decode(unscaled.to(vae.device, vae.vae_dtype))
            return image.float()

        return self._guarded("the VAE's decoder", compute)

    def vae_half(self, part: VaePart, pixels: int) -> VaeHalf:
        """See `Backbone`. The steps raise `Widened` when 16 bits were not enough: call this again then."""
        vae, model, factor = self._vae, self._model.model, self._descriptor.latent_factor
        # Core's estimate for the area of a stripe; its shape makes no difference.
        if part == "encoder":
            self._load(vae.patcher, vae.memory_used_encode((1, 3, factor, pixels // factor), vae.vae_dtype))
            steps = (
                Pointwise(lambda image: image.to(vae.vae_dtype)),
                *encoder_steps(vae.first_stage_model, vae.device),
                Pointwise(lambda moments: moments.float()[:, : self._descriptor.latent_channels]),
                Pointwise(lambda latent: self._checked("the VAE's encoder", latent)),
                Pointwise(self._scaled),
            )
        else:
            cells = (1, self._descriptor.latent_channels, 1, pixels // factor**2)
            self._load(vae.patcher, vae.memory_used_decode(cells, vae.vae_dtype))
            steps = (
                Pointwise(lambda latent: model.process_latent_out(latent).to(vae.vae_dtype)),
                *decoder_steps(vae.first_stage_model, vae.device),
                Pointwise(lambda image: self._checked("the VAE's decoder", image.float())),
            )
        return VaeHalf(steps, vae.device, lambda: _room(vae.patcher, vae.device))

    def tiles_together(self, tiles: TilePlan) -> int:
        """How many of `tiles` fit into `predict_noise` at once, by core's estimate and free memory; 1 on a CPU."""
        patcher = self._model
        if comfy.model_management.is_device_cpu(patcher.load_device):
            return 1
        room = _room_once_loaded(patcher, patcher.load_device)
        rows, columns = tiles.boxes[0].rows, tiles.boxes[0].columns
        cells = [self._descriptor.latent_channels, rows.stop - rows.start, columns.stop - columns.start]
        return batch_for(len(tiles), lambda count: patcher.memory_required([count, *cells]) <= room)

    def memory(self) -> DeviceMemory:
        """The memory that there will be for the VAE at work, once core has unloaded what is not needed then."""
        device = self._vae.device
        if device.type in UNIFIED:
            return DeviceMemory(device.type, _room(self._vae.patcher, device), self._vae.vae_dtype.itemsize)
        free = _room_once_loaded(self._vae.patcher, device)
        return DeviceMemory(device.type, free, self._vae.vae_dtype.itemsize, free_system_memory())

    def make_room_for(self, need: Need) -> None:
        """Has core unload other networks for the whole maps of `need` when it loads the VAE, if they fit then."""
        memory = self.memory()
        fits = memory.free is not None and need.device + need.maps <= FREE_SHARE * memory.free
        self._maps = need.maps if fits and memory.kind not in UNIFIED else 0.0

    def _scaled(self, latent: Tensor) -> Tensor:
        """The VAE's latent, scaled for the UNet and on its device: with --cpu-vae that is another than the VAE's."""
        return self._model.model.process_latent_in(latent).to(self._model.load_device)

    def _guarded(self, part: str, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, the output of `part`; once more in float32 when it is not finite."""
        result = compute()
        if not self._overflowed(part, result):
            return result
        del result
        return self._checked(part, compute())

    def _checked(self, part: str, result: Tensor) -> Tensor:
        """`result` when it is finite; else raises `Widened`, or `IcmsrError` as `_overflowed`."""
        if self._overflowed(part, result):
            raise Widened(part)
        return result

    def _overflowed(self, part: str, result: Tensor) -> bool:
        """Whether `result` of `part` is not finite; if so, its network computes in float32 from now on.

        Raises `IcmsrError` when it did so before.
        """
        if bool(result.isfinite().all()):
            return False
        dtype = self.dtype if part == UNET else self._vae.vae_dtype
        if dtype == torch.float32:
            raise IcmsrError(
                f"{part} gave NaN or infinite values in float32: the weights of the MODEL, the VAE or the generator "
                "are damaged or do not belong together: choose others, or download them again"
            )
        log.warning(
            "%s gave NaN or infinite values in %s and runs in float32 for the rest of this run (ComfyUI's option %s "
            "starts with it)",
            part,
            str(dtype).removeprefix("torch."),
            "--fp32-unet" if part == UNET else "--fp32-vae",
        )
        if part == UNET:
            self._end_run()
            self._model, self._context = model_in_float32(self._model), self._prompt
        else:
            self._vae = vae_in_float32(self._vae)
        self._active = None
        return True

    def _load(self, patcher: Patcher, memory: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._active is patcher and memory <= self._reserved:
            return
        self._card.close()
        self._card.enter_context(_current_card(patcher.load_device))
        # Without the copies for other cards: samplers use them for the guidance, and there is none here.
        others = [other for other in patcher.get_nested_additional_models() if not other.is_multigpu_base_clone]
        maps = self._maps if patcher is self._vae.patcher else 0.0
        # With less than the minimum core loads a part of the weights only: for the maps it is to unload others.
        comfy.model_management.load_models_gpu(
            [patcher, *others], memory_required=memory + maps, minimum_memory_required=memory
        )
        self._active, self._reserved = patcher, memory
        if patcher is self._model and not self._running:
            patcher.pre_run()
            self._running = True

    def _end_run(self) -> None:
        if self._running:
            self._model.cleanup()
            self._running = False

    def _control(self, latent: Tensor, features: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
        """A T2I-Adapter's features, one per level, in core's form: a list from which each block pops an entry."""
        got = [tuple(feature.shape[1:]) for feature in features]
        height, width = latent.shape[-2:]
        wanted = [(channels, height >> level, width >> level) for level, channels in enumerate(self._widths)]
        if got != wanted:  # core would only log it and ignore the condition
            raise IcmsrError(
                f"this control_net is for another model (its features are {got}, this MODEL takes {wanted}): choose an "
                "adapter made for this MODEL"
            )
        blocks: list[Tensor | None] = []
        for layers, feature in zip(self._layers, features):
            blocks += [None] * layers + [feature.to(self._model.load_device, self.dtype)]
        return {"input": blocks[::-1]}


def _context(model: Model, description: ModelDescription, conditioning: Conditioning | None) -> Tensor:
    """The constant context [tokens, width]: that of the CONDITIONING if there is one, else the generator's own."""
    width = model.model.model_config.unet_config["context_dim"]
    if conditioning is not None:
        check_conditioning(conditioning)
        context: Tensor | None = conditioning[0][0]
        if context is None or context.shape[-1] != width:
            got = "no text" if context is None else f"{context.shape[-1]} values per token"
            raise IcmsrError(
                f"the conditioning holds {got}, this MODEL takes {width}: use the CLIP of the same checkpoint, or "
                "leave conditioning unconnected"
            )
        return context[0]
    if description.prompt_embedding is None:
        raise IcmsrError(
            f"the generator {description.generator!r} has no prompt of its own: connect CLIP of Load Checkpoint to "
            "clip of ICM-SR Apply Generator (an empty prompt will do), or CLIP Text Encode to conditioning"
        )
    return description.prompt_embedding


def _room(patcher: Patcher, device: torch.device) -> float:
    """Bytes that tensors may take on `device` next to the network of `patcher`, as it is loaded now.

    That is what is free and what core's dynamic loading gives back, without what core leaves to other programs.
    """
    if device.type == "cpu":
        return _known(free_memory(device))
    ask = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)  # missing in older versions
    # For MPS core asks the system alone, which knows nothing of Metal's limit.
    free = min(ask(device), _known(free_memory(device))) if device.type in UNIFIED else ask(device)
    return free - comfy.model_management.extra_reserved_memory()


def _room_once_loaded(patcher: Patcher, device: torch.device) -> float:
    """`_room` when all of the network is on `device`, and core has unloaded the others for it."""
    if device.type in UNIFIED:
        return _room(patcher, device)  # weights that are moved stay in the same memory
    others = [other for other in comfy.model_management.loaded_models() if other is not None]
    freed = sum(
        other.loaded_size()
        for other in others
        if other.load_device == device and not other.is_dynamic() and not other.is_clone(patcher)
    )
    return _room(patcher, device) + freed - max(0, patcher.model_size() - patcher.loaded_size())


def _known(free: float | None) -> float:
    return float("inf") if free is None else free


def _current_card(device: torch.device) -> AbstractContextManager[None]:
    """A block in which `device`, where it is a card of several, is CUDA's current one, as core's VAE and samplers do.

    Kernels that are not torch's own (core's for fp8) run on the current card, whatever they are given. Older versions
    of core have no function for it.
    """
    if not hasattr(comfy.model_management, "cuda_device_context"):
        return nullcontext()
    context: AbstractContextManager[None] = comfy.model_management.cuda_device_context(device)
    return context
