"""The backbone of the library, the command line and training: diffusers' UNet2DConditionModel and AutoencoderKL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from ..backbone.context import repeated_context
from ..backbone.narrow_maps import mend_narrow_maps
from ..backbone.protocol import BackboneDescriptor
from ..backbone.vae_steps import Pointwise, VaeHalf, VaePart
from ..errors import IcmsrError
from ..upscale.free_memory import free_memory
from ..weights.base import BaseFolder
from ..weights.descriptions import shortened
from ..weights.file_kinds import AGAIN
from ..weights.generator_file import PARTS, Generator
from ..weights.merging import check_fit, merged_parameter
from ..weights.tiny_vae_file import TinyVae
from .compilation import compiled
from .diffusers_vae_steps import decoder_steps, encoder_steps
from .fixed_step import fix_step
from .ingredients import resolve
from .latents import decode_latent, encode_picture
from .precision import PRECISIONS, GuardedPart, dtype_name
from .recipe import Recipe
from .sliced_attention import slice_attention

_BUILDING = threading.Lock()
"""Held while networks are built: `init_empty_weights` leaves the parameters of all threads without data."""


class DiffusersBackbone:
    """`Backbone` over diffusers modules on one device; a part that overflows in 16 bits goes on in float32."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | AutoencoderTiny,
        descriptor: BackboneDescriptor,
        prompt_embedding: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if dtype not in PRECISIONS.values():
            raise IcmsrError(f"networks run in {', '.join(PRECISIONS)}, got {dtype_name(dtype)}")
        self._descriptor = descriptor
        self.device, self.dtype = device, dtype
        self.unet, self.vae = unet, vae
        # Module.to instead of the network's own: diffusers 0.42 warns about "modules ... in float32: []" at every cast.
        convert: Any = torch.nn.Module.to
        for network in (unet, vae):
            convert(network, device, dtype).eval().requires_grad_(False)
            slice_attention(network, device, dtype)
        outer = (None, None) if isinstance(vae, AutoencoderTiny) else (vae.quant_conv, vae.post_quant_conv)
        self._parts = {
            "encoder": GuardedPart("the VAE's encoder", (vae.encoder, outer[0]), dtype),
            "decoder": GuardedPart("the VAE's decoder", (vae.decoder, outer[1]), dtype),
            "unet": GuardedPart("the UNet", (unet,), dtype),
        }
        self._context = prompt_embedding.to(device, dtype)
        self._compiled: Callable[..., Any] | None = None
        self._fix_step()

    @property
    def descriptor(self) -> BackboneDescriptor:
        """See `Backbone`."""
        return self._descriptor

    def compile_unet(self) -> None:
        """Has torch.compile make code for every size of tile that comes from now on (`compilation`)."""
        self._compiled = compiled
        self._fix_step()

    def encode(self, image: Tensor) -> Tensor:
        """See `Backbone`. Like the other two, raises `IcmsrError` when the result is not finite even in float32."""

        def compute(dtype: torch.dtype) -> Tensor:
            return encode_picture(self.vae, image.to(self.device, dtype))

        return self._parts["encoder"].run(compute)

    def predict_noise(self, latent: Tensor, timestep: int, features: Sequence[Tensor] | None = None) -> Tensor:
        """See `Backbone`."""

        def compute(dtype: torch.dtype) -> Tensor:
            if self._context.dtype != dtype:  # constants computed from it are in the other precision too
                self._context = self._context.to(dtype)
                self._fix_step()
            # A new list for each call: diffusers empties it with pop(0), and a second call with the empty list would
            # silently run without the condition.
            residuals = None if features is None else [entry.to(self.device, dtype) for entry in features]
            given = latent.to(self.device, dtype)
            output = self.unet(
                given,
                timestep,  # an int: a tensor would have to be read back from the device
                encoder_hidden_states=repeated_context(self._context, given),
                down_intrablock_additional_residuals=residuals,
            )
            return output.sample.float()

        return self._parts["unet"].run(compute)

    def decode(self, latent: Tensor) -> Tensor:
        """See `Backbone`."""

        def compute(dtype: torch.dtype) -> Tensor:
            return decode_latent(self.vae, latent.to(self.device, dtype))

        return self._parts["decoder"].run(compute)

    def vae_half(self, part: VaePart, pixels: int) -> VaeHalf:
        """See `Backbone`. The steps raise `Widened` when 16 bits were not enough: call this again then."""
        factor, guard = self.vae.config.scaling_factor, self._parts[part]
        dtype, channels = guard.dtype, self._descriptor.latent_channels
        if part == "encoder":
            steps = (
                Pointwise(lambda image: image.to(dtype)),
                *encoder_steps(self.vae),
                Pointwise(lambda moments: guard.check(moments[:, :channels].float() * factor)),
            )
        else:
            # Cast, then scaled, as `decode` does: the other order would round differently.
            steps = (
                Pointwise(lambda latent: latent.to(dtype) / factor),
                *decoder_steps(self.vae),
                Pointwise(guard.check),
            )
        return VaeHalf(steps, self.device, self._room)

    def _fix_step(self) -> None:
        fix_step(self.unet, self._descriptor.timestep, self._context, self._compiled)

    def _room(self) -> float:
        free = None if self.device.type == "cpu" else free_memory(self.device)
        return float("inf") if free is None else free


def silence_diffusers() -> None:
    """Hides diffusers' advice to programmers (about `.to(dtype)`, for example); its errors still show."""
    diffusers_logging.set_verbosity_error()


def build_networks(
    base: BaseFolder, dtype: torch.dtype = torch.float32, generator: Generator | None = None
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """UNet and VAE of `base` in `dtype` on the CPU, strictly loaded, every parameter trainable.

    `generator` is merged in at its fidelity. The networks are built without weights and filled tensor by tensor: each
    is read, merged in float32 and cast, so the peak of memory is the two networks and a few tensors. Raises
    `IcmsrError` when a tensor of the base or the generator is missing, unexpected or of another shape.
    """
    with _BUILDING:
        networks = _build(base, PARTS, dtype, generator)
    return networks["unet"], networks["vae"]


def _build(base: BaseFolder, parts: Sequence[str], dtype: torch.dtype, generator: Generator | None) -> dict[str, Any]:
    kinds = {"unet": (UNet2DConditionModel, base.unet_config), "vae": (AutoencoderKL, base.vae_config)}
    networks: dict[str, Any] = {}
    for part in parts:
        kind, config = kinds[part]
        # Parameters only: buffers that no file holds get their values here.
        try:
            with init_empty_weights(include_buffers=False):
                networks[part] = kind.from_config(dict(config))
        except Exception as error:  # wrong values fail anywhere inside diffusers and torch
            reason = shortened(" ".join(str(error).split()), 200)
            raise IcmsrError(
                f"{base.where(part)}: no network can be built from its configuration ({reason}): {AGAIN}"
            ) from error
        if generator is not None:  # needs shapes only, so before the first tensor is read
            check_fit(generator, part, networks[part].state_dict())
    for part, network in networks.items():
        if generator is None:
            state = dict(base.tensors(part, dtype))
        else:
            state = _collected(_merged(base, generator, part), network.state_dict(), dtype)
        try:
            network.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            first_lines = " ".join(str(error).split()[:40])
            raise IcmsrError(f"{base.where(part)}: the weights do not fit the configuration: {first_lines}") from error
        mend_narrow_maps(network)
    return networks


def _tiny_vae(tiny: TinyVae, dtype: torch.dtype) -> AutoencoderTiny:
    """`tiny` built in `dtype`. Raises `IcmsrError` when its tensors do not fit its configuration."""
    # diffusers writes block_out_channels into its own files and warns about it when it reads them.
    config = {key: value for key, value in tiny.config.items() if key != "block_out_channels"}
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderTiny.from_config({"latent_channels": tiny.latent_channels, **config})
    try:
        vae.load_state_dict({key: value.to(dtype) for key, value in tiny.state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        first_lines = " ".join(str(error).split()[:40])
        raise IcmsrError(f"{tiny.path}: the weights do not fit an AutoencoderTiny: {first_lines}") from error
    mend_narrow_maps(vae)
    return vae


def _collected(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """`tensors` in `dtype`, each copied into memory that was allocated before the first was read.

    Otherwise the results lie between the temporaries of merging and memory fragments: at half of SD2.1's width the peak
    was twice the result.
    """
    places = {key: torch.empty(value.shape, dtype=dtype) for key, value in expected.items()}
    state = {}
    for key, tensor in tensors:
        place = places.get(key)
        state[key] = tensor if place is None or place.shape != tensor.shape else place.copy_(tensor)
    return state


def _merged(base: BaseFolder, generator: Generator, part: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `base` in float32, one at a time, with `generator` merged in."""
    for parameter, tensor in base.tensors(part, torch.float32):
        yield parameter, merged_parameter(generator, part, parameter, tensor)


def load_backbone(recipe: Recipe) -> DiffusersBackbone:
    """The networks of `recipe`, ready to run. Raises `IcmsrError` as `resolve`, and for weights that do not fit."""
    found = resolve(recipe)
    parts = PARTS if found.tiny_vae is None else ("unet",)
    with _BUILDING:
        networks = _build(found.base, parts, found.dtype, found.generator)
        vae = networks["vae"] if found.tiny_vae is None else _tiny_vae(found.tiny_vae, found.dtype)
        backbone = DiffusersBackbone(
            networks["unet"], vae, found.descriptor, found.prompt_embedding, found.device, found.dtype
        )
    if recipe.compile_unet:
        backbone.compile_unet()
    return backbone
