"""The tasks of adapter training and distillation, put together from a configuration: with weights, or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from torch import Tensor

from ...errors import IcmsrError
from ...runtime.diffusers_backbone import build_networks
from ...runtime.prompts import check_prompts, constant_prompt, embed_prompts
from ...weights.base import BaseFolder, open_base
from ...weights.embedded import embedded_base
from ...weights.generator_file import load_generator
from ..data.pairs import DataConfig
from ..networks.adapters import make_adapter, read_adapter_config
from ..networks.conditioning import ConditionConfig, StructureFeatures
from ..networks.generator import BASE_DTYPES, GeneratorNetworks, in_decoder
from .adapter import AdapterConfig, AdapterTask
from .generator import Contexts, GeneratorConfig, GeneratorTask

SD_TOKENS = 77
"""Tokens of a Stable Diffusion prompt."""


def training_base(path: str) -> BaseFolder:
    """The base folder at `path`; empty is the embedded nano."""
    return open_base(Path(path) if path else embedded_base())


def check_run(base: BaseFolder, data: DataConfig, precision: str, base_dtype: str) -> None:
    """Raises `IcmsrError` where the parts of a configuration do not go together."""
    multiple = base.descriptor().multiple_of
    if data.crop % multiple:
        raise IcmsrError(f"data.crop must be a multiple of {multiple} for the base {base.info.name}, got {data.crop}")
    if base_dtype == "bf16" and precision != "bf16":
        raise IcmsrError(
            "base_dtype bf16 needs loop.precision bf16, since a bf16 base cannot take float32 input: set both to bf16"
        )
    if base.prompt_embedding() is None:
        check_prompts(base)


def level_widths(base: BaseFolder) -> list[int]:
    """Channels of the UNet's levels."""
    return list(base.unet_config["block_out_channels"])


def latent_factor(base: BaseFolder) -> int:
    """Pixels per latent cell."""
    return base.descriptor().latent_factor


def build_adapter_task(
    base: BaseFolder,
    config: AdapterConfig,
    seed: int,
    settings: Mapping[str, Any],
    weights: bool = True,
    device: torch.device | None = None,
    prompt_cache: Path | None = None,
) -> AdapterTask:
    """The task of train/adapter.py. Without `weights` the networks are as the caller's default device makes them."""
    unet, vae = _networks(base, config.base_dtype, weights)
    adapter = make_adapter(config.channels, latent_factor(base), level_widths(base))
    context = constant_prompt(base, prompt_cache, device or "cpu") if weights else _blank_prompt(base)
    return AdapterTask(adapter, unet, vae, context, base, config, seed, settings)


def check_generator(base: BaseFolder, generator: GeneratorConfig, condition: ConditionConfig) -> None:
    """Raises `IcmsrError` unless generator and condition fit the base; with ICM off, adapters are not looked at."""
    base.schedule.check_timestep(generator.timestep)
    own, wanted = base.info.prediction, generator.prediction
    if generator.networks.weights == "lora" and wanted != "residual" and wanted != own:
        # LoRA starts from what the base predicts: read as something else it would be amplified nonsense.
        raise IcmsrError(f"generator.prediction is {wanted}, the base {base.info.name} predicts {own}: set it to {own}")
    if generator.networks.start:
        _check_start(base, generator)
    if generator.losses.icm:
        condition.check_files(latent_factor(base), level_widths(base))
        if condition.kind == "text":
            check_prompts(base)


def _check_start(base: BaseFolder, config: GeneratorConfig) -> None:
    start = load_generator(Path(config.networks.start))
    path, info = config.networks.start, start.info
    if info.family != base.info.family:
        raise IcmsrError(
            f"networks.start {path} is for the family {info.family}, but the base {base.info.name} is "
            f"{base.info.family}: choose files of one family"
        )
    if (start.unet.lora or start.vae.lora) and info.base_hash not in ("", base.hash()):
        raise IcmsrError(
            f"the LoRA of networks.start {path} was trained on other weights than {base.path}: use the base "
            f"{info.base!r} that it was trained on"
        )
    for name in ("timestep", "prediction"):
        if getattr(info, name) != getattr(config, name):
            raise IcmsrError(
                f"generator.{name} is {getattr(config, name)}, networks.start {path} was trained with "
                f"{getattr(info, name)}: set it to that"
            )
    changed = [*start.vae.tensors, *start.vae.lora]
    if config.losses.icm and any(map(in_decoder, changed)):
        raise IcmsrError(
            f"networks.start {path} has a decoder of its own, but losses.icm judges latents of the base's "
            "decoder: use the base that was exported with it, or set losses.icm to 0"
        )


def build_generator_task(
    base: BaseFolder,
    config: GeneratorConfig,
    condition: ConditionConfig,
    captions: tuple[str, ...],
    seed: int,
    settings: Mapping[str, Any],
    weights: bool = True,
    device: torch.device | None = None,
    prompt_cache: Path | None = None,
) -> GeneratorTask:
    """The task of train/distill.py, `captions` being those of the data. `weights` as in `build_adapter_task`."""
    judged = config.losses.icm > 0
    unet, vae = _networks(base, config.networks.base_dtype, weights)
    start = load_generator(Path(config.networks.start)) if config.networks.start else None
    networks = GeneratorNetworks(unet, vae, base.schedule, base.info.prediction, config.networks, judged, start)
    features = None
    if judged and condition.names:
        features = _features(base, condition, weights)
        torch.nn.Module.to(features, BASE_DTYPES[config.networks.base_dtype])
    if weights:
        contexts = _contexts(base, condition if judged else None, captions, device or torch.device("cpu"), prompt_cache)
    else:
        contexts = Contexts(_blank_prompt(base))
    return GeneratorTask(networks, features, contexts, base, config, condition, seed, settings)


def _networks(base: BaseFolder, dtype: str, weights: bool) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    if weights:
        return build_networks(base, BASE_DTYPES[dtype])
    unet, vae = (
        kind.from_config(dict(config))
        for kind, config in ((UNet2DConditionModel, base.unet_config), (AutoencoderKL, base.vae_config))
    )
    for network in (unet, vae):
        torch.nn.Module.to(network, BASE_DTYPES[dtype])
    return unet, vae


def _features(base: BaseFolder, condition: ConditionConfig, weights: bool) -> StructureFeatures:
    if weights:
        return StructureFeatures.load(condition, latent_factor(base), level_widths(base))
    adapters = []
    for path, channels in zip(condition.adapters, condition.adapter_channels()):
        config = read_adapter_config(Path(path))
        config |= {"in_channels": channels, "downscale_factor": latent_factor(base)}
        config.pop("structure")
        adapters.append(T2IAdapter(**config))
    return StructureFeatures(adapters, condition.adapter_channels(), condition.adapter_weights or [1.0] * len(adapters))


def _contexts(
    base: BaseFolder,
    condition: ConditionConfig | None,
    captions: tuple[str, ...],
    device: torch.device,
    cache: Path | None,
) -> Contexts:
    if condition is None or condition.kind != "text":
        return Contexts(constant_prompt(base, cache, device))
    # The empty caption stands for pictures that have none: they get the one fixed prompt.
    prompts = [caption or condition.prompt for caption in captions] + [condition.negative_prompt, ""]
    embedded = embed_prompts(base, prompts, cache, device)
    return Contexts(embedded[-1], embedded[:-2], embedded[-2])


def _blank_prompt(base: BaseFolder) -> Tensor:
    own = base.prompt_embedding()
    return torch.zeros(SD_TOKENS if own is None else own.shape[0], int(base.unet_config["cross_attention_dim"]))


def exchange_decoder(vae: AutoencoderKL, donor: BaseFolder) -> None:
    """Gives `vae` the decoder of `donor`, a base that distillation exported with ``losses.autoencoder``.

    Raises `IcmsrError` unless both have one and the same encoder: another's decoder reads another latent.
    """
    own, given = vae.state_dict(), donor.vae_state()
    for name, value in own.items():
        if name not in given or given[name].shape != value.shape:
            raise IcmsrError(f"decoder {donor.path}: its VAE has another shape than that of start ({name})")
    for name, value in own.items():
        # To the precision of the files: base folders hold half precision.
        if not in_decoder(name) and not torch.equal(given[name].half(), value.half()):
            raise IcmsrError(
                f"decoder {donor.path}: its encoder differs from that of start ({name}), so its decoder reads "
                "another latent: choose a base that was distilled from start's base"
            )
    vae.load_state_dict({name: given[name].to(value) if in_decoder(name) else value for name, value in own.items()})
