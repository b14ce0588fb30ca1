"""Training pictures made by a procedure, to train without photographs or along with them (ours).

Six kinds: dead leaves (occluding shapes with a power law of sizes, whose statistics resemble those of photographs:
Lee, Mumford and Huang 2001), gratings and chirps, lettering, line art, skies and gradients, bricks and tiles. A canvas
is drawn at twice the size and averaged down, so edges are anti-aliased. Canvases are float32 [S, S, 3], RGB, 0..255.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...errors import IcmsrError

Canvas = npt.NDArray[np.float32]
Field = npt.NDArray[np.float32]
Rng = np.random.Generator

_LETTERS = "abcdefghijklmnopqrstuvwxyzabcdeilnorst" * 2 + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;-+=?!&%$@()/"
_CORNERS = 24  # points of a leaf's outline


def synthetic_picture(size: int, rng: Rng, kind: str | None = None) -> npt.NDArray[np.uint8]:
    """One random picture, uint8 [size, size, 3] RGB; the state of `rng` decides it all.

    `kind` is one of `SYNTHETIC_KINDS`; without it a kind is drawn, and one picture in six joins two kinds along a
    random line. Raises IcmsrError for another kind and for a size below 16.
    """
    if size < 16:
        raise IcmsrError(f"size must be at least 16 pixels, got {size}")
    if kind is not None and kind not in _DRAW:
        raise IcmsrError(f"unknown kind of synthetic picture {kind!r}: choose from {', '.join(SYNTHETIC_KINDS)}")
    canvas = _DRAW[kind or _draw_kind(rng)](2 * size, rng)
    if kind is None and rng.random() < 1 / 6:
        other = _DRAW[_draw_kind(rng)](2 * size, rng)
        along, _ = _axes(2 * size, rng)
        edge = along + 0.15 * _noise(2 * size, 3.0, rng) * (rng.random() < 0.5) > rng.uniform(-0.3, 0.3)
        canvas = np.where(edge[..., None], canvas, other)
    picture = cv2.resize(np.clip(canvas, 0, 255), (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(np.rint(picture), dtype=np.uint8)


def _draw_kind(rng: Rng) -> str:
    point = rng.random() * sum(_WEIGHTS.values())
    for kind, weight in _WEIGHTS.items():
        point -= weight
        if point < 0:
            return kind
    return SYNTHETIC_KINDS[0]


def _palette(count: int, rng: Rng) -> Field:
    """`count` colours [count, 3] around one to three hues; mostly muted, sometimes vivid or grey."""
    # Earth and skin, foliage, sky and water are commoner in photographs than violet or turquoise.
    common = np.array([30.0, 40.0, 100.0, 215.0])[rng.integers(4, size=3)] + rng.normal(0, 15, 3)
    hues = np.where(rng.random(3) < 0.75, common, rng.uniform(0, 360, 3))[: rng.integers(1, 4)]
    mood = rng.random()
    hsv = np.empty((1, count, 3), dtype=np.float32)
    hsv[0, :, 0] = (rng.choice(hues, count) + rng.normal(0, 14, count)) % 360
    hsv[0, :, 1] = rng.beta(4, 2, count) if mood < 0.15 else rng.beta(1.4, 3, count) * (mood > 0.2)
    hsv[0, :, 2] = rng.beta(1.3, 1.1, count)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0] * 255, dtype=np.float32)


def _two_tones(rng: Rng) -> tuple[Field, Field]:
    """Two colours that are far enough apart to be told from each other."""
    while True:
        first, second = _palette(2, rng)
        if np.abs(first - second).max() > 60:
            return first, second


def _axes(size: int, rng: Rng) -> tuple[Field, Field]:
    """Two orthogonal coordinates [S, S] at a random angle, 1 per side of the canvas, 0 in the middle."""
    angle = rng.uniform(0, 2 * math.pi)
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * line[None] + sin * line[:, None], cos * line[:, None] - sin * line[None]


def _noise(size: int, slope: float, rng: Rng) -> Field:
    """Random field [S, S] of power spectrum f^-slope, mean 0, standard deviation 1."""
    fy, fx = np.fft.fftfreq(size).astype(np.float32), np.fft.rfftfreq(size).astype(np.float32)
    power = fy[:, None] ** 2 + fx[None] ** 2
    power[0, 0] = np.inf
    shape = (*power.shape, 2)
    spectrum = rng.standard_normal(shape, dtype=np.float32).view(np.complex64)[..., 0] * power ** np.float32(-slope / 4)
    field = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return np.asarray(field / max(float(field.std()), 1e-12), dtype=np.float32)


def _gradient(size: int, rng: Rng) -> Canvas:
    along, _ = _axes(size, rng)
    first, second = _two_tones(rng)
    return np.asarray(first + np.clip(along + 0.5, 0, 1)[..., None] * (second - first), dtype=np.float32)


def _background(size: int, rng: Rng) -> Canvas:
    """Flat, graded or textured."""
    choice = rng.random()
    if choice < 0.3:
        return _gradient(size, rng)
    colour = _palette(1, rng)[0]
    if choice < 0.6:
        return np.tile(colour, (size, size, 1))
    texture = rng.uniform(3, 30) * _noise(size, rng.uniform(0.5, 2.5), rng)
    return np.asarray(colour + texture[..., None], dtype=np.float32)


def _leaf_outlines(size: int, rng: Rng) -> tuple[Field, Field]:
    """Outlines [N, corners, 2] of leaves in pixels and their middles [N, 2], the lowest leaf first."""
    smallest = rng.uniform(3, 14)
    largest = max(size * rng.uniform(0.2, 0.5), 2 * smallest)
    ratio = (smallest / largest) ** 2
    mean_area = 2 * math.pi * smallest**2 * math.log(largest / smallest) / (1 - ratio)
    count = int(np.clip(3 * size**2 / mean_area, 40, 3000))
    # p(r) ~ r^-3: the one law that looks the same at every magnification.
    radius = smallest / np.sqrt(1 - rng.random(count) * (1 - ratio))
    middle = rng.uniform(-0.05, 1.05, (count, 2)) * size
    turn = np.arange(_CORNERS) / _CORNERS * 2 * math.pi
    sides = rng.integers(3, 8, count)[:, None]
    stepped = np.floor(turn * sides / (2 * math.pi)) / sides * 2 * math.pi  # repeated points: a polygon of few corners
    phase = rng.integers(2, 6, (count, 1)) * turn + 2 * math.pi * rng.random((count, 1))
    wave = 1 + 0.25 * rng.random((count, 1)) * np.sin(phase)
    sharp = rng.random((count, 1)) < rng.uniform(0, 1)
    angle, reach = np.where(sharp, stepped, turn), radius[:, None] * np.where(sharp, 1.0, wave)
    flat = rng.uniform(0.25, 1, (count, 1))
    x, y = reach * np.cos(angle), reach * flat * np.sin(angle)
    tilt = rng.uniform(0, 2 * math.pi, (count, 1))
    outline = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=2)
    return (outline + middle[:, None]).astype(np.float32), middle.astype(np.float32)


def _dead_leaves(size: int, rng: Rng) -> Canvas:
    outlines, middles = _leaf_outlines(size, rng)
    owner = np.zeros((size, size), dtype=np.int32)  # 0 is the ground
    for index, points in enumerate(np.rint(outlines * 8).astype(np.int32), start=1):
        cv2.fillPoly(owner, [points], (index,), lineType=cv2.LINE_8, shift=3)
    count = len(outlines) + 1
    colours = _palette(24, rng)[rng.integers(24, size=count)] + rng.normal(0, 12, (count, 1)).astype(np.float32)
    # Inside a leaf: a slope of light across it, and one of three textures at a strength of its own.
    slope = (rng.normal(0, 0.25, (count, 2)) * rng.uniform(0, 1.5)).astype(np.float32)
    centre = np.concatenate([np.full((1, 2), size / 2, dtype=np.float32), middles])
    line = np.arange(size, dtype=np.float32)
    y, x = np.ix_(line, line)
    light = slope[owner, 0] * (x - centre[owner, 0]) + slope[owner, 1] * (y - centre[owner, 1])
    strength = (rng.gamma(1.2, 7.0, count) * rng.uniform(0.2, 1.6)).astype(np.float32)
    stripes = np.sin(2 * np.pi * (_axes(size, rng)[0] * rng.uniform(0.02, 0.2) * size + 0.4 * _noise(size, 3.0, rng)))
    textures = np.stack([_noise(size, rng.uniform(0.3, 1.5), rng), _noise(size, rng.uniform(1.5, 2.6), rng), stripes])
    choice = rng.integers(3, size=count)
    texture = textures[choice[owner], y.astype(np.int32), x.astype(np.int32)]
    inside = np.clip(light, -60, 60) + strength[owner] * texture
    return np.asarray(colours[owner] + inside[..., None], dtype=np.float32)


def _gratings(size: int, rng: Rng) -> Canvas:
    canvas = _background(size, rng)
    for _ in range(int(rng.integers(1, 6))):
        u, v = _axes(size, rng)
        shape = rng.random()
        square = shape < 0.4
        top = (0.1 if square else 0.2) * size  # cycles over the canvas, well under its Nyquist limit
        first, last = top * rng.uniform(0.02, 1, 2) ** 1.5
        form = rng.random()
        if form < 0.35:  # even
            phase = first * u
        elif form < 0.7:  # a chirp along its axis; the frequency goes from first to last
            phase = first * (u + 0.5) + (last - first) * (u + 0.5) ** 2 / 2
        elif form < 0.85:  # zone plate: rings
            phase = first * ((u - rng.uniform(-0.4, 0.4)) ** 2 + (v - rng.uniform(-0.4, 0.4)) ** 2)
        else:  # rays, or a spiral
            angle = np.arctan2(v - rng.uniform(-0.4, 0.4), u - rng.uniform(-0.4, 0.4)) / (2 * np.pi)
            phase = rng.integers(8, 60) * angle + rng.integers(0, 2) * rng.integers(1, 12) * np.hypot(u, v)
        wave = 0.5 + 0.5 * np.sin(2 * np.pi * (phase + rng.random()))
        if square:
            wave = np.clip((wave - 0.5) * 8 + 0.5, 0, 1)
        elif shape < 0.5:
            wave = np.clip(phase - np.floor(phase), 0, 1)
        dark, bright = _two_tones(rng)
        layer = dark + wave[..., None] * (bright - dark)
        x, y = u - rng.uniform(-0.4, 0.4), v - rng.uniform(-0.4, 0.4)
        wide, high = rng.uniform(0.08, 0.6, 2)
        window = rng.random()
        if window < 0.35:
            weight = (np.maximum(np.abs(x) / wide, np.abs(y) / high) < 1).astype(np.float32)
        elif window < 0.7:
            weight = ((x / wide) ** 2 + (y / wide) ** 2 < 1).astype(np.float32)
        else:
            weight = np.exp(-2 * ((x / wide) ** 2 + (y / high) ** 2))
        canvas = canvas + weight[..., None] * (layer - canvas)
    return np.asarray(canvas, dtype=np.float32)


@lru_cache(maxsize=64)
def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=points)


def _words(length: int, rng: Rng) -> str:
    text = "".join(_LETTERS[index] for index in rng.integers(len(_LETTERS), size=length))
    spaces = set(np.cumsum(rng.integers(3, 9, size=length)).tolist())
    return "".join(" " if index in spaces else letter for index, letter in enumerate(text))


def _lettering(size: int, rng: Rng) -> Canvas:
    canvas = _background(size, rng)
    paragraph = rng.random() < 0.45
    tones = [_palette(1, rng)[0] for _ in range(3)]
    ground = canvas.mean(axis=(0, 1))
    tones = [tone if np.abs(tone - ground).max() > 50 else (ground + 128) % 256 for tone in tones]
    mask: npt.NDArray[np.uint8] = np.zeros((size, size), dtype=np.uint8)
    for _ in range(1 if paragraph else int(rng.integers(3, 11))):
        mask[:] = 0
        height = float(np.exp(rng.uniform(math.log(14), math.log(40 if paragraph else max(size / 3, 16)))))
        lines = int(size * 1.5 / (1.4 * height)) if paragraph else 1
        face = int(rng.integers(-6, 8))  # below 0: PIL's scalable font; else one of OpenCV's eight stroke fonts
        start = rng.uniform(-0.1, 0.5, 2) * size if not paragraph else np.array([-0.2, -0.2]) * size
        length = int(2 + size * (1.4 if paragraph else rng.uniform(0.3, 1.0)) / (0.5 * height))
        for line in range(lines):
            x, y = int(start[0]), int(start[1] + line * 1.4 * height)
            text = _words(length, rng)
            if face < 0:
                image = Image.fromarray(mask)
                ImageDraw.Draw(image).text((x, y), text, fill=255, font=_font(max(8, int(height))))
                mask = np.array(image)
            else:
                weight = max(1, round(height * rng.uniform(0.06, 0.16)))
                cv2.putText(mask, text, (x, int(y + height)), face, height / 30, 255, weight, cv2.LINE_AA)
        angle = rng.normal(0, 8) if rng.random() < 0.6 else rng.uniform(-180, 180)
        spin = cv2.getRotationMatrix2D((size / 2, size / 2), float(angle), 1.0)
        turned = cv2.warpAffine(mask, spin, (size, size), flags=cv2.INTER_LINEAR)
        tone = tones[int(rng.integers(3))]
        canvas = canvas + (turned[..., None] / np.float32(255)) * (tone - canvas)
    return np.asarray(canvas, dtype=np.float32)


def _curve(size: int, rng: Rng) -> npt.NDArray[np.int32]:
    """A cubic Bezier curve as 40 points in eighths of a pixel."""
    points = rng.uniform(-0.1, 1.1, (1, 2)) + np.concatenate([np.zeros((1, 2)), rng.normal(0, 0.35, (3, 2))])
    t = np.linspace(0, 1, 40)[:, None]
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    path = np.concatenate(weights, axis=1) @ points
    return np.asarray(np.rint(path * size * 8), dtype=np.int32)


def _line_art(size: int, rng: Rng) -> Canvas:
    canvas = np.clip(_background(size, rng), 0, 255).astype(np.uint8)
    ground = canvas.mean(axis=(0, 1))
    inks = [tuple(map(float, ink)) for ink in _palette(6, rng) if np.abs(ink - ground).max() > 40]
    inks.append((20.0, 20.0, 20.0) if ground.mean() > 110 else (235.0, 235.0, 235.0))
    thickest = int(rng.integers(2, 9))
    for _ in range(int(rng.integers(8, 60))):
        ink, thick = inks[int(rng.integers(len(inks)))], int(rng.integers(1, thickest + 1))
        what = rng.random()
        if what < 0.4:
            cv2.polylines(canvas, [_curve(size, rng)], False, ink, thick, cv2.LINE_AA, 3)
        elif what < 0.6:
            ends = (rng.uniform(-0.1, 1.1, (2, 2)) * size * 8).astype(int).tolist()
            cv2.line(canvas, ends[0], ends[1], ink, thick, cv2.LINE_AA, 3)
        elif what < 0.75:
            polygon = _polygon(size, rng)
            if rng.random() < 0.5:
                cv2.fillPoly(canvas, [polygon], inks[int(rng.integers(len(inks)))], cv2.LINE_AA, 3)
            cv2.polylines(canvas, [polygon], True, ink, thick, cv2.LINE_AA, 3)
        elif what < 0.88:
            middle, reach = rng.uniform(0, size, 2).astype(int).tolist(), int(rng.uniform(0.02, 0.25) * size)
            for ring in range(int(rng.integers(1, 6))):
                cv2.circle(canvas, middle, max(1, reach - 3 * ring * thick), ink, thick, cv2.LINE_AA)
        else:
            _hatch(canvas, ink, thick, rng)
    return canvas.astype(np.float32)


def _polygon(size: int, rng: Rng) -> npt.NDArray[np.int32]:
    """Three to seven corners [N, 2] in eighths of a pixel."""
    corners = int(rng.integers(3, 8))
    angle = np.sort(rng.uniform(0, 2 * math.pi, corners))
    reach = rng.uniform(0.03, 0.25) * size * rng.uniform(0.6, 1, corners)
    points = rng.uniform(0, size, 2) + np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)
    return np.asarray(np.rint(points * 8), dtype=np.int32)


def _hatch(canvas: npt.NDArray[np.uint8], ink: tuple[float, ...], thick: int, rng: Rng) -> None:
    """Parallel strokes, once or crossed, inside a random polygon."""
    size = len(canvas)
    inside = np.zeros((size, size), dtype=np.uint8)
    cv2.fillPoly(inside, [_polygon(size, rng)], (255,), cv2.LINE_8, 3)
    layer = canvas.copy()
    angle, spacing = rng.uniform(0, math.pi), rng.uniform(2.5, 6) * max(thick, 2)
    for turn in (angle, angle + math.pi / 2)[: int(rng.integers(1, 3))]:
        along, across = np.array([math.cos(turn), math.sin(turn)]), np.array([-math.sin(turn), math.cos(turn)])
        for offset in np.arange(-0.75 * size, 0.75 * size, spacing):
            ends = ((size / 2 + offset * across + np.array([[-size], [size]]) * along) * 8).astype(int).tolist()
            cv2.line(layer, ends[0], ends[1], ink, thick, cv2.LINE_AA, 3)
    canvas[inside > 0] = layer[inside > 0]


def _sky(size: int, rng: Rng) -> Canvas:
    canvas = _gradient(size, rng)
    clouds = _noise(size, rng.uniform(2.2, 3.6), rng)
    cover = np.clip(clouds * rng.uniform(0.2, 1.0) + rng.uniform(-0.5, 0.5), 0, 1)[..., None]
    canvas = canvas + cover * (_palette(1, rng)[0] - canvas)
    if rng.random() < 0.4:  # a light
        u, v = _axes(size, rng)
        distance = np.hypot(u - rng.uniform(-0.5, 0.5), v - rng.uniform(-0.5, 0.5))
        canvas = canvas + rng.uniform(40, 160) * np.exp(-distance / rng.uniform(0.05, 0.3))[..., None]
    x = np.arange(size)
    for layer in range(int(rng.integers(0, 4))):  # hills against it
        ridge = _noise(size, rng.uniform(2.5, 4.0), rng)[0] * rng.uniform(0.01, 0.08) + 0.5 + 0.15 * layer
        land = (x[:, None] > ridge[None] * size)[..., None]
        canvas = np.where(land, _palette(1, rng)[0] + 8 * _noise(size, 1.2, rng)[..., None], canvas)
    return np.asarray(canvas + rng.uniform(0, 4) * _noise(size, 1.0, rng)[..., None], dtype=np.float32)


def _bricks(size: int, rng: Rng) -> Canvas:
    u, v = _axes(size, rng)
    lean = rng.uniform(-0.6, 0.6, 2) * (rng.random() < 0.6)
    depth = 1 + lean[0] * u + lean[1] * v  # perspective
    rows = rng.uniform(4, 28)
    wide = rng.choice([1.0, 1.0, 2.0, 2.5, 4.0])
    y = rows * v / depth + rng.random()
    x = rows / wide * u / depth + rng.random()
    row = np.floor(y)
    x = x + row * rng.choice([0.0, 0.5, 0.5, 1 / 3])
    column = np.floor(x)
    # Distance to the brick's edge in its own height; a joint, and a bevel next to it.
    inset = np.minimum(np.minimum(x - column, column + 1 - x) * wide, np.minimum(y - row, row + 1 - y))
    joint, bevel = rng.uniform(0.02, 0.1), rng.uniform(0.02, 0.2)
    kinds = int(rng.integers(2, 12))
    table = rng.integers(kinds, size=(64, 64))
    if rng.random() < 0.2:  # a checkerboard
        table = np.add.outer(np.arange(64), np.arange(64)) % 2
    which = table[row.astype(int) % 64, column.astype(int) % 64]
    base = _two_tones(rng)
    colours = base[0] + rng.random((kinds, 1), dtype=np.float32) * (base[1] - base[0]) * rng.uniform(0.2, 1)
    texture = _noise(size, rng.uniform(0.6, 2.0), rng) * rng.uniform(2, 18)
    light = np.clip((inset - joint) / bevel, 0, 1) * rng.uniform(0, 50)
    canvas = colours[which] + (texture + light - 25)[..., None]
    mortar = base[1] * rng.uniform(0.4, 1.2) + 0.5 * texture[..., None]
    return np.asarray(np.where((inset < joint)[..., None], mortar, canvas), dtype=np.float32)


_DRAW: dict[str, Callable[[int, Rng], Canvas]] = {
    "leaves": _dead_leaves,
    "gratings": _gratings,
    "lettering": _lettering,
    "line_art": _line_art,
    "sky": _sky,
    "bricks": _bricks,
}
_WEIGHTS = {"leaves": 0.4, "gratings": 0.1, "lettering": 0.15, "line_art": 0.12, "sky": 0.08, "bricks": 0.15}
SYNTHETIC_KINDS = tuple(_DRAW)
"""Kinds of pictures that `synthetic_picture` draws."""
