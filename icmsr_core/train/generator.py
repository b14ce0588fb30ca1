"""The one-step generator: VAE encoder, one UNet pass at a fixed timestep, decoder, trained against the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..base_folder import BaseFolder
from ..errors import IcmsrError
from ..generator_file import Generator, GeneratorInfo, PartWeights, save_generator
from ..noise_schedule import check_prediction
from ..one_step import resize
from .autoencoder import stack_rows
from .loop import Batch
from .reconstruction import charbonnier, fourier_l1, gradient_l1, with_low_frequencies


@dataclass(frozen=True)
class LossWeights:
    """Weights of the generator's losses."""

    pixel: float = 1.0
    """Charbonnier (smooth L1) distance to the truth."""
    gradient: float = 1.0
    """L1 of image gradients."""
    fourier: float = 0.05
    """L1 of Fourier magnitudes."""
    tone: float = 0.1
    """Charbonnier distance before the colour correction, with `GeneratorConfig.color_fix`: ties the tone loosely."""
    icm: float = 0.0
    """ICM regulariser; 0 trains with reconstruction alone."""

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0:
            raise IcmsrError(f"loss weights must not be negative, got {asdict(self)}")
        if self.icm:
            raise IcmsrError(
                f"losses.icm must be 0 in this version, got {self.icm}: the ICM regulariser is not yet part of it"
            )


@dataclass(frozen=True)
class GeneratorConfig:
    """What the generator is and which of the base's tensors it replaces."""

    timestep: int = 200
    """The one input timestep."""
    prediction: str = "residual"
    """What the UNet's output means: residual (x0 = z - output), eps or v."""
    train_decoder: bool = True
    """Train the decoder too. For small text-free bases only: the paper's way, for large ones, is a frozen decoder."""
    zero_output: bool = True
    """Start from an output of zero: with residual prediction the generator then begins as the plain autoencoder."""
    color_fix: bool = True
    """Measure the losses after the wavelet colour correction, as inference applies it (ours): a small network then
    spends its capacity on detail and leaves the low frequencies to the input."""
    licence: str = "Apache-2.0"
    """Licence of the exported weights (SPDX)."""
    losses: LossWeights = field(default_factory=LossWeights)
    """Weights of the losses."""

    def __post_init__(self) -> None:
        check_prediction(self.prediction)


class GeneratorTask:
    """Trains every tensor of a small base (whole tensors in the generator file) with reconstruction losses."""

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, base: BaseFolder, prompt_embedding: Tensor,
        config: GeneratorConfig, settings: Mapping[str, Any],
    ) -> None:
        self.unet, self.vae, self.base, self.config, self.settings = unet, vae, base, config, settings
        self.context, self.schedule = prompt_embedding, base.schedule
        self.schedule.check_timestep(config.timestep)
        self.prediction = check_prediction(config.prediction)
        if config.zero_output:
            nn.init.zeros_(unet.conv_out.weight)
            nn.init.zeros_(unet.conv_out.bias)
        vae.decoder.requires_grad_(config.train_decoder)
        vae.post_quant_conv.requires_grad_(config.train_decoder)

    def modules(self) -> Mapping[str, nn.Module]:
        """See `Task`."""
        return {"unet": self.unet, "vae": self.vae}

    def losses(self, batch: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """See `Task`."""
        truth = batch["sharp"].float() / 127.5 - 1
        raw = self._generate(batch)
        result = with_low_frequencies(raw, self._input(batch)) if self.config.color_fix else raw
        weights = self.config.losses
        tone = charbonnier(raw, truth)
        pixel, gradient = charbonnier(result, truth), gradient_l1(result, truth)
        fourier = fourier_l1(result, truth)
        loss = weights.pixel * pixel + weights.gradient * gradient + weights.fourier * fourier
        if self.config.color_fix:
            loss = loss + weights.tone * tone
        mse = (result.clamp(-1, 1) - truth).square().mean().detach() / 4
        return {"loss": loss, "pixel": pixel, "gradient": gradient, "fourier": fourier, "tone": tone,
                "psnr": -10 * mse.log10()}

    @torch.no_grad()
    def grid(self, batch: Batch) -> Tensor:
        """Input, result, truth, row by row."""
        few = {name: value[:6] for name, value in batch.items()}
        truth = few["sharp"].float() / 127.5 - 1
        result, given = self._generate(few), self._input(few)
        return stack_rows(given, with_low_frequencies(result, given) if self.config.color_fix else result, truth)

    def export(self, run: Path) -> list[Path]:
        """The generator file in the run folder: every trained tensor, whole."""
        trained = {
            part: {
                key: value.detach().clone() for key, value in network.named_parameters() if value.requires_grad
            }
            for part, network in self.modules().items()
        }
        info = GeneratorInfo(
            family=self.base.info.family, timestep=self.config.timestep, prediction=self.prediction,
            base=self.base.info.name, base_hash=self.base.hash(), licence=self.config.licence, training=self.settings,
        )
        path = run / "generator.safetensors"
        save_generator(path, Generator(
            info, PartWeights(tensors=trained["unet"]), PartWeights(tensors=trained["vae"]), self.context.cpu()
        ))
        return [path]

    def _input(self, batch: Batch) -> Tensor:
        side = batch["sharp"].shape[-1]
        return resize(batch["low"].float() / 255, side, side) * 2 - 1

    def _generate(self, batch: Batch) -> Tensor:
        scaling, t = self.vae.config.scaling_factor, self.config.timestep
        latent = self.vae.encode(self._input(batch)).latent_dist.mode().float() * scaling
        context = self.context.to(latent)[None].expand(latent.shape[0], -1, -1)
        output = self.unet(latent, torch.tensor(t, device=latent.device), encoder_hidden_states=context).sample.float()
        x0 = self.schedule.x0_from_output(self.prediction, latent, output, t)
        result: Tensor = self.vae.decode(x0 / scaling).sample.float()
        return result
