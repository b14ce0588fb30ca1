"""The networks of a distillation: who encodes, who denoises, who judges, over one base model.

With ``weights: lora`` one UNet and one VAE serve every role (`roles.Roles`). With ``weights: whole``, for small bases,
the generator is a copy of its own, trained in every tensor; the base stays the teacher, the auxiliary LoRA on it. With
``weights: decoder`` only the decoder of that copy is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbone.prediction import Prediction
from ...errors import IcmsrError
from ...runtime.latents import decode_latent, encode_picture
from ...weights.fidelity import check_fidelity
from ...weights.generator_file import Generator, PartWeights
from ...weights.merging import merge_into
from ..settings import ADDED
from .bases import BaseNetworks
from .decoders import DECODER_PARTS, in_decoder
from .roles import UNET_TARGETS, VAE_ENCODER_TARGETS, Role, Roles, predict

WEIGHTS = ("lora", "whole", "decoder")
BASE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class NetworksConfig:
    """Which weights the generator and the auxiliary train."""

    weights: str = "lora"
    """lora: low-rank updates of the UNet and the VAE's encoder. whole: every tensor, for small bases (nano). decoder:
    the VAE's decoder alone, for the finished generator `start`, whose latents and two sets of weights stay as they
    are."""
    rank: int = 4
    """LoRA rank of the generator, in the UNet and in the VAE's encoder; alpha equals it."""
    auxiliary_rank: int = 4
    """LoRA rank of the auxiliary."""
    start: str = ""
    """Generator file to begin from, of two sets of weights the faithful one (see `start_fidelity`). Whole weights go on
    from it, and so does the decoder. LoRA is laid on top of it, and exported as the realistic set of a file whose
    faithful set is this one.
    """
    continue_realistic: bool = field(default=False, metadata=ADDED)
    """With lora and `start`: go on from the realistic set of that file, whose LoRA must have this rank. False: a new
    realistic set begins."""
    start_fidelity: float = field(default=0.0, metadata=ADDED)
    """With whole weights: how much of the realistic set of `start` is merged before they go on, 0 to 2; 0 is its
    faithful set alone. With decoder: the fidelity at which it is trained."""
    start_base: str = field(default="", metadata=ADDED)
    """With whole weights and residual prediction: base folder that `start` was trained on, where the base's latent was
    normalised since (normalise_latent in train/prior.py). The start is moved into the new latent."""
    train_encoder: bool = field(default=True, metadata=ADDED)
    """Train the VAE's encoder too. False: the generator's input is encoded as the truth is, by the base's own encoder,
    and the VAE is frozen."""
    train_decoder: bool = False
    """With whole weights: train the decoder too. The latent then differs from the base's, which rules out ICM."""
    zero_output: bool = False
    """With whole weights: start from a UNet output of zero. With residual prediction the generator then begins as the
    plain autoencoder."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    base_dtype: str = "fp32"
    """Precision of the frozen base, fp32 or bf16; what is trained is float32 in either."""

    def __post_init__(self) -> None:
        for name, allowed in (("weights", WEIGHTS), ("base_dtype", tuple(BASE_DTYPES))):
            if getattr(self, name) not in allowed:
                raise IcmsrError(f"networks.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("rank", "auxiliary_rank"):
            if getattr(self, name) < 1:
                raise IcmsrError(f"networks.{name} must be at least 1, got {getattr(self, name)}")
        if self.weights != "lora" and self.base_dtype != "fp32":
            raise IcmsrError(
                f"networks.base_dtype must be fp32 with whole weights and with decoder, which are trained in it, got "
                f"{self.base_dtype} with {self.weights}"
            )
        for name in ("train_decoder", "zero_output"):
            if self.weights != "whole" and getattr(self, name):
                raise IcmsrError(f"networks.{name} is for networks.weights whole, got it with {self.weights}")
        if self.weights == "decoder" and not self.start:
            raise IcmsrError(
                "networks.weights decoder trains the decoder of a finished generator: set networks.start to its file"
            )
        for name, kinds in (("start_fidelity", ("whole", "decoder")), ("start_base", ("whole",))):
            if getattr(self, name) and (self.weights not in kinds or not self.start):
                raise IcmsrError(
                    f"networks.{name} is for networks.weights {' or '.join(kinds)} and goes with networks.start, got "
                    f"weights {self.weights} and start {self.start!r}"
                )
        check_fidelity(self.start_fidelity)
        if self.continue_realistic and (self.weights != "lora" or not self.start):
            raise IcmsrError(
                "networks.continue_realistic goes on from the realistic set of networks.start: set networks.weights to "
                "lora and networks.start to a generator file with two sets"
            )


class GeneratorNetworks(nn.Module):
    """Generator, teacher and auxiliary. Latents are scaled, pictures in [-1, 1]; results are float32."""

    def __init__(
        self,
        base: BaseNetworks,
        config: NetworksConfig,
        auxiliary: bool,
        start: Generator | None = None,
    ) -> None:
        """With `auxiliary`, LoRA for it is added to the base's UNet. `start` is the generator of
        `NetworksConfig.start`. Raises `IcmsrError` when that one does not fit the base."""
        super().__init__()
        unet, vae = base.unet.requires_grad_(False), base.vae.requires_grad_(False)
        self.unet, self.vae = unet, vae
        self.schedule, self.prior, self.config = base.info.schedule, base.info.prediction, config
        self.generator_unet, self.generator_vae, self.start = unet, vae, start
        whole = config.weights != "lora"
        if whole or start is not None:  # networks of its own, next to the teacher's
            self.generator_unet, self.generator_vae = copy.deepcopy(unet), copy.deepcopy(vae)
        if start is not None:
            chosen = start.at_fidelity(config.start_fidelity) if config.start_fidelity else start.faithful()
            for part, network in (("unet", self.generator_unet), ("vae", self.generator_vae)):
                merge_into(network, chosen, part)
        changed = () if start is None else (*start.vae.tensors, *start.vae.lora)
        self.own_decoder = config.train_decoder or config.weights == "decoder" or any(map(in_decoder, changed))
        """Whether the generator's decoder is, or becomes, another than the base's."""
        judges: dict[Role, int] = {"auxiliary": config.auxiliary_rank} if auxiliary else {}
        own: dict[Role, int] = {} if whole else {"generator": config.rank}
        shared = self.generator_unet is unet
        self.unet_roles = Roles(unet, {**own, **judges} if shared else judges, UNET_TARGETS)
        # With whole weights the generator's networks play no roles: switching the frozen ones has no effect on them.
        self.generator_roles = self.unet_roles if shared or whole else Roles(self.generator_unet, own, UNET_TARGETS)
        encoder = own if config.train_encoder else {}
        self.vae_roles = Roles(vae if whole else self.generator_vae, encoder, VAE_ENCODER_TARGETS)
        # The role in which the generator's encoder runs.
        self._encoder: Role = "generator" if encoder else "teacher"
        self._generator: Role = "teacher" if whole else "generator"  # the role in which the generator's networks run
        if config.continue_realistic and start is not None:
            for part, roles in (("unet", self.generator_roles), ("vae", self.vae_roles)):
                realistic = start.sets(part)[1]
                roles.load_lora("generator", realistic.lora, start.info.realistic_alpha / start.info.realistic_rank)
        if whole:
            self._train_whole()
        if config.checkpointing:
            for roles in {self.unet_roles, self.generator_roles, self.vae_roles}:
                roles.enable_checkpointing()
            if whole:
                for network in (self.generator_unet, self.generator_vae):
                    network.enable_gradient_checkpointing()

    def trained(self, player: str) -> dict[str, nn.Parameter]:
        """The parameters of ``generator`` or ``auxiliary``, by names that begin with ``unet.`` or ``vae.``."""
        if player == "auxiliary":
            parts: Mapping[str, Mapping[str, nn.Parameter]] = {"unet": self.unet_roles.parameters("auxiliary")}
        elif self.config.weights == "lora":
            roles = {"unet": self.generator_roles, "vae": self.vae_roles}
            parts = {part: entry.parameters("generator") for part, entry in roles.items()}
        else:
            networks = {"unet": self.generator_unet, "vae": self.generator_vae}
            parts = {
                part: {name: value for name, value in network.named_parameters() if value.requires_grad}
                for part, network in networks.items()
            }
        return {f"{part}.{name}": value for part, entries in parts.items() for name, value in entries.items()}

    def generator_weights(self) -> dict[str, PartWeights]:
        """What the generator changes in ``unet`` and ``vae``, as a generator file holds it; of two sets the one that is
        trained."""
        if self.config.weights == "lora":
            roles = {"unet": self.generator_roles, "vae": self.vae_roles}
            return {part: PartWeights(lora=entry.lora("generator")) for part, entry in roles.items()}
        tensors: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}}
        for name, value in self.trained("generator").items():
            part, parameter = name.split(".", 1)
            tensors[part][parameter] = value.detach().clone()
        if self.config.weights == "decoder" and self.start is not None:
            faithful = self.start.vae
            return {"unet": self.start.unet, "vae": PartWeights(faithful.lora, {**faithful.tensors, **tensors["vae"]})}
        return {part: PartWeights(tensors=changed) for part, changed in tensors.items()}

    def encode(self, picture: Tensor) -> Tensor:
        """The generator's latent of `picture` [N, 3, H, W]: the mode of its own encoder's posterior."""
        with self.vae_roles.use(self._encoder):
            return encode_picture(self.generator_vae, picture)

    @torch.no_grad()
    def encode_truth(self, picture: Tensor) -> Tensor:
        """The base's own latent of `picture`."""
        if self.vae is not self.generator_vae:
            return encode_picture(self.vae, picture)
        with self.vae_roles.use("teacher"):
            return encode_picture(self.vae, picture)

    def denoise(self, latent: Tensor, t: int, prediction: Prediction, context: Tensor) -> Tensor:
        """The generator's one step: the clean latent from `latent` at timestep `t`; `context` [N, tokens, width]."""
        steps = torch.full((latent.shape[0],), t, device=latent.device)
        with self.generator_roles.use(self._generator):
            output = predict(self.generator_unet, latent, steps, context, None)
        return self.schedule.x0_from_output(prediction, latent, output, t)

    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a scaled latent, in the generator's decoder."""
        with self.vae_roles.use("teacher"):  # the decoder carries no LoRA
            return decode_latent(self.generator_vae, latent)

    def noise(self, role: Role, noisy: Tensor, t: Tensor, context: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        """The noise that the teacher or the auxiliary sees in `noisy` at timesteps `t` [N], in eps form."""
        with self.unet_roles.use(role):
            output = predict(self.unet, noisy, t, context, features)
        return self.schedule.eps_from_output(self.prior, noisy, output, t)

    def _train_whole(self) -> None:
        decoder = self.config.weights == "decoder"
        self.generator_unet.requires_grad_(not decoder)
        self.generator_vae.requires_grad_(False)
        encoder = ("encoder", "quant_conv") if self.config.train_encoder and not decoder else ()
        parts = (*encoder, *(DECODER_PARTS if self.config.train_decoder or decoder else ()))
        for part in parts:
            module = getattr(self.generator_vae, part)
            if module is not None:  # a VAE may lack quant_conv
                module.requires_grad_(True)
        if self.config.zero_output and self.start is None:
            nn.init.zeros_(self.generator_unet.conv_out.weight)
            nn.init.zeros_(self.generator_unet.conv_out.bias)
