"""Everything about an upscale that follows from sizes and settings alone, worked out once before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..backbone.protocol import BackboneDescriptor
from ..errors import IcmsrError
from ..tiled_vae.tiled import Stripes, is_exact, plan_stripes
from .framing import Framing
from .settings import UpscaleSettings
from .sizes import padded_size
from .tiling import TilePlan, plan_tiles


@dataclass(frozen=True)
class UpscalePlan:
    """How pictures of one size are upscaled. Sizes are (height, width) in pixels."""

    settings: UpscaleSettings
    """What the plan was made from."""
    frame: Framing
    """What of a picture is used, the size that the model works in, and the size of the result."""
    padded: tuple[int, int]
    """Size in which the networks see a result: the frame's `work` padded to multiples of what the family takes."""
    tiles: TilePlan
    """Tiles of the UNet, in latent cells."""
    stripes: Stripes
    """Stripes of the VAE, in latent cells; the same for encoder and decoder."""
    exact: bool
    """Whether the VAE is exact, and not bounded."""

    @property
    def source(self) -> tuple[int, int]:
        """Size of the pictures that it is for."""
        return self.frame.source

    @property
    def target(self) -> tuple[int, int]:
        """Size of the results."""
        return self.frame.target

    def words(self) -> str:
        """Sizes, tiles and what is special about them, for messages."""
        tiles = f"{len(self.tiles)} tile" + "s" * (len(self.tiles) != 1)
        return "; ".join([f"{self.frame.words()}, {tiles}", *map(str, self.frame.remarks())])

    @property
    def steps(self) -> int:
        """Steps that are reported for one picture: its tiles, and its stripes in the encoder and in the decoder."""
        return len(self.tiles) + 2 * self.stripes.number

    def with_batch(self, batch: int) -> UpscalePlan:
        """The same plan with `batch` tiles together in the UNet."""
        return replace(self, settings=replace(self.settings, batch=batch))


def plan_upscale(descriptor: BackboneDescriptor, height: int, width: int, settings: UpscaleSettings) -> UpscalePlan:
    """The plan for pictures of `height` x `width` pixels on a backbone with `descriptor`.

    Raises `IcmsrError` when the overlap is so large that this family's tiles cannot advance.
    """
    frame = settings.frame(height, width)
    padded = padded_size(*frame.work, descriptor)
    factor = descriptor.latent_factor
    rows, columns = padded[0] // factor, padded[1] // factor
    return UpscalePlan(
        settings=settings,
        frame=frame,
        padded=padded,
        tiles=unet_tiles(descriptor, rows, columns, settings),
        stripes=plan_stripes(rows, columns, settings.tile // factor),
        exact=is_exact(settings.vae, *padded),
    )


def unet_tiles(descriptor: BackboneDescriptor, rows: int, columns: int, settings: UpscaleSettings) -> TilePlan:
    """The UNet's tiles of a latent of `rows` x `columns` cells."""
    factor = descriptor.latent_factor
    multiple = descriptor.multiple_of // factor
    if settings.tile == 0:
        return plan_tiles(rows, columns, max(rows, columns), 0, multiple)
    most = settings.tile - descriptor.multiple_of
    if max(rows, columns) * factor > settings.tile and settings.overlap > most:
        raise IcmsrError(
            f"with the family {descriptor.family} a tile of {settings.tile} takes an overlap of at most {most}, got "
            f"{settings.overlap}: try a tile of {2 * settings.tile}"
        )
    return plan_tiles(rows, columns, settings.tile // factor, -(-settings.overlap // factor), multiple)
