"""Where to upscale: a mask, the weights with which the result is blended in, and which tiles it needs. Source: ours.

A mask [1, 1, H, W] is 1 where there is work to do and 0 where the enlarged picture stays; it covers the picture in any
size of its own. Inside the mask the result has weight 1; over the next `MARGIN` pixels it fades out. Tiles of the UNet
that do not reach the area where it has any weight do not run.

With the bounded VAE the parts of the picture around that area run as pictures of their own, with the statistics of the
whole (`tiled_vae.regions`), so VAE and UNet cost nothing elsewhere. The exact VAE needs the whole latent: where no tile
ran it is the encoded picture, matched in mean and deviation to the tiles that did (`regions.matched`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.protocol import BackboneDescriptor
from ..errors import IcmsrError
from ..tiled_vae.regions import Region, matched
from ..tiled_vae.tiled import plan_stripes
from .framing import Framing
from .plan import UpscalePlan, unet_tiles
from .sizes import cut
from .tiling import TilePlan

log = logging.getLogger(__name__)

GRID = 4
"""Pixels of the work per sample of the weights, along each axis."""
GROWN, BLURS = 4, 2
"""Samples by which the mask grows, and how often it is then blurred over 3 x 3 samples."""
MARGIN = GRID * (GROWN + BLURS + 2)
"""Pixels around the mask beyond which nothing changes."""
CONTEXT_CELLS, CONTEXT_PIXELS = 8, 32
"""What the networks see around the area: at least so many latent cells, and so many pixels for the colour correction
(`color.LEVELS`)."""
NEAR_PIXELS = 64
"""Pixels of a block: parts of the mask in neighbouring blocks belong together."""
WORTH_REGIONS = 0.6
"""Share of the picture from which on regions of their own gain nothing."""


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """How one picture is upscaled under a mask."""

    grid: Tensor
    """Weights of the result, one sample for each `GRID` pixels of the work along each axis: [1, 1, h, w]."""
    tiles: TilePlan
    """The UNet's tiles that are needed, where the VAE runs over the whole picture."""
    regions: tuple[Region, ...]
    """With the bounded VAE, the parts that run; empty where the VAE runs over the whole picture."""
    region_tiles: tuple[TilePlan, ...]
    """The UNet's tiles of each region, in its own cells."""
    stripes: int
    """Stripes of the VAE that run, in the encoder as in the decoder."""

    @property
    def tile_count(self) -> int:
        """Tiles of the UNet that run."""
        return sum(map(len, self.region_tiles)) if self.regions else len(self.tiles)

    @property
    def steps(self) -> int:
        """As those of an `UpscalePlan`."""
        return self.tile_count + 2 * self.stripes

    def words(self, plan: UpscalePlan) -> str:
        """What runs of `plan`, for messages."""
        parts = f", in {len(self.regions)} part{'s' * (len(self.regions) != 1)} of the picture" if self.regions else ""
        whole = "" if self.regions else "; the VAE runs over all of it"
        tiles = f"{self.tile_count} tile{'s' * (self.tile_count != 1)}"
        return f"{tiles} instead of {len(plan.tiles)}{parts}{whole}"

    def weights(self, rows: slice, columns: slice) -> Tensor:
        """The weights of these rows and columns of the work: [1, 1, h, w] in [0, 1], float32, on the CPU."""
        # With one more sample on each side, so that every part is the same as in the whole.
        top, left = max(0, rows.start // GRID - 1), max(0, columns.start // GRID - 1)
        part = self.grid[:, :, top : -(-rows.stop // GRID) + 1, left : -(-columns.stop // GRID) + 1]
        large = F.interpolate(part, scale_factor=GRID, mode="bilinear")
        down, right = rows.start - top * GRID, columns.start - left * GRID
        return large[:, :, down : down + rows.stop - rows.start, right : right + columns.stop - columns.start]


def checked_mask(mask: Tensor, pictures: int) -> Tensor:
    """`mask` [1 or N, H, W] or [H, W] as [1 or N, 1, H, W], float32 in [0, 1]; logs once which maps are all 0.

    Raises `IcmsrError` for another shape, another number of maps than 1 or `pictures`, and values that are not finite.
    """
    maps = mask[None] if mask.ndim == 2 else mask
    if maps.ndim != 3 or not maps.numel():
        raise IcmsrError(f"mask: must be a MASK [pictures, height, width], got {list(mask.shape)}: check its node")
    if maps.shape[0] not in (1, pictures):
        raise IcmsrError(
            f"mask: must hold 1 map for all pictures or one for each of the {pictures}, got {maps.shape[0]}"
        )
    if not bool(maps.isfinite().all()):
        raise IcmsrError("mask: NaN or infinite values: check the node that made it")
    maps = maps.detach().float().clamp(0, 1).cpu()[:, None]
    empty = [number + 1 for number, one in enumerate(maps) if not bool(one.any())]
    if empty:
        which = "" if len(maps) == 1 else f" for picture {', '.join(map(str, empty))}"
        log.warning("the mask is all 0%s: the whole picture is upscaled", which)
    return maps


def plan_mask(descriptor: BackboneDescriptor, plan: UpscalePlan, mask: Tensor) -> MaskPlan | None:
    """How `plan` runs under `mask` [1, 1, H, W] in [0, 1]; None where it restricts nothing: all 0, or 1 everywhere."""
    if not bool(mask.any()):
        return None
    grid = blend_grid(mask, plan.frame)
    if bool((grid == 1).all()):
        return None
    if not bool(grid.any()):  # only what the frame crops away
        return None
    regions: tuple[Region, ...] = ()
    if not plan.exact and plan.stripes.number > 1:
        regions = tuple(_regions(descriptor, plan, grid))
        area = sum(region.height * region.width for region in regions)
        if area > WORTH_REGIONS * plan.tiles.height * plan.tiles.width:
            regions = ()
    return MaskPlan(
        grid=grid,
        tiles=_reached(plan.tiles, grid, descriptor.latent_factor),
        regions=regions,
        region_tiles=tuple(unet_tiles(descriptor, one.height, one.width, plan.settings) for one in regions),
        stripes=sum(one.stripes.number for one in regions) if regions else plan.stripes.number,
    )


def blend_grid(mask: Tensor, frame: Framing) -> Tensor:
    """The `grid` of a `MaskPlan` for `mask` [1, 1, H, W]: 1 in and right next to the mask, falling to 0 in `MARGIN`."""
    part = cut(mask, frame)
    size = [-(-side // GRID) for side in frame.work]
    # The largest value of what a sample covers, so that a thin line is not lost.
    fewer = [min(own, side) for own, side in zip(part.shape[2:], size)]
    part = F.interpolate(F.adaptive_max_pool2d(part, fewer), size, mode="nearest-exact")
    for kernel in ((2 * GROWN + 1, 1), (1, 2 * GROWN + 1)):
        part = F.max_pool2d(part, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
    for _ in range(BLURS):
        part = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return part


def filled(clean: Tensor, latent: Tensor, tiles: TilePlan) -> Tensor:
    """`clean` [1, C, h, w], what `run_tiles` makes of `tiles` of `latent` [1, C, h, w], made whole.

    Where no tile ran, and as far as a tile that did not run would have been blended in, it is `matched` to the rest.
    """
    latent, window = latent.to(clean.device), tiles.windows(clean.device)
    covered = torch.zeros(clean.shape[2:], device=clean.device)
    for box in tiles.boxes:
        covered[box.slices()] += window(box)
    inside = covered > 0.999
    if not bool(inside.any()):  # a tile so small that it has no middle
        inside = covered > 0
    other = matched(latent, [latent[0, :, inside]], [(clean / covered.clamp_min(1e-3))[0, :, inside]])
    return torch.lerp(other, clean / covered.clamp_min(1e-6), covered.clamp(0, 1))


def _reached(tiles: TilePlan, grid: Tensor, factor: int) -> TilePlan:
    """The tiles whose results the networks see around the area where the weights are above 0."""
    context = max(CONTEXT_CELLS, CONTEXT_PIXELS // factor)
    used = (grid[0, 0] > 0).double()
    sums = F.pad(used, (1, 0, 1, 0)).cumsum(0).cumsum(1)  # of everything above and to the left
    height, width = used.shape

    def reaches(box_rows: tuple[int, int], box_columns: tuple[int, int]) -> bool:
        first, last = (_clip((cell * factor) // GRID, height) for cell in box_rows)
        begin, end = (_clip((cell * factor) // GRID, width) for cell in box_columns)
        return bool(sums[last, end] - sums[first, end] - sums[last, begin] + sums[first, begin] > 0.5)

    kept = [
        box
        for box in tiles.boxes
        if reaches(
            (box.rows.fade_in[0] - context, box.rows.fade_out[1] + context),
            (box.columns.fade_in[0] - context, box.columns.fade_out[1] + context),
        )
    ]
    return TilePlan(tiles.height, tiles.width, tuple(kept))


def _clip(value: int, most: int) -> int:
    return max(0, min(value, most))


def _regions(descriptor: BackboneDescriptor, plan: UpscalePlan, grid: Tensor) -> list[Region]:
    """The parts of the latent around the area where the weights are above 0, in cells; none touch."""
    factor, multiple = descriptor.latent_factor, descriptor.multiple_of // descriptor.latent_factor
    context = max(CONTEXT_CELLS, CONTEXT_PIXELS // factor)
    whole = plan.tiles.height, plan.tiles.width
    boxes = []
    for top, left, bottom, right in _components(grid[0, 0] > 0):
        edges = [GRID * top // factor, GRID * left // factor, -(-GRID * bottom // factor), -(-GRID * right // factor)]
        first, begin = (max(0, (edge - context) // multiple * multiple) for edge in edges[:2])
        last, end = (min(most, -(-(edge + context) // multiple) * multiple) for edge, most in zip(edges[2:], whole))
        boxes.append((first, begin, last, end))
    found = []
    for top, left, bottom, right in _merged(boxes):
        height, width = bottom - top, right - left
        stripes = plan_stripes(height, width, plan.settings.tile // factor)
        found.append(Region(top, left, height, width, stripes))
    return found


Edges = tuple[int, int, int, int]
"""Top, left, bottom and right of a box."""


def _components(used: Tensor) -> list[Edges]:
    """Boxes around the parts of `used` [h, w] that lie in neighbouring blocks."""
    side = NEAR_PIXELS // GRID
    blocks = F.max_pool2d(used[None, None].float(), side, ceil_mode=True)[0, 0]
    left: set[tuple[int, int]] = {(row, column) for row, column in blocks.nonzero().tolist()}
    boxes = []
    while left:
        queue = [left.pop()]
        for row, column in queue:  # grows while it is read
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            queue += near
        rows, columns = ([place[axis] for place in queue] for axis in (0, 1))
        top, start = min(rows) * side, min(columns) * side
        inside = used[top : (max(rows) + 1) * side, start : (max(columns) + 1) * side].nonzero()
        (first, begin), (last, end) = inside.min(0).values.tolist(), inside.max(0).values.tolist()
        boxes.append((top + first, start + begin, top + last + 1, start + end + 1))
    return boxes


def _merged(boxes: list[Edges]) -> list[Edges]:
    """`boxes` of which each two that meet, or cost no more as one, are one, until there are no such."""
    boxes = list(boxes)
    index = 0
    while index < len(boxes):
        for other in range(index + 1, len(boxes)):
            one, two = boxes[index], boxes[other]
            both = (min(one[0], two[0]), min(one[1], two[1]), max(one[2], two[2]), max(one[3], two[3]))
            meet = one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
            if meet or _area(both) <= _area(one) + _area(two):
                boxes[index] = both
                del boxes[other]
                index = -1
                break
        index += 1
    return boxes


def _area(box: Edges) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
