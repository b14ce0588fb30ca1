"""A small picture of a run while it works: the enlarged input, and over it what is finished. Source: ours.

Before the decoder writes there is only the latent. What is shown of a tile that has passed the UNet is an
approximation: the linear map from a latent cell to the mean colour of its pixels that fits the encoded input best, by
least squares. So it needs no constants of a family, and it shows colours and shapes, not the detail. Once the decoder
writes, its own pixels are shown, before the colour correction.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiling import Box

LONGEST = 512
"""Pixels of a preview's longest side."""
INTERVAL = 0.4
"""Least seconds between two previews: two and a half a second."""
SHARE = 0.005
"""Largest share of the time that making previews may take. After one that took long, the next one waits longer."""
FITTED_CELLS = 48
"""The map is fitted to at most this many rows and columns of cells, spread over the picture."""
FIT_PENALTY = 1e-4
"""Penalty of the fit, relative to the latent's variance: a flat picture has no best map."""

Send = Callable[[Tensor], None]
"""Takes a preview, uint8 [h, w, 3] on the CPU."""


class Preview:
    """Paints one run after another and sends what it looks like, as often as `INTERVAL` and `SHARE` allow.

    Areas are painted at once, on the device where they are, which costs a few small operations. Only a preview that is
    sent waits for the device.
    """

    def __init__(self, send: Send, clock: Callable[[], float] = time.perf_counter) -> None:
        self._send, self._clock = send, clock
        self._canvas, self._scale, self._shown = torch.empty(0), (1.0, 1.0), (1, 1)
        self._map: Tensor | None = None
        self._next, self._spent = 0.0, 0.0

    @property
    def spent(self) -> float:
        """Seconds that painting and sending have taken so far, as the CPU sees it."""
        return self._spent

    def start(self, enlarged: Tensor, size: tuple[int, int]) -> None:
        """Begins a run with its enlarged input [1, 3, H, W] in [0, 1]; sends it.

        The picture has `size` (height, width); what is below and at the right of that is padding and is not shown.
        """
        begun = self._clock()
        height, width = enlarged.shape[2:]
        shrink = min(1.0, LONGEST / max(height, width))
        rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
        self._scale = rows / height, columns / width
        self._shown = max(1, round(size[0] * self._scale[0])), max(1, round(size[1] * self._scale[1]))
        self._canvas, self._map = _resized(enlarged, rows, columns)[0].clone(), None  # painted over in place
        self._spent += self._clock() - begun
        self._show()

    def encoded(self, latent: Tensor, factor: int, top: int = 0, left: int = 0) -> None:
        """Fits the map from `latent` [1, C, h, w], the encoding of what begins at pixel (`top`, `left`)."""
        begun = self._clock()
        size = [min(FITTED_CELLS, cells) for cells in latent.shape[2:]]
        cells = _resized(latent.float(), *size)[0].flatten(1)
        height, width = (factor * cells for cells in latent.shape[2:])
        seen = self._canvas[None, :, self._span(0, top, top + height), self._span(1, left, left + width)]
        colours = _resized(seen, *size)[0].flatten(1).to(cells)
        self._map = linear_map(cells, colours)
        self._spent += self._clock() - begun

    def tiles(self, clean: Tensor, boxes: tuple[Box, ...], factor: int) -> None:
        """Paints the latents `clean` [B, C, h, w] of the tiles at `boxes`, `factor` pixels to a cell."""
        if self._map is None:
            return
        begun = self._clock()
        self._map = self._map.to(clean.device)
        for one, box in zip(clean.float(), boxes):
            rows, columns = (
                self._span(axis, span.start * factor, span.stop * factor)
                for axis, span in enumerate((box.rows, box.columns))
            )
            weights, shift = self._map[:, :-1], self._map[:, -1:]
            colours = torch.addmm(shift, weights, one.flatten(1)).unflatten(1, one.shape[1:])
            size = rows.stop - rows.start, columns.stop - columns.start
            self._paint(_resized(colours[None], *size)[0], rows, columns)
        self._spent += self._clock() - begun
        self._show()

    def written(self, picture: Tensor, top: int, left: int) -> None:
        """Paints a finished part [1, 3, h, w] of the result that begins at pixel (`top`, `left`)."""
        begun = self._clock()
        rows = self._span(0, top, top + picture.shape[2])
        columns = self._span(1, left, left + picture.shape[3])
        size = rows.stop - rows.start, columns.stop - columns.start
        if min(size) > 0:  # thin stripes of a large picture: not every one begins a row of the preview
            self._paint(_resized(picture.float(), *size)[0], rows, columns)
        self._spent += self._clock() - begun
        self._show()

    def _span(self, axis: int, start: int, stop: int) -> slice:
        """Where the pixels [start, stop) of the result lie in the preview."""
        scale, most = self._scale[axis], self._canvas.shape[axis + 1]
        return slice(min(most, round(start * scale)), min(most, round(stop * scale)))

    def _paint(self, colours: Tensor, rows: slice, columns: slice) -> None:
        if self._canvas.device != colours.device:
            self._canvas = self._canvas.to(colours.device)
        self._canvas[:, rows, columns] = colours[:, : rows.stop - rows.start, : columns.stop - columns.start]

    def _show(self) -> None:
        now = self._clock()
        if now < self._next:
            return
        rows, columns = self._shown
        picture = self._canvas[:, :rows, :columns].clamp(0, 1).mul(255).round_().to(torch.uint8)
        picture = picture.movedim(0, -1).contiguous().cpu()
        self._send(picture)
        took = self._clock() - now
        self._spent += took
        self._next = now + max(INTERVAL, took / SHARE)


def linear_map(cells: Tensor, colours: Tensor) -> Tensor:
    """[3, C + 1], the last column a constant: the colours [3, n] from latent cells [C, n] by ridge regression.

    Where the cells do not differ, every colour is the mean colour.
    """
    mean_cell, mean_colour = cells.mean(1, keepdim=True), colours.mean(1, keepdim=True)
    off = (cells - mean_cell).cpu().double()
    ridge = FIT_PENALTY * off.square().sum(1).mean().clamp_min(1e-12) * torch.eye(len(off), dtype=torch.float64)
    weights = (
        torch.linalg.solve(off @ off.T + ridge, off @ (colours - mean_colour).cpu().double().T).T.float().to(cells)
    )
    return torch.cat([weights, mean_colour - weights @ mean_cell], 1)


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    """`maps` [N, C, H, W] at `height` x `width`, at least 1 x 1: each sample the mean of what it covers, and in a map
    that grows what lies under its middle. A map that has that size already is returned itself."""
    size = max(1, height), max(1, width)
    if size == maps.shape[2:]:
        return maps
    if size[0] >= maps.shape[2] and size[1] >= maps.shape[3]:
        return F.interpolate(maps, size, mode="nearest-exact")
    return F.adaptive_avg_pool2d(maps, size)
