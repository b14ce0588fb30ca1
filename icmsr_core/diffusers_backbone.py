"""The backbone of the library, the command line and training: diffusers' UNet2DConditionModel and AutoencoderKL."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from .backbone import BackboneDescriptor
from .base_folder import BaseFolder, open_base
from .embedded import embedded_base
from .errors import IcmsrError
from .generator_file import Generator, PartWeights, load_generator
from .merging import fidelity_to_use, merged_part, merged_tensors

log = logging.getLogger(__name__)


class DiffusersBackbone:
    """`Backbone` over diffusers modules, in one precision on one device."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        descriptor: BackboneDescriptor,
        prompt_embedding: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if dtype not in descriptor.dtypes:
            names = ", ".join(str(entry) for entry in descriptor.dtypes)
            raise IcmsrError(f"family {descriptor.family} runs in {names}, got {dtype}")
        self._descriptor = descriptor
        self.device, self.dtype = device, dtype
        self.unet, self.vae = unet, vae
        for network in (unet, vae):
            # Module.to and not the network's own: diffusers 0.42 warns of "modules ... in float32: []" at every cast.
            torch.nn.Module.to(network, device, dtype).eval().requires_grad_(False)
        self._context = prompt_embedding.to(device, dtype)[None]

    @property
    def descriptor(self) -> BackboneDescriptor:
        """See `Backbone`."""
        return self._descriptor

    def encode(self, image: Tensor) -> Tensor:
        """See `Backbone`."""
        posterior = self.vae.encode(image.to(self.device, self.dtype)).latent_dist
        return posterior.mode().float() * self.vae.config.scaling_factor

    def predict_noise(self, latent: Tensor, timestep: int, features: Sequence[Tensor] | None = None) -> Tensor:
        """See `Backbone`."""
        # A fresh list each call: diffusers consumes it with pop(0), and a second call with the emptied list would
        # run unconditioned without a word.
        residuals = None if features is None else [entry.to(self.device, self.dtype) for entry in features]
        output = self.unet(
            latent.to(self.device, self.dtype),
            torch.tensor(timestep, device=self.device),
            encoder_hidden_states=self._context.expand(latent.shape[0], -1, -1),
            down_intrablock_additional_residuals=residuals,
        )
        return output.sample.float()

    def decode(self, latent: Tensor) -> Tensor:
        """See `Backbone`."""
        return self.vae.decode(latent.to(self.device, self.dtype) / self.vae.config.scaling_factor).sample.float()


def silence_diffusers() -> None:
    """Keeps diffusers' advice to programmers (on `.to(dtype)`, say) out of a program's output; errors still show."""
    diffusers_logging.set_verbosity_error()


def build_networks(
    base: BaseFolder, dtype: torch.dtype = torch.float32
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """UNet and VAE of `base` in `dtype` on the CPU, strictly loaded, every parameter trainable.

    Built without weights and filled tensor by tensor, each cast as it is read: the peak of memory is the two networks
    and one tensor more. Raises `IcmsrError` when a tensor is missing, left over or of another shape.
    """
    networks = []
    for part, kind, config in (
        ("unet", UNet2DConditionModel, base.unet_config), ("vae", AutoencoderKL, base.vae_config)
    ):
        # Only the parameters are left out: a buffer that is no part of the file is computed here, or by nobody.
        with init_empty_weights(include_buffers=False):
            network = kind.from_config(dict(config))
        state = dict(base.tensors(part, dtype))
        try:
            network.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            first_lines = " ".join(str(error).split()[:40])
            raise IcmsrError(f"{base.path}/{part}: the weights do not fit the configuration: {first_lines}") from error
        networks.append(network)
    return networks[0], networks[1]


def merge_into(name: str, network: torch.nn.Module, weights: PartWeights, alpha: float, strength: float = 1.0) -> None:
    """Merges one set of weights into `network`'s parameters, in float32; see `merged_tensors` for the errors."""
    state = network.state_dict()
    merged = merged_tensors(name, weights, state, alpha, strength)
    network.load_state_dict({**state, **merged}, strict=True)


def merge_generator(
    name: str, network: torch.nn.Module, generator: Generator, part: str, fidelity: float | None = None
) -> None:
    """Merges `generator`'s ``unet`` or ``vae`` into `network`'s parameters; see `merged_part` for values and errors."""
    state = network.state_dict()
    network.load_state_dict({**state, **merged_part(name, generator, part, state, fidelity)}, strict=True)


def load_backbone(
    base: Path | None = None,
    generator: Path | Generator | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fidelity: float | None = None,
) -> DiffusersBackbone:
    """A base folder with a generator merged into it, ready to run.

    `base` defaults to the embedded nano; without `generator` the bare prior is loaded. `fidelity`, for a generator with
    a faithful and a realistic set of weights: 0 is faithful, 1 (the default) realistic, up to 2. Raises `IcmsrError`
    for files that are missing, damaged or of another family, and for a fidelity that is out of range or has no two sets
    to choose between.
    """
    folder = open_base(base or embedded_base())
    name = str(generator) if isinstance(generator, Path) else "generator"
    if isinstance(generator, Path):
        generator = load_generator(generator)
    fidelity_to_use(name, generator is not None and generator.has_two_sets, fidelity)  # before the networks
    descriptor = folder.descriptor(generator)
    embedding = generator.prompt_embedding if generator is not None else None
    if embedding is None:
        embedding = folder.prompt_embedding()
    if embedding is None:
        raise IcmsrError(f"{name}: neither the generator nor the base {folder.path} holds a prompt embedding")
    width = folder.unet_config["cross_attention_dim"]
    if embedding.shape[-1] != width:
        raise IcmsrError(
            f"{name}: its prompt embedding has width {embedding.shape[-1]}, the base {folder.path} takes {width}: "
            "choose files that belong together"
        )
    unet, vae = build_networks(folder)
    if generator is not None:
        if generator.info.base_hash and generator.info.base_hash != folder.hash():
            log.warning("%s was trained on other base weights than %s", name, folder.path)
        merge_generator(name, unet, generator, "unet", fidelity)
        merge_generator(name, vae, generator, "vae", fidelity)
    return DiffusersBackbone(unet, vae, descriptor, embedding, torch.device(device), dtype)
