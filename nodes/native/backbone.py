"""MODEL and VAE seen as icmsr_core's Backbone. Core keeps its say: memory, precision, patches, attention, hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...icmsr_core.backbone.context import repeated_context
from ...icmsr_core.backbone.protocol import BackboneDescriptor
from ...icmsr_core.backbone.vae_steps import Pointwise, VaeHalf, VaePart
from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.upscale.tile_choice import batch_for
from ...icmsr_core.upscale.tiling import TilePlan
from .core_objects import Conditioning, Model, Patcher, Vae
from .description import ATTACHMENT, ModelDescription, describe
from .generator_patches import wrong_vae
from .vae_steps import decoder_steps, encoder_steps, is_tiny


class ComfyBackbone:
    """`Backbone` over core's objects; use it in a ``with`` statement, which ends the run on core's side.

    Only one network is asked for at a time, so that a card that holds one of them is enough.
    """

    def __init__(self, model: Model, vae: Vae, conditioning: Conditioning | None = None, *, bare: bool = False) -> None:
        """Checks that the parts belong together; loads nothing. Raises `IcmsrError` that says what to connect.

        With `bare` a MODEL without a generator will do: the base's own prior, a checkpoint of core's loaders included.
        """
        description: ModelDescription | None = describe(model) if bare else model.get_attachment(ATTACHMENT)
        if description is None or not (bare or description.generator):
            raise IcmsrError(
                "this MODEL carries no ICM-SR generator: put ICM-SR Apply Generator before this node, or take MODEL "
                "and VAE from ICM-SR Load Embedded with generator = embedded"
            )
        self._descriptor = description.descriptor
        if vae.latent_channels != self._descriptor.latent_channels:
            raise wrong_vae(vae.latent_channels, self._descriptor.latent_channels)
        if description.changes_vae and vae.patcher.get_attachment(ATTACHMENT) is not description:
            tiny = " (a tiny VAE cannot take the changes that it makes)" if is_tiny(vae.first_stage_model) else ""
            raise IcmsrError(
                f"the generator {description.generator!r} comes with a VAE of its own: "
                f"connect the VAE output of the same node as the MODEL{tiny}"
            )
        self._context = _context(model, description, conditioning)
        self._model, self._vae = model, vae
        config = model.model.model_config.unet_config
        self._layers: list[int] = list(config["num_res_blocks"])
        self._widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
        self._active: Patcher | None = None
        self._reserved, self._running = 0.0, False

    def __enter__(self) -> ComfyBackbone:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._model.cleanup()
            self._running = False

    @property
    def descriptor(self) -> BackboneDescriptor:
        """See `Backbone`."""
        return self._descriptor

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the UNet computes in."""
        return self._model.model.get_dtype_inference()

    def encode(self, image: Tensor) -> Tensor:
        """See `Backbone`; core's AutoencoderKL gives the posterior's mode."""
        vae = self._vae
        self._load(vae.patcher, image.shape[0] * vae.memory_used_encode(image.shape, vae.vae_dtype))
        latent = vae.first_stage_model.encode(image.to(vae.device, vae.vae_dtype)).float()
        return self._scaled(_finite(latent, "the VAE's encoder", vae.vae_dtype))

    def predict_noise(self, latent: Tensor, timestep: int, features: Sequence[Tensor] | None = None) -> Tensor:
        """See `Backbone`. Raises `IcmsrError` when the features are not of this UNet's widths."""
        patcher, network = self._model, self._model.model
        self._load(patcher, patcher.memory_required(list(latent.shape)))
        device, dtype = patcher.load_device, self.dtype
        self._context = self._context.to(device, dtype)  # copied once, and then left as it is
        given = latent.to(device, dtype)
        output = network.diffusion_model(
            given,
            torch.full((latent.shape[0],), float(timestep), device=device),
            context=repeated_context(self._context, given),
            control=None if features is None else self._control(latent, features),
            transformer_options=self._options(timestep),
        )
        return _finite(output.float(), "the UNet", dtype)

    def decode(self, latent: Tensor) -> Tensor:
        """See `Backbone`."""
        vae = self._vae
        self._load(vae.patcher, latent.shape[0] * vae.memory_used_decode(latent.shape, vae.vae_dtype))
        latent = self._model.model.process_latent_out(latent)
        image = vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype)).float()
        return _finite(image, "the VAE's decoder", vae.vae_dtype)

    def vae_half(self, part: VaePart, pixels: int) -> VaeHalf:
        """See `Backbone`."""
        vae, model, factor = self._vae, self._model.model, self._descriptor.latent_factor
        # Core's estimate for as many pixels as a stripe has: it depends on the area alone.
        if part == "encoder":
            self._load(vae.patcher, vae.memory_used_encode((1, 3, factor, pixels // factor), vae.vae_dtype))
            steps = (
                Pointwise(lambda image: image.to(vae.vae_dtype)),
                *encoder_steps(vae.first_stage_model, vae.device),
                Pointwise(lambda moments: moments.float()[:, : self._descriptor.latent_channels]),
                Pointwise(lambda latent: _finite(latent, "the VAE's encoder", vae.vae_dtype)),
                Pointwise(self._scaled),
            )
        else:
            cells = (1, self._descriptor.latent_channels, 1, pixels // factor**2)
            self._load(vae.patcher, vae.memory_used_decode(cells, vae.vae_dtype))
            steps = (
                Pointwise(lambda latent: model.process_latent_out(latent).to(vae.vae_dtype)),
                *decoder_steps(vae.first_stage_model, vae.device),
                Pointwise(lambda image: _finite(image.float(), "the VAE's decoder", vae.vae_dtype)),
            )
        return VaeHalf(steps, vae.device, lambda: _room(vae.device))

    def tiles_together(self, tiles: TilePlan) -> int:
        """How many of `tiles` to give to `predict_noise` at once: as many as fit by core's estimate, on a CPU 1.

        Memory is kept free for the part of the UNet that is not loaded yet.
        """
        patcher = self._model
        if comfy.model_management.is_device_cpu(patcher.load_device):
            return 1
        room = _room(patcher.load_device) - max(0, patcher.model_size() - patcher.loaded_size())
        rows, columns = tiles.boxes[0].rows, tiles.boxes[0].columns
        cells = [self._descriptor.latent_channels, rows.stop - rows.start, columns.stop - columns.start]
        return batch_for(len(tiles), lambda count: patcher.memory_required([count, *cells]) <= room)

    def _scaled(self, latent: Tensor) -> Tensor:
        """The VAE's latent, scaled for the UNet and on its device: with --cpu-vae that is another than the VAE's."""
        return self._model.model.process_latent_in(latent).to(self._model.load_device)

    def _load(self, patcher: Patcher, memory: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._active is patcher and memory <= self._reserved:
            return
        others = patcher.get_nested_additional_models()
        comfy.model_management.load_models_gpu([patcher, *others], memory_required=memory)
        self._active, self._reserved = patcher, memory
        if patcher is self._model and not self._running:
            patcher.pre_run()
            self._running = True

    def _options(self, timestep: int) -> dict[str, Any]:
        """The MODEL's transformer options as a sampler would pass them: a fresh copy, networks write into it."""
        options = comfy.utils.deepcopy_list_dict(self._model.model_options["transformer_options"])
        for name, own in (("wrappers", self._model.wrappers), ("callbacks", self._model.callbacks)):
            options[name] = comfy.patcher_extension.merge_nested_dicts(options.get(name, {}), own)
        sigmas = self._model.get_model_object("model_sampling").sigmas
        return {**options, "cond_or_uncond": [0], "sigmas": sigmas[timestep : timestep + 1]}

    def _control(self, latent: Tensor, features: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
        """Core's form of a T2I-Adapter's residuals, one for each level: a stack that the UNet pops block by block."""
        got = [tuple(feature.shape[1:]) for feature in features]
        height, width = latent.shape[-2:]
        wanted = [(channels, height >> level, width >> level) for level, channels in enumerate(self._widths)]
        if got != wanted:  # core itself logs a line and goes on without the condition
            raise IcmsrError(
                f"the control_net gives features {got}, this MODEL takes {wanted}: choose an adapter of its family"
            )
        blocks: list[Tensor | None] = []
        for layers, feature in zip(self._layers, features):
            blocks += [None] * layers + [feature.to(self._model.load_device, self.dtype)]
        return {"input": blocks[::-1]}


def _context(model: Model, description: ModelDescription, conditioning: Conditioning | None) -> Tensor:
    """The constant context [tokens, width]; a CONDITIONING goes before the generator's own."""
    width = model.model.model_config.unet_config["context_dim"]
    if conditioning is not None:
        context: Tensor | None = conditioning[0][0]
        if context is None or context.shape[-1] != width:
            got = "nothing" if context is None else f"{context.shape[-1]} values a token"
            raise IcmsrError(
                f"the conditioning holds {got}, this MODEL takes {width}: encode it with the text encoder of the same "
                "checkpoint, or leave the input free"
            )
        return context[0]
    if description.prompt_embedding is None:
        raise IcmsrError(
            f"the generator {description.generator!r} holds no prompt embedding: connect a conditioning "
            "(an empty prompt through CLIP Text Encode)"
        )
    return description.prompt_embedding


def _room(device: torch.device) -> float:
    """Bytes that whole maps may take on `device`; what core leaves free for other programs is not for them."""
    free = comfy.model_management.get_free_memory(device)
    return free - comfy.model_management.extra_reserved_memory()


def _finite(tensor: Tensor, part: str, dtype: torch.dtype) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise IcmsrError(
            f"{part} gave NaN or infinite values in {dtype}: its weights are damaged, or the precision is too low "
            "(start ComfyUI with --force-fp32 --fp32-vae)"
        )
    return tensor
