"""What the nodes use of core's objects: MODEL (a ModelPatcher), VAE and CONDITIONING."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="Patcher")

Conditioning = Sequence[Sequence[Any]]
"""Core's CONDITIONING: pairs of a context [N, tokens, width], or None, and options."""


class Patcher(Protocol):
    """ModelPatcher: a network, the patches on its weights, and where it is loaded."""

    load_device: torch.device
    """Where the network computes."""
    patches: dict[str, list[Any]]
    """By parameter name; core applies them in order when it loads the weights."""
    patches_uuid: uuid.UUID
    """Changes when the weights must be loaded again."""
    force_cast_weights: bool
    """Whether layers cast their weights to the precision of their input."""
    is_multigpu_base_clone: bool
    """Whether this is a copy for another card, which samplers use for the guidance."""
    cached_patcher_init: tuple[Callable[..., Any], tuple[Any, ...]] | None
    """Function and arguments that load the same weights again."""

    def clone(self: Self) -> Self:
        """A patcher of the same network with patches and attachments of its own."""

    def is_clone(self, other: Any) -> bool:
        """Whether `other` is a patcher of the same network."""

    def is_dynamic(self) -> bool:
        """Whether DynamicVRAM loads each weight only when it is used."""

    def get_attachment(self, key: str) -> Any:
        """What `set_attachments` put under `key`, or None."""

    def set_attachments(self, key: str, attachment: Any) -> None:
        """Makes `attachment` travel with this patcher and its clones."""

    def model_state_dict(self) -> dict[str, Tensor]:
        """The network's tensors by name."""

    def add_patches(
        self, patches: Mapping[str, Any], strength_patch: float = ..., strength_model: float = ...
    ) -> Sequence[str]:
        """Each named weight becomes `strength_model` * weight + `strength_patch` * patch. Returns the names found."""

    def get_nested_additional_models(self) -> list[Any]:
        """Other patchers that must be loaded together with this one."""

    def memory_required(self, input_shape: Sequence[int]) -> float:
        """Core's estimate in bytes of one pass, without the weights."""

    def model_size(self) -> int:
        """Bytes of the weights."""

    def loaded_size(self) -> int:
        """Bytes of the weights that are on the device."""

    def pre_run(self) -> None:
        """Tells hooks and other nodes that a run begins."""

    def cleanup(self) -> None:
        """Tells them that it ended."""


class DiffusionModel(Protocol):
    """Core's BaseModel: a UNet with its latent format."""

    model_config: Any
    latent_format: Any
    diffusion_model: nn.Module

    def get_dtype(self) -> torch.dtype:
        """The precision that the weights are kept in."""

    def process_latent_in(self, latent: Tensor) -> Tensor:
        """The VAE's latent, scaled for the UNet."""

    def process_latent_out(self, latent: Tensor) -> Tensor:
        """The UNet's latent, scaled back for the VAE."""


class Model(Patcher, Protocol):
    """MODEL: the patcher of a diffusion model."""

    model: DiffusionModel
    model_options: dict[str, Any]
    """``transformer_options`` for the UNet, and what other nodes set for samplers."""
    wrappers: dict[str, Any]
    callbacks: dict[str, Any]

    def get_model_object(self, name: str) -> Any:
        """A part of the model by its dotted name, such as model_sampling, as other nodes replaced it."""

    def set_model_compute_dtype(self, dtype: torch.dtype) -> None:
        """Lets the UNet compute in `dtype`, whatever its weights are kept in."""


class Clip(Protocol):
    """CLIP: a text encoder with its tokenizer."""

    def tokenize(self, text: str) -> Any:
        """Tokens with their weights."""

    def encode_from_tokens(self, tokens: Any) -> Tensor:
        """The context [1, tokens, width]."""


class Vae(Protocol):
    """VAE: an encoder and decoder with a patcher of their own."""

    patcher: Patcher
    first_stage_model: Any
    """The network: core's AutoencoderKL, TAESD or another kind."""
    device: torch.device
    """Where it computes."""
    vae_dtype: torch.dtype
    latent_channels: int

    def memory_used_encode(self, shape: Sequence[int], dtype: torch.dtype) -> float:
        """Core's estimate in bytes for one picture of a batch `shape` [N, 3, H, W]."""

    def memory_used_decode(self, shape: Sequence[int], dtype: torch.dtype) -> float:
        """Core's estimate in bytes for one latent of a batch `shape` [N, C, h, w]."""
