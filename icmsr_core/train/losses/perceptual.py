"""The perceptual term of the generator's loss, of two kinds, both a mean over the samples of a batch.

``decoder`` (the default) compares feature maps of the frozen VAE decoder: no download, and the pass that makes the
picture makes the features too. ``lpips`` compares pictures with LPIPS-VGG and needs its converted weights. With
``perceptual = make_perceptual(config, vae, device)``:

    decoder:  image, features = perceptual.decode(x0)              # in place of vae.decode(x0 / scaling).sample
              loss = perceptual.distance(features, perceptual.features(latent_of_truth))
    lpips:    loss = perceptual(result, truth)                     # pictures in [-1, 1]
    none:     perceptual is None

`x0` and `latent_of_truth` are scaled latents, as the UNet sees them. The truth's latent should come from an encoder
that does not train, or the target moves with the generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...errors import IcmsrError
from ...measures.lpips import Lpips, load_lpips
from ...measures.weight_files import DISTS, LPIPS_VGG
from ..settings import ADDED

LARGEST_SHIFT = 15
"""All places within the 16 pixels over which VGG pools at most."""
PERCEPTUAL_KINDS = ("none", "decoder", "lpips")


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual distance between the result and the truth."""

    kind: str = "decoder"
    """none, decoder (features of the frozen VAE decoder, no download) or lpips (LPIPS-VGG, needs `weights`)."""
    weights: str = ""
    """The file lpips_vgg.safetensors that train/metric_weights.py makes; for kind lpips only."""
    levels: int = 3
    """Feature maps that kind decoder compares, counted from the latent's resolution up: the middle block, then each up
    block. The fine ones reward blur more: see `feature_distance`, whose 48% at 3 levels is 41% at 5."""
    precision: str = field(default="fp32", metadata=ADDED)
    """What the networks of LPIPS-VGG and DISTS compute in: fp32, or bf16, which is faster on cards and on CPUs with
    instructions for it; the comparison of their features stays in fp32."""
    shift: int = field(default=0, metadata=ADDED)
    """LPIPS-VGG and DISTS look at each sample from a random corner, up to so many pixels further down and to the right.
    VGG pools over 2, 4, 8 and 16 pixels, and a VAE's cells are 4 or 8 pixels wide: where the two grids always coincide,
    a generator can learn patterns of that period which the loss hardly sees (ours). 0: never shifted."""
    split: bool = field(default=False, metadata=ADDED)
    """LPIPS-VGG looks at every second sample of a batch, DISTS at the others: each pass through VGG costs more than
    everything else, and one network for a sample gives more samples an hour than two. For batches of two and more."""
    dists_weights: str = field(default="", metadata=ADDED)
    """The file dists.safetensors that train/metric_weights.py makes; for `losses.dists` only."""

    def __post_init__(self) -> None:
        if self.kind not in PERCEPTUAL_KINDS:
            raise IcmsrError(f"perceptual.kind must be one of {', '.join(PERCEPTUAL_KINDS)}, got {self.kind!r}")
        if self.levels < 1:
            raise IcmsrError(
                f"perceptual.levels must be 1 or more, got {self.levels}: to train without, set perceptual.kind to none"
            )
        if not 0 <= self.shift <= LARGEST_SHIFT:
            raise IcmsrError(f"perceptual.shift must be 0 to {LARGEST_SHIFT} pixels, got {self.shift}")
        if self.precision not in ("fp32", "bf16"):
            raise IcmsrError(f"perceptual.precision must be fp32 or bf16, got {self.precision!r}")
        if self.kind == "lpips" and not (self.weights and Path(self.weights).is_file()):
            raise IcmsrError(
                "perceptual.weights must be the path of the converted LPIPS file when perceptual.kind is lpips, got "
                f"{self.weights!r}{' (no such file)' if self.weights else ''}: make it with `{LPIPS_VGG.command}`, or "
                "set perceptual.kind=decoder, which needs no download"
            )
        if self.dists_weights and not Path(self.dists_weights).is_file():
            raise IcmsrError(
                f"perceptual.dists_weights must be the path of the converted DISTS file, got {self.dists_weights!r} "
                f"(no such file): make it with `{DISTS.command}`"
            )


class DecoderPerceptual:
    """Distance of the feature maps that a frozen VAE decoder makes of two latents.

    After Berrada et al. 2025, "Boosting latent diffusion with perceptual objectives"; normalisation and choice of
    levels are ours (`feature_distance`). It holds the VAE and adds no parameters.
    """

    def __init__(self, vae: AutoencoderKL, levels: int = 3) -> None:
        """Raises `IcmsrError` when the decoder is not frozen, or has fewer than `levels` feature maps.

        A decoder that trains would change the measure along with the result. To use this distance with one, pass
        a frozen copy of the VAE: its `decode` then makes the copy's picture, at the cost of a second pass.
        """
        blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
        if levels > len(blocks):
            raise IcmsrError(
                f"perceptual.levels must be 1 to {len(blocks)} for this VAE (its decoder's middle block and "
                f"{len(blocks) - 1} up blocks), got {levels}"
            )
        parts = [vae.decoder, *([] if vae.post_quant_conv is None else [vae.post_quant_conv])]
        if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
            raise IcmsrError(
                "perceptual.kind=decoder measures with the VAE's decoder, which must be frozen, but this one is "
                "trained: set networks.train_decoder to false, or perceptual.kind to lpips or none"
            )
        self._vae, self._blocks = vae, blocks[:levels]

    def decode(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Picture [N, 3, H, W] in [-1, 1], float32, and feature maps of one decoder pass over the scaled `latent`.

        The picture is ``vae.decode(latent / scaling_factor).sample`` bit for bit. Gradients reach `latent` through
        both, under gradient checkpointing too. Raises `IcmsrError` when the VAE decodes in slices or tiles.
        """
        with self._collected() as features:
            image = self._run(latent)
        return image, features

    @torch.no_grad()
    def features(self, latent: Tensor) -> list[Tensor]:
        """The feature maps alone, without gradients, for the truth; the pass ends at the last one that is wanted."""
        with self._collected(stop=True) as features, suppress(_Enough):
            self._run(latent)
        return features

    def distance(self, features: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
        """`feature_distance` of what `decode` or `features` returned."""
        return feature_distance(features, truth)

    def _run(self, latent: Tensor) -> Tensor:
        vae = self._vae
        if vae.use_slicing or vae.use_tiling:
            raise IcmsrError(
                "decoder features need whole batches, but the VAE decodes in slices or tiles: call "
                "vae.disable_slicing() and vae.disable_tiling()"
            )
        image: Tensor = vae.decode((latent / vae.config.scaling_factor).to(vae.dtype)).sample
        return image.float()

    @contextmanager
    def _collected(self, stop: bool = False) -> Iterator[list[Tensor]]:
        features: list[Tensor] = []

        def collect(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            features.append(output)
            if stop and len(features) == len(self._blocks):
                raise _Enough

        hooks = [block.register_forward_hook(collect) for block in self._blocks]
        try:
            yield features
        finally:
            # Gone before backward: the recomputation of a checkpointed block must not collect it a second time.
            for hook in hooks:
                hook.remove()


class _Enough(Exception):
    """Ends a decoder pass behind the last block that is wanted."""


def feature_distance(features: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """Distance of two lists of feature maps [N, C, H, W], a scalar in [0, 4]; float32, the truth's side constant.

    Each map is standardised by the truth's mean and deviation of every channel, sample by sample, then scaled to unit
    length along the channels at every position, as LPIPS does; squared differences are summed over channels and
    averaged over positions, samples and levels (ours). Standardising keeps a decoder's few huge channels from drowning
    the rest; the unit length bounds what one position can add. The form was chosen on 17 pairs of RealSR with the first
    nano's VAE; on the other 83 (256 px), at 3 levels, a sharp restored picture (OSEDiff's) comes nearer to the truth
    than a bicubic one in 48%, against 39% without standardising, 31% to 34% for L1, L2 and logarithmic distances of
    standardised maps, and 18% for L1 of pixels: less fond of blur than those, yet no preference for detail by itself.
    Raises `IcmsrError` when the lists do not match.
    """
    shapes, truth_shapes = ([list(entry.shape) for entry in side] for side in (features, truth))
    if not features or shapes != truth_shapes:
        raise IcmsrError(f"feature maps of result and truth must have the same shapes, got {shapes} and {truth_shapes}")
    with torch.autocast(features[0].device.type, enabled=False):
        levels = [_level_distance(left.float(), right.detach().float()) for left, right in zip(features, truth)]
        return torch.stack(levels).mean()


def _level_distance(result: Tensor, truth: Tensor) -> Tensor:
    mean = truth.mean((2, 3), keepdim=True)
    # The floor keeps a channel that is flat in this truth from being amplified noise: 1% of the channel's own size
    # (bfloat16 keeps 0.4%) and 0.1% of the whole map's.
    size = truth.square().mean((2, 3), keepdim=True)
    floor = 1e-4 * size + 1e-6 * size.mean(1, keepdim=True) + 1e-12
    deviation = (truth.var((2, 3), keepdim=True, unbiased=False) + floor).sqrt()
    return (_unit((result - mean) / deviation) - _unit((truth - mean) / deviation)).square().sum(1).mean()


def _unit(features: Tensor) -> Tensor:
    # A tenth of a deviation per channel under the root: where a position is the mean itself, its direction is noise.
    return features / (features.square().sum(1, keepdim=True) + 0.01 * features.shape[1]).sqrt()


def make_perceptual(
    config: PerceptualConfig, vae: AutoencoderKL, device: torch.device
) -> DecoderPerceptual | Lpips | None:
    """What `config` asks for, LPIPS on `device`; None for kind ``none``. Raises `IcmsrError` (see the classes)."""
    if config.kind == "decoder":
        return DecoderPerceptual(vae, config.levels)
    if config.kind == "lpips":
        return load_lpips(Path(config.weights), bf16=config.precision == "bf16").to(device)
    return None
