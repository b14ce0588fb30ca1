"""The tasks of adapter training and distillation, put together from a configuration: with weights, or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from torch import Tensor

from ...errors import IcmsrError
from ...runtime.diffusers_backbone import build_networks
from ...runtime.prompts import check_prompts, constant_prompt, embed_prompts
from ...weights.base import BaseFolder, open_base
from ...weights.embedded import embedded_base
from ...weights.generator_file import PartWeights, load_generator
from ..data.data_config import DataConfig
from ..networks.adapters import make_adapter, read_adapter_config
from ..networks.bases import BaseNetworks
from ..networks.conditioning import ConditionConfig, Contexts, GeneratorConditioning, StructureFeatures
from ..networks.decoders import in_decoder
from ..networks.generator import BASE_DTYPES, GeneratorNetworks
from ..networks.latent_scales import change_latent, latent_change
from .adapter import AdapterConfig, AdapterTask
from .generator import GeneratorTask
from .generator_config import GeneratorConfig

SD_TOKENS = 77
"""Tokens of a Stable Diffusion prompt."""


@dataclass(frozen=True)
class Loading:
    """How the weights of a task are loaded. Where a function takes None in its place, no file with weights is read:
    the networks are as the caller's default device makes them, and prompts are zero."""

    device: torch.device | str = "cpu"
    """Where prompts are embedded; the networks themselves stay on the CPU."""
    prompt_cache: Path | None = None
    """File that keeps embedded prompts for the next time."""


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


def build_adapter_task(base: BaseFolder, config: AdapterConfig, seed: int, loading: Loading | None) -> AdapterTask:
    """The task of train/adapter.py."""
    networks = _networks(base, config.base_dtype, loading)
    adapter = make_adapter(config.channels, latent_factor(base), level_widths(base))
    return AdapterTask(adapter, networks, _constant(base, loading), base, config, seed)


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


def check_latent_pairs(generator: GeneratorConfig, condition: ConditionConfig) -> None:
    """Raises `IcmsrError` unless a generator can be trained on `LatentPairs`: without its VAE and without pictures."""
    if generator.networks.train_encoder:
        raise IcmsrError(
            "latents.pairs needs a frozen encoder, whose latents stay the same: set "
            "generator.networks.train_encoder to false"
        )
    others = [name for name, weight in generator.losses.terms().items() if weight and name not in ("latent", "icm")]
    if others:
        raise IcmsrError(
            f"latents.pairs trains without pictures, so losses {', '.join(others)} cannot be computed: set them to 0 "
            "and losses.latent above 0"
        )
    if generator.losses.icm and condition.names:
        raise IcmsrError(
            f"latents.pairs has no pictures to take the condition {condition.kind} from: set condition.kind to none, "
            "or losses.icm to 0"
        )


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
    if config.networks.start_base and config.prediction != "residual":
        raise IcmsrError(
            f"networks.start_base moves generators with residual prediction only, generator.prediction is "
            f"{config.prediction}: leave it empty"
        )
    if config.networks.start_base:
        open_base(Path(config.networks.start_base))  # raises where there is none
    if config.networks.start_fidelity:
        start.at_fidelity(config.networks.start_fidelity)  # raises for a file with one set
    rank = config.networks.rank
    if config.networks.continue_realistic and info.realistic_rank != rank:
        has = f"LoRA of rank {info.realistic_rank}" if info.realistic_rank else "no realistic set as LoRA"
        raise IcmsrError(
            f"networks.continue_realistic goes on with LoRA of networks.rank {rank}, but {path} has {has}: "
            "set networks.rank to that, or continue_realistic to false"
        )
    changed = [*start.vae.tensors, *start.vae.lora]
    # Where the decoder was trained alone, or under a loss on the latents, these are still the base's.
    left = not info.training or _decoder_left_the_code(info.training)
    if config.losses.icm and any(map(in_decoder, changed)) and left:
        raise IcmsrError(
            f"networks.start {path} has a decoder of its own, but losses.icm judges latents of the base's "
            "decoder: use the base that was exported with it, or set losses.icm to 0"
        )
    realistic = start.realistic.get("vae", PartWeights())
    if config.networks.weights == "decoder" and any(map(in_decoder, (*realistic.tensors, *realistic.lora))):
        raise IcmsrError(
            f"the realistic set of networks.start {path} changes the decoder, which would then be changed twice: "
            "average the two sets into one with train/average.py first"
        )


def _decoder_left_the_code(record: object) -> bool:
    """Whether a file's record has a run that trained the decoder with the UNet and without a loss on the latents."""
    if isinstance(record, Mapping):
        networks, losses = record.get("networks"), record.get("losses")
        if isinstance(networks, Mapping) and networks.get("train_decoder"):
            return not (isinstance(losses, Mapping) and losses.get("latent"))
        return any(map(_decoder_left_the_code, record.values()))
    return isinstance(record, (list, tuple)) and any(map(_decoder_left_the_code, record))


def build_generator_task(
    base: BaseFolder,
    config: GeneratorConfig,
    condition: ConditionConfig,
    captions: tuple[str, ...],
    seed: int,
    loading: Loading | None,
    kind: type[GeneratorTask] = GeneratorTask,
) -> GeneratorTask:
    """The task of train/distill.py, a `kind`; `captions` are those of the data."""
    judged = config.losses.icm > 0
    start = load_generator(Path(config.networks.start)) if config.networks.start else None
    networks = _networks(base, config.networks.base_dtype, loading)
    made = GeneratorNetworks(networks, config.networks, judged, start)
    if config.networks.start_base and loading is not None:
        before = build_networks(open_base(Path(config.networks.start_base)))[1]
        change_latent(made.generator_unet, *latent_change(before, made.vae))
    features = None
    if judged and condition.names:
        features = _features(base, condition, loading)
        torch.nn.Module.to(features, BASE_DTYPES[config.networks.base_dtype])
    if judged and condition.kind == "text" and loading is not None:
        contexts = _text_contexts(base, condition, captions, loading)
    else:
        contexts = Contexts(_constant(base, loading))
    return kind(made, GeneratorConditioning(condition, contexts, features), base, config, seed)


def _networks(base: BaseFolder, dtype: str, loading: Loading | None) -> BaseNetworks:
    if loading is not None:
        return BaseNetworks(*build_networks(base, BASE_DTYPES[dtype]), base.info)
    unet, vae = (
        kind.from_config(dict(config))
        for kind, config in ((UNet2DConditionModel, base.unet_config), (AutoencoderKL, base.vae_config))
    )
    for network in (unet, vae):
        torch.nn.Module.to(network, BASE_DTYPES[dtype])
    return BaseNetworks(unet, vae, base.info)


def _features(base: BaseFolder, condition: ConditionConfig, loading: Loading | None) -> StructureFeatures:
    if loading is not None:
        return StructureFeatures.load(condition, latent_factor(base), level_widths(base))
    adapters = []
    for path, channels in zip(condition.adapters, condition.adapter_channels()):
        config = read_adapter_config(Path(path))
        config |= {"in_channels": channels, "downscale_factor": latent_factor(base)}
        config.pop("structure")
        adapters.append(T2IAdapter(**config))
    return StructureFeatures(adapters, condition.adapter_channels(), condition.adapter_weights or [1.0] * len(adapters))


def _text_contexts(
    base: BaseFolder, condition: ConditionConfig, captions: tuple[str, ...], loading: Loading
) -> Contexts:
    # The empty caption stands for pictures that have none: they get the one fixed prompt.
    prompts = [caption or condition.prompt for caption in captions] + [condition.negative_prompt, ""]
    embedded = embed_prompts(base, prompts, loading.prompt_cache, loading.device)
    return Contexts(embedded[-1], embedded[:-2], embedded[-2])


def _constant(base: BaseFolder, loading: Loading | None) -> Tensor:
    """The constant prompt, embedded: [tokens, width]."""
    if loading is not None:
        return constant_prompt(base, loading.prompt_cache, loading.device)
    own = base.prompt_embedding()
    return torch.zeros(SD_TOKENS if own is None else own.shape[0], int(base.unet_config["cross_attention_dim"]))
