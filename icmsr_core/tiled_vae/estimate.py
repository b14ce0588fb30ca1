"""Estimates, from a part of a picture, what a VAE's GroupNorms and attention would see of all of it. Source: ours.

1. The picture is cut into small fields, and cheap features (means, products, differences) are computed of all of them.
2. Fields are drawn, the more unusual ones with a higher chance: sampling with probability proportional to size,
   systematic, without random numbers.
3. Their weights are changed so that their features add up to those of the whole picture: calibration (Deville and
   Sarndal 1992).
4. The drawn fields run through the network together, and the weighted statistics of their maps are the estimate. Each
   runs in a window with the picture around it, for a field that ended in zeros would look like a picture's corner. The
   margin of a window counts in no statistics, ends where the picture ends, and is narrowed before a map grows, because
   the layers after that see less far.

A reduced picture is no substitute: its spatial frequencies differ. Nor are random places: a black frame or a patch of
sky can decide the variance, and so few places would not hit it in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..backbone.vae_steps import Attention, Pointwise, Sample, VaeHalf
from ..transfer import to_device
from .held_map import HeldMap
from .modes import Estimate, ExactStream, Statistics, combine
from .stream import STRIPE_BYTES, Flow
from .striped_layers import even_parts

FIELD, FIELD_MARGIN = 4, 4
"""Side of a field in latent cells, and the margin that its window shows on each side: in cells where the encoder
begins, in samples of the map wherever the decoder has just grown. On a mosaic of photographs of 1024 px
(`benchmarks/tiled_vae.py`) the embedded VAE's encoder and decoder were 31 and 39 dB from exact without a margin; around
fields of 8 cells 58 and 59 dB with a margin of 2, 68 and 67 with 3, 72 and 71 with 4, 75 and 72 with 6."""
DRAWN_SHARE, FEWEST, LARGEST = 1 / 8, 128, 3 * 2**18
"""Limits of all windows together: the largest share of the picture, the least number in any case, and the largest area
in pixels."""
RIDGE = 0.1
"""Penalty for changing the sampling weights, relative to that for a feature's error in standard deviations."""
LAGS = (1, 4)
"""Distances, in samples, of the differences that are features. Each channel has its own: with one feature for all
channels a VAE of factor 8 and 12 channels was 47 dB from exact on a mosaic of 2048 px, with one for each 57."""
TOGETHER_BYTES = 64 * 2**20
"""Most bytes of the fields that are measured together on an accelerator, where each call costs time of its own. On a
CPU that is `STRIPE_BYTES`, for its cache."""
CROSSED = 4
"""Largest number of channels with which products of two channels are features: their number grows with its square."""


class Fields(NamedTuple):
    """The drawn fields of a picture, and how much of it each stands for."""

    corners: list[tuple[int, int]]
    """Top and left of each, in cells."""
    size: tuple[int, int]
    """Height and width, in cells."""
    weights: Tensor
    """Float64 [number of fields], above 0; they add up to 1."""


def estimate_whole(half: VaeHalf, source: Tensor, unit: int, factor: int, tile: int) -> Estimate:
    """What a `BoundedStream` of `half` has to know about the whole of `source` [1, C, H, W]. Deterministic.

    A latent cell is `unit` samples of `source` and `factor` pixels of the picture along each axis. The convolutions
    need the memory of a tile of `tile` x `tile` cells.
    """
    fields = draw_fields(source, unit, factor)
    cells = source.shape[2] // unit, source.shape[3] // unit
    return estimate_fields(half, Frame.at(fields, cells, unit), field_windows(source, fields, unit), tile)[0]


def field_windows(source: Tensor, fields: Fields, unit: int) -> Tensor:
    """The windows of `fields` in `source` [1, C, H, W], `unit` samples to a cell: [N, C, h, w]."""
    frame = Frame.at(fields, (source.shape[2] // unit, source.shape[3] // unit), unit)
    rows, columns = frame.window
    return torch.cat(
        [source[:, :, top : top + rows, left : left + columns] for top, left in map(frame.start, fields.corners)]
    )


def estimate_fields(half: VaeHalf, frame: Frame, windows: Tensor, tile: int) -> tuple[Estimate, Tensor]:
    """`estimate_whole` from `windows` [N, C, h, w] that lie as in `frame`, and what `half` makes of them.

    Of an encoder that is the windows of the same fields in the latent, [N, C', h', w'].
    """
    stream = _SampledStream(half, frame)
    nominal = frame.scale * max(1, tile * tile * frame.scale // (windows.shape[0] * windows.shape[3]))
    found = torch.cat(list(stream.through(half.steps, stream.source(windows, nominal)).chunks), 2)
    return Estimate(stream.statistics, stream.samples), found


class Frame(NamedTuple):
    """Where the fields and their windows lie in the maps of one scale."""

    fields: Fields
    cells: tuple[int, int]
    """Height and width of the picture, in cells."""
    scale: int
    """Samples of a map per cell, along each axis."""
    margin: int
    """Samples of a map on each side of a field."""

    @classmethod
    def at(cls, fields: Fields, cells: tuple[int, int], unit: int) -> Frame:
        """Where `fields` lie in what a half of the VAE is given, `unit` samples to a cell."""
        return cls(fields, cells, unit, FIELD_MARGIN * unit)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of a window in samples."""
        rows, columns = (
            min(cells * self.scale, size * self.scale + 2 * self.margin)
            for cells, size in zip(self.cells, self.fields.size)
        )
        return rows, columns

    def start(self, corner: tuple[int, int]) -> tuple[int, int]:
        """Top and left, in the map, of the window of the field at `corner`. At an edge it is moved into the map."""
        top, left = (
            min(max(0, place * self.scale - self.margin), cells * self.scale - size)
            for place, cells, size in zip(corner, self.cells, self.window)
        )
        return top, left

    def cut(self, windows: HeldMap, margin: int) -> Iterator[Tensor]:
        """`windows` [N, C, h, w] narrowed to a smaller `margin`, some of them at a time: [n, C, h', w'] each."""
        to = self._replace(margin=margin)
        starts = torch.tensor([[*self.start(corner), *to.start(corner)] for corner in self.fields.corners])
        starts = starts[:, 2:] - starts[:, :2]
        for begin, end in _portions(len(starts), windows.nbytes // len(starts), windows.device):
            yield _crops(windows.joined(slice(begin, end)), starts[begin:end], to.window)


def _crops(maps: Tensor, starts: Tensor, size: tuple[int, int]) -> Tensor:
    """Of each of `maps` [N, C, h, w] the part that begins at its row of `starts` [N, 2]: [N, C, *size], channels last.

    `starts` are the top and the left, on the CPU.
    """
    entries = torch.arange(len(starts))[:, None]
    down, right = (starts[:, axis, None] + torch.arange(size[axis]) for axis in (0, 1))
    places = to_device(torch.cat([entries, down, right], 1), maps.device)  # in one copy
    entries, down, right = places.split((1, *size), 1)
    return rearrange(maps[entries[..., None], :, down[..., None], right[:, None]], "n h w c -> n c h w")


def _portions(number: int, size: int, device: torch.device) -> list[tuple[int, int]]:
    """`number` tensors of `size` bytes each in portions that run together on `device`: (begin, end) of each."""
    return even_parts(number, max(1, STRIPE_BYTES.get(device.type, TOGETHER_BYTES) // size))


class _SampledStream(ExactStream):
    """Runs the windows as a batch. Its statistics are the estimates for the whole picture."""

    def __init__(self, half: VaeHalf, frame: Frame) -> None:
        super().__init__(half, 2)
        self.samples: dict[Attention, Sample] = {}
        """For every attention that has run, the drawn fields of its map."""
        self._frame = frame

    def measure(self, groups: int, held: HeldMap) -> Statistics:
        weights = self._frame.fields.weights
        return combine(weights, *self.moments_of(groups, self._frame.cut(held, 0), len(weights)))

    def _pointwise(self, step: Pointwise, flow: Flow) -> Flow:
        if step.up > 1:
            narrow = min(self._frame.margin, -(-FIELD_MARGIN // step.up))
            windows = torch.cat(list(self._frame.cut(self.store(flow), narrow)))
            flow = self.source(windows, flow.nominal)
            self._rescale(step.up, 1, narrow)
        elif step.down > 1:
            self._rescale(1, step.down, self._frame.margin)
        return super()._pointwise(step, flow)

    def _convolved(self, module: nn.Conv2d, stride: int, flow: Flow) -> Flow:
        self._rescale(1, stride, self._frame.margin)
        return super()._convolved(module, stride, flow)

    def _rescale(self, up: int, down: int, margin: int) -> None:
        self._frame = self._frame._replace(scale=self._frame.scale * up // down, margin=margin * up // down)

    def _attended(self, step: Attention, flow: Flow) -> Flow:
        # All windows in one row: each looks at all fields, because they stand for the whole picture.
        held = self.store(flow)
        windows = held.joined().to(self.half.device)
        fields = torch.cat(list(self._frame.cut(held, 0))).to(self.half.device)
        places = fields.shape[2] * fields.shape[3]
        shares = (self._frame.fields.weights / places).float().repeat_interleave(places)
        total = self._frame.cells[0] * self._frame.cells[1] * self._frame.scale**2
        sample = self.samples[step] = Sample(
            rearrange(fields, "n c h w -> 1 c (n h w)"), to_device(shares, fields.device), total
        )
        row = rearrange(windows, "n c h w -> 1 c (n h) w")
        found = step.run(row, None, sample)
        return self.source(rearrange(found, "1 c (n h) w -> n c h w", n=windows.shape[0]), flow.nominal)


def drawn_windows(height: int, width: int, factor: int) -> tuple[int, int]:
    """Largest number of fields that are drawn of `height` x `width` cells, and the area of a window in cells."""
    window = min(FIELD + 2 * FIELD_MARGIN, height) * min(FIELD + 2 * FIELD_MARGIN, width)
    number = max(min(int(DRAWN_SHARE * height * width / window), LARGEST // (window * factor**2)), FEWEST)
    return min(number, -(-height // FIELD) * -(-width // FIELD)), window


def draw_fields(source: Tensor, unit: int, factor: int) -> Fields:
    """Draws and weights the fields of `source` [1, C, H, W]; `unit` and `factor` as in `estimate_whole`."""
    height, width = source.shape[2] // unit, source.shape[3] // unit
    rows, columns = min(FIELD, height), min(FIELD, width)
    tops, lefts = _starts(height, rows), _starts(width, columns)
    count, _ = drawn_windows(height, width, factor)
    features = _features_of(
        source, [top * unit for top in tops], [left * unit for left in lefts], (rows * unit, columns * unit)
    )
    # Rows in turn from left to right and from right to left, so that neighbours in this order are neighbours in the
    # picture.
    numbers = torch.arange(len(features)).unflatten(0, (len(tops), len(lefts)))
    numbers[1::2] = numbers[1::2].flip(1)
    order = numbers.flatten()
    corners = [(tops[number // len(lefts)], lefts[number % len(lefts)]) for number in order.tolist()]
    every = features[order]
    # The distance of each feature from its mean, in standard deviations; 0 where it is the same everywhere.
    off = (every - every.mean(0)) / every.std(0, correction=0).clamp_min(1e-6)
    chosen, chances = draw(1 + off.square().mean(1), count)
    weights = calibrate(off[chosen], 1 / chances)
    chosen, weights = chosen[weights > 0], weights[weights > 0]
    return Fields([corners[index] for index in chosen.tolist()], (rows, columns), weights)


def _starts(length: int, size: int) -> list[int]:
    """Where fields of `size` begin that cover [0, length) evenly; the last one ends at `length`."""
    count = -(-length // size)
    return [index * (length - size) // max(1, count - 1) for index in range(count)]


def _features_of(source: Tensor, tops: list[int], lefts: list[int], size: tuple[int, int]) -> Tensor:
    """`_features` of the fields of `size` that begin at `tops` and `lefts` in `source` [1, C, H, W], row by row."""
    down, right = (
        to_device(torch.tensor(starts)[:, None] + torch.arange(length), source.device)
        for starts, length in zip((tops, lefts), size)
    )
    found = []
    for begin, end in _portions(len(tops), source[:, :, : size[0]].nbytes, source.device):
        band = source[0].index_select(1, down[begin:end].flatten()).index_select(2, right.flatten())
        fields = rearrange(band, "c (top h) (left w) -> (top left) c h w", h=size[0], w=size[1])
        found.append(_features(fields.contiguous()))
    return torch.cat(found)


def _features(fields: Tensor) -> Tensor:
    """F features of each field of `fields` [N, C, h, w]: float64 [N, F], on the CPU.

    Means and mean squares of the channels, mean products of two channels, mean squared differences at `LAGS`: the
    variance after a convolution consists of such terms.
    """
    found = [fields.mean((2, 3)), fields.square().mean((2, 3))]
    channels = fields.shape[1]
    if channels <= CROSSED:
        found += [
            (fields[:, one] * fields[:, other]).mean((1, 2))[:, None] for one, other in combinations(range(channels), 2)
        ]
    for lag in LAGS:
        if lag < min(fields.shape[2:]):
            down = fields[:, :, lag:] - fields[:, :, :-lag]
            right = fields[..., lag:] - fields[..., :-lag]
            found.append(down.square().mean((2, 3)) + right.square().mean((2, 3)))
    return torch.cat(found, 1).cpu().double()


def draw(importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` of the entries of `importance` [M]: their indices, ascending, and the chance that each had.

    Chances are proportional to the square root of `importance`, and at most 1. Systematic sampling: an entry is drawn
    where the cumulative sum of the chances passes 0.5, 1.5, 2.5, ..., so the draw is spread over the order.
    """
    size = importance.sqrt()
    count = min(count, size.shape[0])
    sure = torch.zeros_like(size, dtype=torch.bool)
    while True:
        left = count - int(sure.sum())
        chances = torch.where(sure, torch.ones_like(size), size * (left / size[~sure].sum()))
        beyond = (chances >= 1) & ~sure
        if not bool(beyond.any()) or bool((sure | beyond).all()):
            break
        sure |= beyond
    passed = (chances.clamp(max=1).cumsum(0) - 0.5 + 1e-9).floor()
    before = torch.cat([passed.new_full((1,), -1), passed[:-1]])
    chosen = (passed > before).nonzero()[:, 0]
    return chosen, chances.clamp(max=1)[chosen]


def calibrate(off: Tensor, weights: Tensor) -> Tensor:
    """`weights` [n], scaled to sum 1 and changed so that the weighted features `off` [n, F] nearly add up to 0.

    The new weights w' minimise RIDGE * sum (w' - w)^2 / w + sum over features (sum w' off)^2 with sum w' = 1. Entries
    whose weight comes out negative are dropped (weight 0), and the rest is solved again until there are none.
    """
    start = weights / weights.sum()
    used = torch.ones_like(start, dtype=torch.bool)
    while True:
        own, count = start[used], int(used.sum())
        scaled = off[used] * own[:, None]
        system = torch.zeros((count + 1, count + 1), dtype=torch.float64)
        system[:count, :count] = scaled @ scaled.T + RIDGE * own.diag()
        system[:count, count] = system[count, :count] = own
        goal = torch.cat([RIDGE * own, torch.ones(1, dtype=torch.float64)])
        gain = torch.linalg.solve(system, goal)[:count]
        if bool((gain >= 0).all()):
            result = torch.zeros_like(start)
            result[used] = gain * own
            return result
        used[used.clone()] = gain > 0
