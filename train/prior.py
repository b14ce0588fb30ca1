"""Trains a small base model from photographs: an autoencoder, then a diffusion prior in its latent.

    python train/prior.py --config train/configs/nano_autoencoder.yaml
    python train/prior.py --config train/configs/nano_prior.yaml

With ``autoencoder_only`` the first half alone, with ``start`` the second alone, in the latent of a base that stands.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import bytes_to_signed
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.data.latents import CachedLatents, LatentCacheConfig
from icmsr_core.train.data.pairs import DataConfig, Samples, TrainingPairs
from icmsr_core.train.networks.bases import NetworkConfig, make_unet, make_vae, save_base
from icmsr_core.train.run.launch import Stage, parse_config, plan, run_script, settings_of
from icmsr_core.train.run.loop import train
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.processes import start_processes
from icmsr_core.train.tasks.autoencoder import AutoencoderLosses, AutoencoderTask, normalise_latent
from icmsr_core.train.tasks.building import exchange_decoder
from icmsr_core.train.tasks.prior import PriorTask
from icmsr_core.weights.base import BaseFolder, BaseInfo, default_prompt_embedding, open_base


@dataclass(frozen=True)
class Config:
    """A base model from scratch: RUN/autoencoder, then RUN/prior, whose `base` folder is the result."""

    run: str
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
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ... (several processes: what accelerate gives each)."""
    dry_run: bool = False
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


def main() -> None:
    """Both halves, one after the other; a finished half is not repeated."""
    config = parse_config(Config)
    settings, run, seed = settings_of(config), Path(config.run), config.prior.seed
    for name in ("fresh_unet", "decoder", "normalise_latent"):
        if getattr(config, name) and not config.start:
            raise IcmsrError(f"{name} is for a prior that goes on from a base: name its folder in start")
    if config.autoencoder_only and config.start:
        raise IcmsrError("autoencoder_only trains a new autoencoder, start keeps a base's: leave one of them out")
    start = open_base(Path(config.start)) if config.start else None
    processes = start_processes(config.device)
    device = processes.device
    pairs = TrainingPairs(config.data, config.autoencoder.seed if start is None else seed, degraded=False)
    context = default_prompt_embedding(config.networks.context_tokens, config.networks.context_width)
    info = BaseInfo(config.name, config.family, licence=config.licence)
    schedule = NoiseSchedule(info.beta_start, info.beta_end, info.steps)
    if config.dry_run:

        def autoencoder() -> AutoencoderTask:
            return AutoencoderTask(make_vae(config.networks), config.autoencoder_losses)

        def prior() -> PriorTask:
            return PriorTask(*_networks(config, start), context, schedule, info, seed)

        stages: list[Stage] = [] if config.autoencoder_only else [("prior", config.prior, prior)]
        if start is None:
            stages.insert(0, ("autoencoder", config.autoencoder, autoencoder))
        if processes.main:
            print(plan(settings, stages, pairs, processes.count))
        return
    torch.manual_seed(config.autoencoder.seed if start is None else seed)
    unet, vae = (network.to(device) for network in _networks(config, start))
    logging.info(
        "%d photographs, autoencoder %.2f M, UNet %.2f M parameters, %s",
        len(pairs.photographs),
        *(sum(p.numel() for p in network.parameters()) / 1e6 for network in (vae, unet)),
        device,
    )
    if start is None:
        task = AutoencoderTask(vae, config.autoencoder_losses)
        # A resumed run restores the last state, finds no images left and puts the averaged weights in place.
        train(task, pairs, config.autoencoder, run / "autoencoder", settings, processes, keep_average=True)
    if start is None or config.normalise_latent:
        _normalise(vae, pairs, device)
    if config.autoencoder_only:
        if processes.main:
            save_base(run / "autoencoder" / "base", unet, vae, context, info)
            logging.info("wrote %s", run / "autoencoder" / "base")
        return
    samples, held_out = _samples(config, pairs, vae)
    prior_task = PriorTask(unet, vae, context, schedule, info, seed, held_out)
    for path in train(prior_task, samples, config.prior, run / "prior", settings, processes):
        logging.info("wrote %s", path)


HELD_OUT_CROPS = 192
"""Crops of held-out photographs on which the prior's error is measured."""


def _normalise(vae: AutoencoderKL, pairs: TrainingPairs, device: torch.device) -> None:
    """Normalises the latent over 256 samples, and rounds the VAE to the float16 in which a base is stored."""
    sharp = torch.stack([pairs[index]["sharp"] for index in range(256)]).to(device)
    mean, deviation = normalise_latent(vae, bytes_to_signed(sharp))
    for name, values in (("means", mean), ("deviations", deviation)):
        logging.info("%s of the latent's channels were %s", name, [round(value, 3) for value in values.tolist()])
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(parameter.half())


def _samples(config: Config, pairs: TrainingPairs, vae: AutoencoderKL) -> tuple[Samples, torch.Tensor | None]:
    """What the UNet is trained on, and crops of held-out latents for its error, where there are any."""
    if not config.latents.enabled:
        return pairs, None
    folder, seed = Path(config.run) / "latents", config.prior.seed
    samples = CachedLatents(config.data, config.latents, seed, vae, folder / "training.safetensors")
    if not config.data.hold_out:
        return samples, None
    kept = CachedLatents(config.data, config.latents, seed, vae, folder / "held_out.safetensors", held_out=True)
    return samples, torch.stack([kept[number]["latent"] for number in range(HELD_OUT_CROPS)])


def _networks(config: Config, start: BaseFolder | None) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    if start is None:
        vae, unet = make_vae(config.networks), make_unet(config.networks)
        return unet, vae
    unet, vae = build_networks(start)
    if config.fresh_unet:
        channels, wanted = int(vae.config.latent_channels), config.networks.latent_channels
        if channels != wanted:
            raise IcmsrError(f"networks.latent_channels is {wanted}, the base in start has {channels}: set it to that")
        unet = make_unet(config.networks)
    if config.decoder:
        exchange_decoder(vae, open_base(Path(config.decoder)))
    return unet, vae


if __name__ == "__main__":
    sys.exit(run_script(main))
