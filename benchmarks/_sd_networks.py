"""Stable Diffusion 2.1's networks with random weights, at its size or narrower, and the two ways to run them."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.ranges import signed_to_unit, unit_to_signed
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from icmsr_core.upscale.color import apply_color_fix
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.sd_families import HEAD_WIDTH, SD_VAE_WIDTHS, SD_WIDTHS, sd_unet_config, sd_vae_config

TIMESTEP, TOKENS, CONTEXT_WIDTH = 999, 77, 1024
TEXT_LAYERS, VOCABULARY = 23, 49408
"""Of SD2.1's text encoder, which is as wide as the context; its heads are 64 wide, its feed-forward four times it."""
GROUPS = 32
BLOCK = 1_000_003
"""Random numbers that all weights are cut from: drawing 866 million of them would take longer than a run."""


def narrowed(widths: tuple[int, ...], share: float, multiple: int) -> tuple[int, ...]:
    """`widths` times `share`, in whole multiples."""
    return tuple(max(multiple, round(width * share / multiple) * multiple) for width in widths)


def unet_and_vae(share: float, dtype: torch.dtype) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """SD2.1's UNet and VAE, or networks of its layout whose widths are `share` of its own; on the CPU, for inference.

    Raises `IcmsrError` for a share out of range.
    """
    if not 0 < share <= 1:
        raise IcmsrError(f"width must be above 0 and at most 1, got {share:g}: try 0.25")
    (context,) = narrowed((CONTEXT_WIDTH,), share, HEAD_WIDTH)
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel.from_config(
            sd_unet_config(narrowed(SD_WIDTHS, share, HEAD_WIDTH), context, linear=True)
        )
        vae = AutoencoderKL.from_config(sd_vae_config(narrowed(SD_VAE_WIDTHS, share, GROUPS)))
    for network in (unet, vae):
        fill(network, dtype)
    return unet, vae


def text_encoder(share: float, dtype: torch.dtype) -> nn.Module | None:
    """SD2.1's text encoder with random weights; None where transformers is not installed."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        return None
    (width,) = narrowed((CONTEXT_WIDTH,), share, HEAD_WIDTH)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
    )
    with init_empty_weights(include_buffers=False):
        encoder = CLIPTextModel(config)
    fill(encoder, dtype)
    return encoder


@torch.no_grad()
def fill(network: nn.Module, dtype: torch.dtype) -> None:
    """Gives `network`, built without weights, random ones in `dtype` that keep activations near 1; in eval mode."""
    noise = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0))
    count = 0
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            start, length = count * 7919 % BLOCK, parameter.numel()
            block = noise[start : start + BLOCK]
            value = block.repeat(-(-length // BLOCK))[:length].view(parameter.shape)
            if parameter.ndim > 1:
                value = value / math.sqrt(parameter[0].numel())
            else:
                value = 0.01 * value + (1.0 if name == "weight" else 0.0)
            setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))
            count += 1
    network.eval()


def our_backbone(share: float, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> DiffusersBackbone:
    """The networks as the library holds them, once a generator is merged into its base.

    With `tiny`, an AutoencoderTiny of TAESD's size in the VAE's place, whatever the share.
    """
    unet, vae = unet_and_vae(share, dtype)
    if tiny:
        with init_empty_weights(include_buffers=False):
            vae = AutoencoderTiny()
        fill(vae, dtype)
    descriptor = BackboneDescriptor("sd21", 4, 8, 64, TIMESTEP, "eps")
    context = torch.randn(TOKENS, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    return DiffusersBackbone(unet, vae, descriptor, context, device, dtype)


@dataclass(frozen=True)
class ReferenceSettings:
    """What OSEDiff's test script does by default (github.com/cswry/OSEDiff, test_osediff.py and osediff.py)."""

    rank: int = 4
    """LoRA rank of UNet and VAE encoder; alpha is peft's default, 8."""
    latent_tile: int = 96
    """UNet tiles in latent cells; a latent with no more cells than such a tile runs whole."""
    latent_overlap: int = 32
    """Their overlap."""
    encoder_tile: int = 1024
    """VAE encoder tiles in pixels."""
    decoder_tile: int = 224
    """VAE decoder tiles in latent cells."""
    vae_overlap: float = 0.125
    """Share of a VAE tile that overlaps the next: 28 of 224 cells, where OSEDiff pads its tiles by 11 on each side.
    diffusers' default of a quarter would make the reference slower than it is; its tiles meet at whole cells only with
    a share that leaves none of them over."""


class Reference:
    """A stand-in for OSEDiff's procedure: LoRA beside the weights, a text encoder for every picture, a sampled
    posterior, its tiles and its Gaussian window; the VAE in diffusers' tiles, each normalised on its own.

    Left out: the tagger that writes its prompts (a Swin-L), so the reference is faster here than there. The clean
    latent is in closed form, because its scheduler call fails on current diffusers.
    """

    def __init__(
        self, share: float, device: torch.device, dtype: torch.dtype, settings: ReferenceSettings | None = None
    ) -> None:
        from icmsr_core.train.networks.roles import VAE_ENCODER_TARGETS

        self.settings = settings or ReferenceSettings()
        self.device, self.dtype = device, dtype
        self.unet, self.vae = unet_and_vae(share, dtype)
        adapters = unet_targets(self.unet)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is the point
            for name, targets in adapters.items():
                self.unet.add_adapter(self._lora(targets), adapter_name=name)
        self.unet.set_adapter(list(adapters))
        self.vae.add_adapter(self._lora(VAE_ENCODER_TARGETS), adapter_name="default_encoder")
        self.text_encoder = text_encoder(share, dtype)
        for network in (self.unet, self.vae, self.text_encoder):
            if network is not None:
                nn.Module.to(network, device, dtype).eval().requires_grad_(False)
        self.vae.enable_tiling()
        self.vae.tile_overlap_factor = self.settings.vae_overlap
        self._tokens = torch.arange(TOKENS, device=device)[None]
        self._context = torch.zeros(1, TOKENS, self.unet.config.cross_attention_dim, device=device, dtype=dtype)
        self._schedule = NoiseSchedule()

    def _lora(self, targets: list[str] | str) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=self.settings.rank, init_lora_weights="gaussian", target_modules=targets)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is missing from it here."""
        return () if self.text_encoder is not None else ("reference without text encoder: transformers is missing",)

    @torch.no_grad()
    def upscale(self, image: Tensor, size: int) -> Tensor:
        """`image` [1, 3, H, W] in [0, 1] at `size` x `size`, in [0, 1]."""
        given = resize(image, size, size)
        context = self._context if self.text_encoder is None else self.text_encoder(self._tokens)[0]
        latent = self._encode(unit_to_signed(given).to(self.device, self.dtype))
        output = self._predict(latent, context)
        clean = self._schedule.x0_from_output("eps", latent.float(), output.float(), TIMESTEP)
        decoded = self._decode(clean.to(self.dtype)).clamp(-1, 1).float().to(image.device)
        return apply_color_fix("adain", signed_to_unit(decoded), given).clamp(0, 1)

    def _encode(self, image: Tensor) -> Tensor:
        self._tile_vae(self.settings.encoder_tile)
        return self.vae.encode(image).latent_dist.sample() * self.vae.config.scaling_factor

    def _decode(self, latent: Tensor) -> Tensor:
        self._tile_vae(8 * self.settings.decoder_tile)
        return self.vae.decode(latent / self.vae.config.scaling_factor).sample

    def _tile_vae(self, pixels: int) -> None:
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = pixels, pixels // 8

    def _predict(self, latent: Tensor, context: Tensor) -> Tensor:
        """The UNet over the latent in tiles, one after another, averaged under a Gaussian window in float64."""
        timestep = torch.tensor([TIMESTEP], device=self.device)
        height, width = latent.shape[-2:]
        tile = self.settings.latent_tile
        if height * width <= tile * tile:
            return self.unet(latent, timestep, encoder_hidden_states=context).sample
        tile = min(tile, height, width)
        window = gaussian_window(tile).to(self.device)
        total, weight = (torch.zeros(latent.shape, device=self.device) for _ in range(2))
        for top in tile_starts(height, tile, self.settings.latent_overlap):
            for left in tile_starts(width, tile, self.settings.latent_overlap):
                rows, columns = slice(top, top + tile), slice(left, left + tile)
                output = self.unet(latent[:, :, rows, columns], timestep, encoder_hidden_states=context).sample
                total[:, :, rows, columns] += output * window
                weight[:, :, rows, columns] += window
        return total / weight


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles at steps of `tile - overlap`; the last one ends with the picture."""
    starts = list(range(0, max(1, length - overlap), tile - overlap))
    return [min(start, length - tile) for start in starts]


def gaussian_window(tile: int) -> Tensor:
    """OSEDiff's weights, float64 [tile, tile]: half a cell off the middle along the rows, as there."""
    position = torch.arange(tile, dtype=torch.float64)

    def curve(middle: float) -> Tensor:
        return torch.exp(-((position - middle) ** 2) / tile**2 / (2 * 0.01)) / math.sqrt(2 * math.pi * 0.01)

    return torch.outer(curve(tile / 2), curve((tile - 1) / 2))


def unet_targets(unet: nn.Module) -> dict[str, list[str]]:
    """Names of the modules that OSEDiff's three adapters sit on: the way down, the way up, the rest."""
    from icmsr_core.train.networks.roles import UNET_TARGETS

    adapters: dict[str, list[str]] = {"default_encoder": [], "default_decoder": [], "default_others": []}
    for name, _ in unet.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in UNET_TARGETS):
            down, up = ("down_blocks" in name or "conv_in" in name), ("up_blocks" in name or "conv_out" in name)
            adapters["default_encoder" if down else "default_decoder" if up else "default_others"].append(name)
    return adapters
