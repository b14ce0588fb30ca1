"""What a distillation trains, and with which losses: the settings of train/distill.py's generator."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ...backbone.prediction import check_prediction
from ...errors import IcmsrError
from ...measures.weight_files import DISTS
from ..data.draws import TimestepConfig
from ..losses.perceptual import PerceptualConfig
from ..networks.generator import NetworksConfig
from ..settings import ADDED


@dataclass(frozen=True)
class LossWeights:
    """Weights of the generator's losses; a term of weight 0 is not computed."""

    l2: float = 1.0
    """Mean squared error on [-1, 1]."""
    perceptual: float = 2.0
    """The perceptual distance (`generator.perceptual`)."""
    icm: float = 1.0
    """The ICM regulariser."""
    charbonnier: float = 0.0
    """Charbonnier (smooth L1) distance (ours)."""
    gradient: float = 0.0
    """L1 of image gradients (ours)."""
    fourier: float = 0.0
    """L1 of Fourier magnitudes (ours)."""
    spectrum: float = 0.0
    """Log ratio of local amplitudes (ours; `reconstruction.local_spectrum`)."""
    autoencoder: float = 0.0
    """Charbonnier distance and half the L1 of gradients between the truth and what the decoder makes of the base's own
    latent of it; with `networks.train_decoder` (ours). It keeps the decoder that of the base's latent, and the run
    exports a base with it."""
    latent: float = field(default=0.0, metadata=ADDED)
    """L1 distance between the generator's latent and the truth's own, in the base's encoder (ours). It keeps the latent
    in the code that decoder and teacher know. With `latents.pairs` the only term besides ICM."""
    dists: float = field(default=0.0, metadata=ADDED)
    """DISTS, the distance in structure and texture (ours; needs `perceptual.dists_weights`)."""
    lattice: float = field(default=0.0, metadata=ADDED)
    """L1 distance between the shares of a cell's positions in the contrast (ours; `lattice.lattice_l1`): against weaves
    with the period of the latent's cells and staircases on slanted edges."""
    tone: float = 0.0
    """Charbonnier distance before the colour correction, with `GeneratorConfig.color_fix`: ties the tone loosely."""
    warmup: dict[str, int] = field(default_factory=dict)
    """Images over which a term's weight rises from 0, by its name: {icm: 4000}."""

    def __post_init__(self) -> None:
        terms = self.terms()
        if not all(0 <= weight < float("inf") for weight in terms.values()):
            raise IcmsrError(f"loss weights must not be negative, got {terms}")
        if not any(terms.values()):
            raise IcmsrError("every loss weight is 0: nothing would be trained")
        unknown = sorted(set(self.warmup) - set(terms))
        if unknown or any(images < 0 for images in self.warmup.values()):
            raise IcmsrError(f"losses.warmup takes images by term ({', '.join(terms)}), got {self.warmup}")

    def terms(self) -> dict[str, float]:
        """The weights by name."""
        return {name: value for name, value in asdict(self).items() if name != "warmup"}

    def at(self, images: int) -> dict[str, float]:
        """The weights at a position of the run, warm-up included, without those of terms that are never used."""
        return {
            name: weight * min(1.0, images / self.warmup[name] if self.warmup.get(name) else 1.0)
            for name, weight in self.terms().items()
            if weight
        }


@dataclass(frozen=True)
class GeneratorConfig:
    """What the generator is and how it is trained."""

    timestep: int = 999
    """The one input timestep."""
    prediction: str = "eps"
    """What the generator's UNet output means: eps, v, or residual (x0 = z - output)."""
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    """Which weights are trained."""
    losses: LossWeights = field(default_factory=LossWeights)
    """Weights of the losses."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual term."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """Where the regulariser draws its timesteps."""
    gradient_floor: float = 1e-4
    """Floor under the normaliser of the ICM gradient."""
    auxiliary_steps: int = 1
    """Optimiser steps of the auxiliary in each step of the generator."""
    auxiliary_learning_rate: float = 1.0
    """The auxiliary's learning rate over the generator's."""
    color_fix: bool = False
    """Measure the losses after the wavelet colour correction, as inference applies it (ours): a small network then
    spends its capacity on detail and leaves the low frequencies to the input."""
    licence: str = "Apache-2.0"
    """Licence of the exported weights (SPDX)."""

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if self.auxiliary_steps < 1:
            raise IcmsrError(f"auxiliary_steps must be at least 1, got {self.auxiliary_steps}")
        for name in ("auxiliary_learning_rate", "gradient_floor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IcmsrError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.losses.icm and self.networks.train_decoder:
            raise IcmsrError(
                "losses.icm needs a frozen decoder: the teacher judges latents of the base, and a decoder that is "
                "trained moves away from them: set networks.train_decoder to false, or losses.icm to 0"
            )
        if self.networks.weights == "decoder" and (self.losses.icm or self.losses.latent):
            raise IcmsrError(
                "losses.icm and losses.latent have nothing to train with networks.weights decoder, for the latents "
                f"stay as they are: set both to 0, got {self.losses.icm} and {self.losses.latent}"
            )
        if self.networks.weights == "decoder" and self.losses.perceptual and self.perceptual.kind == "decoder":
            raise IcmsrError(
                "perceptual.kind decoder compares latents, which stay as they are with networks.weights decoder: set "
                "it to lpips or none, or losses.perceptual to 0"
            )
        both = self.perceptual.kind == "lpips" and self.losses.perceptual and self.losses.dists
        if self.perceptual.split and not both:
            raise IcmsrError(
                "perceptual.split shares the samples between LPIPS-VGG and DISTS: set perceptual.kind to lpips and "
                "losses.perceptual and losses.dists above 0, or perceptual.split to false"
            )
        if self.losses.dists and not self.perceptual.dists_weights:
            raise IcmsrError(
                "losses.dists needs the weights of DISTS: set perceptual.dists_weights to the file that "
                f"`{DISTS.command}` makes, or losses.dists to 0"
            )
        if self.losses.autoencoder and not self.networks.train_decoder:
            raise IcmsrError(
                "losses.autoencoder trains the decoder: set networks.train_decoder to true, or losses.autoencoder to 0"
            )
