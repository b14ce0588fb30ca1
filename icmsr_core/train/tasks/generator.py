"""One-step distillation: a generator trained against the truth, and by the ICM regulariser against a teacher.

    x_L -> encoder -> UNet once -> z -> frozen decoder -> x       L = L2 + perceptual + ICM (ICM-SR, equation 7)

and, in turn, the auxiliary, trained by the diffusion loss on the generator's own latents z (`icm`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...backbone.context import repeated_context
from ...backbone.prediction import check_prediction
from ...measures.dists import load_dists
from ...measures.lpips import Lpips
from ...pictures.ranges import bytes_to_signed, unit_to_signed
from ...weights.base import BaseFolder
from ...weights.generator_file import Generator, GeneratorInfo, PartWeights, save_generator
from ..data.draws import all_timesteps, draw_corners, draw_noising
from ..losses.agreement import latent_agreement
from ..losses.diagnostics import BinnedMeans, diagnostics, saturation, variety
from ..losses.icm import auxiliary_loss, guided, icm_gradient, icm_loss
from ..losses.lattice import lattice_l1
from ..losses.perceptual import DecoderPerceptual, make_perceptual
from ..losses.reconstruction import charbonnier, gradient_l1, psnr, with_low_frequencies
from ..losses.spectra import fourier_l1, local_spectrum
from ..losses.teacher import Reading, logged, read_teacher
from ..networks.bases import save_base
from ..networks.conditioning import GeneratorConditioning, picture_of
from ..networks.decoders import in_decoder
from ..networks.generator import GeneratorNetworks
from ..networks.roles import Role
from ..settings import shareable
from .generator_config import GeneratorConfig
from .task import Batch, Player, Task, latent_shape, stack_rows

log = logging.getLogger(__name__)

TEACHER_SAMPLES = 8
"""Samples of the probe on which the teacher is asked: its readings take eighteen passes of the UNet for each."""

PROBE_PIXELS = 256 * 256
"""So many pixels of the probe, or cells where there are latents alone, are measured at once, in little memory."""

AUTOENCODER_STRIDE = 4
"""The autoencoder term looks at every fourth sample: it holds the decoder in place, and a pass costs as much as the
generator's own."""


class GeneratorTask(Task):
    """Trains the generator and, where there is a regulariser, the auxiliary.

    The equation and the order of the turns stand at the head of this module.
    """

    constant: Tensor
    negative: Tensor | None

    def __init__(
        self,
        networks: GeneratorNetworks,
        conditioning: GeneratorConditioning,
        base: BaseFolder,
        config: GeneratorConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.networks, self.features, self.base = networks, conditioning.features, base
        self.config, self.condition, self.seed = config, conditioning.config, seed
        contexts = conditioning.contexts
        self.schedule = base.schedule
        self.schedule.check_timestep(config.timestep)
        self.prediction = check_prediction(config.prediction)
        wanted = config.losses.perceptual > 0
        self.perceptual = make_perceptual(config.perceptual, networks.vae, torch.device("cpu")) if wanted else None
        self.dists = (
            load_dists(Path(config.perceptual.dists_weights), config.perceptual.precision == "bf16")
            if config.losses.dists
            else None
        )
        self.lattice = partial(lattice_l1, period=base.descriptor().latent_factor)
        self.register_buffer("constant", contexts.constant, persistent=False)
        self.captions = contexts.captions  # on the CPU: a large data set's are larger than a GPU
        self.register_buffer("negative", contexts.negative, persistent=False)
        self.meter = BinnedMeans(self.schedule.steps)
        self.probe: Batch = {}

    def players(self) -> Sequence[Player]:
        """See `Task`."""
        config = self.config
        generator = Player("generator", self.networks.trained("generator"))
        if not config.losses.icm:
            return [generator]
        auxiliary = Player(
            "auxiliary",
            self.networks.trained("auxiliary"),
            config.auxiliary_steps,
            config.auxiliary_learning_rate,
            averaged=False,
        )
        return [generator, auxiliary]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """See `Task`. Adds ``t`` [N], ``eps`` [N, C, h, w], the condition's ``maps`` and the weights of the losses."""
        config = self.config
        added: Batch = {}
        if player == "generator":
            added = {f"weight/{name}": torch.tensor(value) for name, value in config.losses.at(images).items()}
            if config.perceptual.shift:
                added["corner"] = draw_corners(self.seed, batch["index"], config.perceptual.shift)
        if config.losses.icm:
            purpose = f"{player}/{turn}"
            law = config.timesteps if player == "generator" else all_timesteps()
            known = batch.get("low_latent")
            shape = tuple(known.shape[1:]) if known is not None else latent_shape(self.networks.vae, batch["sharp"])
            added |= draw_noising(self.seed, batch["index"], purpose, shape, self.schedule.steps, law)
            if self.captions is not None:
                added["text"] = self.captions[batch["caption"]]
            if self.features is not None and "maps" not in batch:
                added["maps"] = self.condition.maps(picture_of(batch, self.condition.source))
        return {**batch, **added}

    def forward(self, player: str, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """See `Task`."""
        if player == "auxiliary":
            return self._auxiliary_losses(batch)
        return self._latent_losses(batch) if "low_latent" in batch else self._generator_losses(batch)

    def generate(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's latent [N, C, h, w] and picture [N, 3, H, W] for inputs `given` [N, 3, H, W], both pictures
        in [-1, 1]."""
        latent = self._latent(given)
        return latent, self.networks.decode(latent)

    @torch.no_grad()
    def grid(self, batch: Batch) -> Tensor:
        """Input, result, truth, and the maps of the condition, row by row. Of latents: all decoded."""
        if "low_latent" in batch:
            latents = [batch["low_latent"], self.denoised(batch["low_latent"]), batch["truth_latent"]]
            return stack_rows(*(self.networks.decode(latent) for latent in latents))
        given = input_of(batch)
        rows = [given, self._corrected(self.generate(given)[1], given), bytes_to_signed(batch["sharp"])]
        if self.condition.names:
            maps = self.condition.maps(picture_of(batch, self.condition.source))
            rows += self.condition.shown(unit_to_signed(maps))
        return stack_rows(*rows)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Over `probe`, a batch of samples; nothing where there is none.

        ``latent/...``: the agreement of the generator's latents with the truth's (see `agreement`), with a warning
        where they leave the code of the base's encoder. ``teacher/...``, with ICM: what teacher and auxiliary make of
        them over the first samples (see `losses.teacher`).
        """
        if not self.probe:
            return {}
        found, wanted = [], []
        samples = self.probe["low_latent" if "low_latent" in self.probe else "sharp"]
        together = max(1, PROBE_PIXELS // samples[0, 0].numel())
        for first in range(0, len(self.probe["index"]), together):
            low, truth = self.latents_of(self._probe(slice(first, first + together)))
            found.append(self.denoised(low))
            wanted.append(truth)
        agreement = latent_agreement(torch.cat(found), torch.cat(wanted))
        if agreement.warning():
            log.warning("%s", agreement.warning())
        values = {f"latent/{name}": value for name, value in agreement.values().items()}
        if self.config.losses.icm:
            values |= {f"teacher/{name}": value for name, value in logged(self.readings()).items()}
        return values

    @torch.no_grad()
    def readings(self) -> dict[int, Reading]:
        """What teacher and auxiliary make of the generator's latents, over the first samples of `probe`."""
        batch = self._probe(slice(TEACHER_SAMPLES))
        low, truth = self.latents_of(batch)
        if self.features is not None:
            batch["maps"] = self.condition.maps(picture_of(batch, self.condition.source))
        if self.captions is not None:
            batch["text"] = self.captions[batch["caption"].cpu()].to(low.device)

        def judge(role: Role, noisy: Tensor, t: Tensor) -> Tensor:
            return self.networks.noise(role, noisy, t, self._text(batch, noisy), self._features(batch))

        return read_teacher(self.denoised(low), truth, self.schedule, judge, self.networks.decode)

    def given_latent(self, batch: Batch) -> Tensor:
        """The latent of the input [N, C, h, w], in the generator's encoder."""
        return batch["low_latent"] if "low_latent" in batch else self.networks.encode(input_of(batch))

    @torch.no_grad()
    def latents_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents [N, C, h, w] of the inputs, in the generator's encoder, and of the truths, in the base's."""
        known = batch.get("truth_latent")
        return self.given_latent(batch), (
            self.networks.encode_truth(bytes_to_signed(batch["sharp"])) if known is None else known
        )

    def denoised(self, latent: Tensor) -> Tensor:
        """The generator's latent for latents of inputs, both [N, C, h, w]: its one step."""
        context = repeated_context(self.constant, latent)
        return self.networks.denoise(latent, self.config.timestep, self.prediction, context)

    def export(self, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
        """The generator file in `folder`, and the folder ``base`` where the base has got a new decoder."""
        config, networks, start = self.config, self.config.networks, self.networks.start
        weights = self.networks.generator_weights()
        lora = networks.weights == "lora"
        info = GeneratorInfo(
            family=self.base.info.family,
            timestep=config.timestep,
            prediction=self.prediction,
            base=self.base.info.name,
            base_hash=self.base.hash(),
            rank=networks.rank if lora else 0,
            alpha=float(networks.rank) if lora else 0.0,
            licence=config.licence,
            training=shareable(settings),
        )
        embedding = self.constant.float().cpu()
        path, written = folder / "generator.safetensors", []
        if config.losses.autoencoder:
            decoder = {name: value for name, value in weights["vae"].tensors.items() if in_decoder(name)}
            encoder = {name: value for name, value in weights["vae"].tensors.items() if name not in decoder}
            weights["vae"] = PartWeights(tensors=encoder)
            vae = copy.deepcopy(self.networks.vae)
            vae.load_state_dict({**vae.state_dict(), **decoder})
            save_base(folder / "base", self.networks.unet, vae, embedding, self.base.info)
            written.append(folder / "base")
        if networks.weights == "decoder" and start is not None:  # both sets as they were, in front of a new decoder
            training = {"decoder": info.training, "before": start.info.training}
            info = replace(
                start.info, base=info.base, base_hash=info.base_hash, licence=config.licence, training=training
            )
            generator = Generator(info, weights["unet"], weights["vae"], embedding, realistic=start.realistic)
        elif lora and start is not None:  # a second set, on top of the one that it began from
            info = replace(
                start.info,
                base=info.base,
                base_hash=info.base_hash,
                licence=config.licence,
                realistic_rank=networks.rank,
                realistic_alpha=float(networks.rank),
                realistic_training=info.training,
                realistic_default=1.0,
            )
            generator = Generator(info, start.unet, start.vae, embedding, realistic=weights)
        else:
            generator = Generator(info, weights["unet"], weights["vae"], embedding)
        save_generator(path, generator)
        return [path, *written]

    def _latent(self, given: Tensor) -> Tensor:
        """The generator's latent [N, C, h, w] for inputs [N, 3, H, W] in [-1, 1]."""
        return self.denoised(self.networks.encode(given))

    def _probe(self, which: slice) -> Batch:
        return {name: value[which].to(self.constant.device) for name, value in self.probe.items()}

    def _latent_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """The generator's losses without a VAE, for `LatentPairs`."""
        latent = self.denoised(batch["low_latent"])
        terms = {"latent": F.l1_loss(latent, batch["truth_latent"])}
        return self._with_icm(terms, latent, batch)

    def _generator_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        truth, weights = bytes_to_signed(batch["sharp"]), self.config.losses.terms()
        given = input_of(batch)
        latent = self._latent(given)
        terms: dict[str, Tensor] = {}
        raw, wanted = None, None
        if isinstance(self.perceptual, DecoderPerceptual):
            picture, features = self.perceptual.decode(latent)
            wanted = self.networks.encode_truth(truth)
            terms["perceptual"] = self.perceptual.distance(features, self.perceptual.features(wanted))
            raw = None if self.networks.own_decoder else picture  # one pass for both where the decoder is one
        if raw is None:
            raw = self.networks.decode(latent)
        result = self._corrected(raw, given)
        seen, shown = self._seen(result, batch), self._seen(truth, batch)
        split = self.config.perceptual.split and len(seen) > 1
        for_lpips, for_dists = (slice(0, None, 2), slice(1, None, 2)) if split else (slice(None), slice(None))
        if isinstance(self.perceptual, Lpips):
            terms["perceptual"] = self.perceptual(seen[for_lpips], shown[for_lpips])
        if self.dists is not None:
            terms["dists"] = self.dists(seen[for_dists], shown[for_dists])
        distances: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "l2": F.mse_loss,
            "charbonnier": charbonnier,
            "gradient": gradient_l1,
            "fourier": fourier_l1,
            "spectrum": local_spectrum,
            "lattice": self.lattice,
        }
        if weights["latent"]:
            terms["latent"] = F.l1_loss(latent, self.networks.encode_truth(truth) if wanted is None else wanted)
        terms |= {name: distance(result, truth) for name, distance in distances.items() if weights[name]}
        if weights["tone"]:
            terms["tone"] = charbonnier(raw, truth)
        if weights["autoencoder"]:
            some = truth[::AUTOENCODER_STRIDE]
            again = self.networks.decode(self.networks.encode_truth(some))
            terms["autoencoder"] = charbonnier(again, some) + 0.5 * gradient_l1(again, some)
        values, carried = self._with_icm(terms, latent, batch)
        with torch.no_grad():
            health = {"psnr": psnr(result, truth), "saturation": saturation(result)}
            if len(result) > 1:  # a single picture has no spread
                health["variety"] = variety(result, truth)
        return {**values, **health}, carried

    def _with_icm(self, terms: dict[str, Tensor], latent: Tensor, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        """`terms`, with ICM where it is wanted, and their weighted sum ``loss``; what the auxiliary's turn needs."""
        carried: Batch = {}
        if self.config.losses.icm:
            gradient, carried = self._icm_gradient(latent, batch)
            terms = {**terms, "icm": icm_loss(latent, gradient)}
        loss = sum((batch[f"weight/{name}"] * value for name, value in terms.items()), latent.new_zeros(()))
        return {"loss": loss, **terms}, carried

    @torch.no_grad()
    def _icm_gradient(self, latent: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        """g for `latent`, and what the auxiliary's turn needs: the latent and the condition's maps."""
        t, eps = batch["t"], batch["eps"]
        noisy = self.schedule.add_noise(latent, eps, t)
        context, features = self._text(batch, latent), self._features(batch)
        teacher = self.networks.noise("teacher", noisy, t, context, features)
        auxiliary = self.networks.noise("auxiliary", noisy, t, context, features)
        if self.condition.guidance != 1:
            # The auxiliary stays free of guidance: it tells the generator's own score, not a sharpened one.
            negative = self.negative if self.negative is not None else self.constant
            plain = self.networks.noise("teacher", noisy, t, repeated_context(negative, latent), None)
            teacher = guided(teacher, plain, self.condition.guidance)
        assert self.meter is not None
        self.meter.add(diagnostics(teacher, auxiliary, eps), t)
        carried = {"latent": latent.detach()} | ({"maps": batch["maps"]} if "maps" in batch else {})
        return icm_gradient(teacher, auxiliary, eps, self.config.gradient_floor), carried

    def _auxiliary_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
        latent, t, eps = batch["latent"].detach(), batch["t"], batch["eps"]
        noisy = self.schedule.add_noise(latent, eps, t)
        predicted = self.networks.noise("auxiliary", noisy, t, self._text(batch, latent), self._features(batch))
        return {"loss": auxiliary_loss(predicted, eps)}, {}

    def _features(self, batch: Batch) -> list[Tensor] | None:
        return None if self.features is None else self.features(batch["maps"])

    def _text(self, batch: Batch, latent: Tensor) -> Tensor:
        """What teacher and auxiliary see in cross-attention: captions for text, else the constant."""
        return batch["text"].to(latent.dtype) if "text" in batch else repeated_context(self.constant, latent)

    def _seen(self, pictures: Tensor, batch: Batch) -> Tensor:
        """What the perceptual networks see of `pictures` [N, C, H, W]: with `shift`, so many rows and columns less."""
        shift = self.config.perceptual.shift
        if not shift:
            return pictures
        # By index, on the device: corners as Python's numbers would make the program wait for them in every step.
        rows, columns = (
            corner[:, None] + torch.arange(side - shift, device=pictures.device)
            for corner, side in zip(batch["corner"].unbind(1), pictures.shape[-2:])
        )
        samples = torch.arange(len(pictures), device=pictures.device)[:, None, None]
        return rearrange(pictures[samples, :, rows[:, :, None], columns[:, None]], "n h w c -> n c h w")

    def _corrected(self, raw: Tensor, given: Tensor) -> Tensor:
        return with_low_frequencies(raw, given) if self.config.color_fix else raw


def input_of(batch: Batch) -> Tensor:
    """The degraded picture at the size of its truth, in [-1, 1]."""
    return unit_to_signed(picture_of(batch, "input"))
