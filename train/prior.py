"""Trains a small base model from photographs: an autoencoder, then a diffusion prior in its latent.

    python train/prior.py --config train/configs/nano_autoencoder.yaml
    python train/prior.py --config train/configs/nano_prior.yaml

With ``autoencoder_only`` the first half alone, with ``start`` the second alone, in the latent of a base that stands.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.latents import CachedLatents, LatentCacheConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.data.samples import Samples
from icmsr_core.train.networks.bases import BaseNetworks, NetworkConfig, make_unet, make_vae, save_base
from icmsr_core.train.networks.decoders import exchange_decoder
from icmsr_core.train.run.launch import Stage, Training, run_script, run_training
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.plan import PlannedStage
from icmsr_core.train.run.processes import Processes
from icmsr_core.train.settings import FREE, UNRECORDED
from icmsr_core.train.tasks.autoencoder import AutoencoderLosses, AutoencoderTask, normalise_latent
from icmsr_core.train.tasks.prior import PriorTask
from icmsr_core.weights.base import BaseInfo, default_prompt_embedding, open_base

HELD_OUT_CROPS = 192
"""Crops of held-out photographs on which the prior's error is measured."""
NORMALISED_OVER = 256
"""Samples whose latents are made to have mean 0 and deviation 1."""


@dataclass(frozen=True)
class Config:
    """A base model from scratch: RUN/autoencoder, then RUN/prior, whose `base` folder is the result."""

    run: str = field(metadata=FREE)
    """Run folder; the same command resumes it."""
    name: str = "nano"
    """Name of the base."""
    family: str = "nano"
    """Family that generator files will refer to."""
    licence: str = "Apache-2.0"
    """Licence of the weights (SPDX)."""
    start: str = ""
    """Base folder to go on from: its autoencoder is kept as it is, and `networks` describes the UNet alone."""
    fresh_unet: bool = False
    """With start: a UNet from scratch, in the shape of `networks`, instead of the base's own."""
    decoder: str = ""
    """With start: base folder whose decoder the result gets, for the same encoder: distillation trains such a one."""
    normalise_latent: bool = False
    """With start: give every latent channel mean 0 and deviation 1 first, as in a new autoencoder. Generators and
    adapters of that base do not fit the result."""
    autoencoder_only: bool = False
    """Stop after the autoencoder: RUN/autoencoder/base then has a UNet of random weights, as a generator with
    networks.zero_output may begin from."""
    device: str = field(default="auto", metadata=FREE)
    """auto, cpu, cuda, cuda:1, ... (several processes: what accelerate gives each)."""
    dry_run: bool = field(default=False, metadata=UNRECORDED)
    """Check everything, print the plan with parameters and memory, and train nothing."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pictures."""
    latents: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    """Train the UNet on latents that are encoded once, before it starts."""
    networks: NetworkConfig = field(default_factory=NetworkConfig)
    """Shape of the networks."""
    autoencoder: LoopConfig = field(default_factory=LoopConfig)
    """Training of the autoencoder."""
    autoencoder_losses: AutoencoderLosses = field(default_factory=AutoencoderLosses)
    """Its losses."""
    prior: LoopConfig = field(default_factory=LoopConfig)
    """Training of the UNet."""


class PriorTraining(Training):
    """Autoencoder and prior, one after the other; a finished one is not trained again."""

    def __init__(self, config: Config) -> None:
        for name in ("fresh_unet", "decoder", "normalise_latent"):
            if getattr(config, name) and not config.start:
                raise IcmsrError(f"{name} is for a prior that goes on from a base: name its folder in start")
        if config.autoencoder_only and config.start:
            raise IcmsrError("autoencoder_only trains a new autoencoder, start keeps a base's: give only one of them")
        self.config = config
        self.start = open_base(Path(config.start)) if config.start else None
        self.seed = config.autoencoder.seed if self.start is None else config.prior.seed
        self.pairs = TrainingPairs(config.data, self.seed, degraded=False)
        self.context = default_prompt_embedding(config.networks.context_tokens, config.networks.context_width)

    def plan(self) -> Sequence[PlannedStage]:
        """See `Training`."""
        config, run, planned = self.config, Path(self.config.run), []
        if self.start is None:
            planned += [
                PlannedStage(
                    "autoencoder",
                    config.autoencoder,
                    lambda: self._autoencoder(self._networks()),
                    run / "autoencoder",
                )
            ]
        if not config.autoencoder_only:
            planned += [PlannedStage("prior", config.prior, lambda: self._prior(self._networks(), None), run / "prior")]
        return planned

    def stages(self, processes: Processes) -> Iterator[Stage]:
        """See `Training`."""
        config, run, device = self.config, Path(self.config.run), processes.device
        networks = self._networks()
        unet, vae = networks.unet.to(device), networks.vae.to(device)
        logging.info(
            "%d photographs, autoencoder %.2f M, UNet %.2f M parameters, %s",
            len(self.pairs.photographs),
            *(sum(p.numel() for p in network.parameters()) / 1e6 for network in (vae, unet)),
            device,
        )
        if self.start is None:
            # A finished stage restores its last state, finds no images left and puts the averaged weights in place.
            task = self._autoencoder(networks)
            yield Stage(task, self.pairs, config.autoencoder, run / "autoencoder", keep_average=True)
        if self.start is None or config.normalise_latent:
            normalise(vae, self.pairs, device)
        if config.autoencoder_only:
            if processes.main:
                save_base(run / "autoencoder" / "base", unet, vae, self.context, networks.info)
                logging.info("wrote %s", run / "autoencoder" / "base")
            return
        samples, held_out = self._samples(vae)
        yield Stage(self._prior(networks, held_out), samples, config.prior, run / "prior")

    def _networks(self) -> BaseNetworks:
        """New networks, or those of the base that training goes on from."""
        config = self.config
        info = BaseInfo(config.name, config.family, licence=config.licence)
        if self.start is None:
            vae, unet = make_vae(config.networks), make_unet(config.networks)
            return BaseNetworks(unet, vae, info)
        unet, vae = build_networks(self.start)
        if config.fresh_unet:
            channels, wanted = int(vae.config.latent_channels), config.networks.latent_channels
            if channels != wanted:
                raise IcmsrError(
                    f"networks.latent_channels is {wanted}, the base in start has {channels}: set it to that"
                )
            unet = make_unet(config.networks)
        if config.decoder:
            exchange_decoder(vae, open_base(Path(config.decoder)))
        return BaseNetworks(unet, vae, info)

    def _autoencoder(self, networks: BaseNetworks) -> AutoencoderTask:
        return AutoencoderTask(networks.vae, self.config.autoencoder_losses)

    def _prior(self, networks: BaseNetworks, held_out: torch.Tensor | None) -> PriorTask:
        return PriorTask(networks, self.context, self.config.prior.seed, held_out)

    def _samples(self, vae: AutoencoderKL) -> tuple[Samples, torch.Tensor | None]:
        """What the UNet is trained on, and crops of held-out latents for its error, where there are any."""
        config, folder = self.config, Path(self.config.run) / "latents"
        if not config.latents.enabled:
            return self.pairs, None
        parts = (config.data, config.latents, config.prior.seed, vae)
        samples = CachedLatents(*parts, folder / "training.safetensors")
        if not config.data.hold_out:
            return samples, None
        kept = CachedLatents(*parts, folder / "held_out.safetensors", held_out=True)
        return samples, torch.stack([kept[number]["latent"] for number in range(HELD_OUT_CROPS)])


def normalise(vae: AutoencoderKL, pairs: TrainingPairs, device: torch.device) -> None:
    """Normalises the latent over samples of `pairs`, and rounds the VAE to the float16 in which a base is stored."""
    sharp = torch.stack([pairs[index]["sharp"] for index in range(NORMALISED_OVER)]).to(device)
    mean, deviation = normalise_latent(vae, bytes_to_signed(sharp))
    for name, values in (("means", mean), ("deviations", deviation)):
        logging.info("%s of the latent's channels were %s", name, [round(value, 3) for value in values.tolist()])
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(parameter.half())


def main() -> None:
    """Trains what the command line asks for."""
    run_training(Config, PriorTraining)


if __name__ == "__main__":
    sys.exit(run_script(main))
