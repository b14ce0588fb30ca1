"""A backbone whose result is known in closed form."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.backbone.vae_steps import Pointwise, VaeHalf

Map = Callable[[torch.Tensor], torch.Tensor]


class Toy:
    """A backbone without loss: the VAE moves pixels into channels and back, the UNet is a given function."""

    def __init__(
        self, output: Map = torch.zeros_like, prediction: str = "residual", timestep: int = 200, **options
    ) -> None:
        values = {"family": "toy", "latent_channels": 192, "latent_factor": 8, "multiple_of": 16}
        self.descriptor = BackboneDescriptor(**{**values, **options}, timestep=timestep, prediction=prediction)
        self.output = output
        self.tone = 0.0
        self.seen: list[tuple[str, tuple[int, ...]]] = []
        self.timesteps: set[int] = set()
        self.pixels: list[int] = []

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(("encode", tuple(image.shape)))
        return F.pixel_unshuffle(image, 8)

    def vae_half(self, part: str, pixels: int) -> VaeHalf:
        self.pixels.append(pixels)
        step = Pointwise(self.encode, down=8) if part == "encoder" else Pointwise(self.decode, up=8)
        return VaeHalf((step,), torch.device("cpu"))

    def predict_noise(self, latent, timestep, features=None) -> torch.Tensor:
        self.seen.append(("unet", tuple(latent.shape)))
        self.timesteps.add(timestep)
        return self.output(latent)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        self.seen.append(("decode", tuple(latent.shape)))
        return F.pixel_shuffle(latent, 8) + self.tone
