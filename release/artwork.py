"""Draws the pack's icon and banner, as the registry shows them: icon.svg, icon.png (400 x 400) and banner.png (21:9).

    uv run --extra test python release/artwork.py --out release

The banner's photograph is the bundled one: left of the line enlarged by repeating pixels, right of it upscaled by nano.
Letters are outlines of DejaVu Sans, which matplotlib brings, so no font of the machine matters. Chromium turns SVG into
PNG. Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from icmsr_core.console import escape_unprintable
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import FloatArray, Picture, read_picture, to_tensor, write_picture
from icmsr_core.runtime.diffusers_backbone import load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.weights.embedded import demo_picture, embedded_generator

ICON_SIDE = 400
"""Pixels; the most that the registry takes."""
BANNER_SIZE = (1260, 540)
"""Width and height in pixels: 21:9."""
PHOTO_WIDTH = 720
"""Width of the photograph at the banner's right end, in pixels."""
PHOTO_CORNER = (330, 45)
"""Left and upper edge of the crop, in pixels of the upscaled photograph."""
BLOCKS = 6
"""Coarse pixels across the icon's disc."""
DARK, LIGHT, GLOW = "#14162b", "#f4f5fb", "#8fd3ff"
DISC = ((255, 138, 92), (120, 84, 255))
"""The colours of the icon's disc, upper left and lower right."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def icon_svg() -> str:
    """A disc, coarse pixels on the left of a line and smooth on its right: an SVG of 400 x 400."""
    side, radius = ICON_SIDE, 132.0
    middle, size = side / 2, 2 * radius / BLOCKS
    squares = []
    for row in range(BLOCKS):
        for column in range(BLOCKS // 2):
            x, y = middle - radius + column * size, middle - radius + row * size
            share = ((column + 0.5) + (row + 0.5)) / (2 * BLOCKS)
            away = np.hypot(x + size / 2 - middle, y + size / 2 - middle)
            if away <= radius:
                squares.append(f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" fill="{_mixed(share)}"/>')
    first, last = _mixed(0), _mixed(1)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="{side}" height="{side}">
<defs><linearGradient id="disc" x1="0" y1="0" x2="1" y2="1" gradientUnits="objectBoundingBox">
<stop offset="0" stop-color="{first}"/><stop offset="1" stop-color="{last}"/></linearGradient>
<clipPath id="right"><rect x="{middle:g}" y="0" width="{middle:g}" height="{side}"/></clipPath></defs>
<rect width="{side}" height="{side}" rx="84" fill="{DARK}"/>
<g shape-rendering="crispEdges">{"".join(squares)}</g>
<circle cx="{middle:g}" cy="{middle:g}" r="{radius:g}" fill="url(#disc)" clip-path="url(#right)"/>
<path d="M{middle:g} 36V364" stroke="{LIGHT}" stroke-width="10" stroke-linecap="round"/>
<circle cx="{middle:g}" cy="{middle:g}" r="27" fill="{LIGHT}"/>
<path d="M{middle - 6:g} 189l-11 11l11 11M{middle + 6:g} 189l11 11l-11 11" fill="none" stroke="{DARK}" stroke-width="6"
 stroke-linecap="round" stroke-linejoin="round"/>
</svg>
"""


def banner_svg(before: FloatArray, after: FloatArray) -> str:
    """The banner, from the small photograph [h, w, 3] and the upscaled one, four times as large, in [0, 1]."""
    width, height = BANNER_SIZE
    left, top = PHOTO_CORNER
    crop = after[top : top + height, left : left + PHOTO_WIDTH]
    repeated = before.repeat(4, axis=0).repeat(4, axis=1)[top : top + height, left : left + PHOTO_WIDTH]
    edge = width - PHOTO_WIDTH
    line = edge + PHOTO_WIDTH // 2
    half = PHOTO_WIDTH // 2
    words = [
        _words("ICM-SR", 60, 235, 104, LIGHT, bold=True),
        _words("one-step super-resolution", 64, 300, 31, LIGHT),
        _words("for ComfyUI", 64, 344, 31, GLOW),
        _words("a model in the box: nothing to download", 64, 452, 19, "#aab0cf"),
    ]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<rect width="{width}" height="{height}" fill="{DARK}"/>
<image x="{edge}" y="0" width="{half}" height="{height}" href="{_embedded(repeated[:, :half])}"/>
<image x="{line}" y="0" width="{half}" height="{height}" href="{_embedded(crop[:, half:])}"/>
<path d="M{line} 0V{height}" stroke="{LIGHT}" stroke-width="6"/>
<circle cx="{line}" cy="{height / 2:g}" r="26" fill="{LIGHT}"/>
<path d="M{line - 6} {height / 2 - 11:g}l-11 11l11 11M{line + 6} {height / 2 - 11:g}l11 11l-11 11" fill="none"
 stroke="{DARK}" stroke-width="6" stroke-linecap="round" stroke-linejoin="round"/>
{"".join(words)}
</svg>
"""


def photograph() -> tuple[FloatArray, FloatArray]:
    """The bundled photograph [h, w, 3], and what nano makes of it [4h, 4w, 3]; both in [0, 1]."""
    silence_diffusers()
    small = read_picture(demo_picture()).rgb
    large = upscale(load_backbone(Recipe(generator=embedded_generator(), device="cpu", dtype="fp32")), to_tensor(small))
    return small, large[0].movedim(0, -1).cpu().numpy()


def render(svg: str, size: tuple[int, int], path: Path) -> None:
    """Writes the SVG as a PNG of `size` (width, height), its corners transparent; `IcmsrError` without Chromium."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise IcmsrError(f"drawing needs a browser, none of {', '.join(BROWSERS)} is on the PATH: install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise IcmsrError("drawing needs playwright: uv sync --extra test") from error
    page_html = f'<body style="margin:0">{svg}</body>'
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_content(page_html)
        page.screenshot(path=str(path), omit_background=True)
        browser.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws both and returns the exit code."""
    parser = argparse.ArgumentParser(description="Draws the pack's icon and banner.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for icon.svg, icon.png, banner.png"
    )
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        icon = icon_svg()
        (options.out / "icon.svg").write_text(icon, encoding="utf-8")
        render(icon, (ICON_SIDE, ICON_SIDE), options.out / "icon.png")
        render(banner_svg(*photograph()), BANNER_SIZE, options.out / "banner.png")
    except (IcmsrError, OSError) as error:
        print(f"artwork: {error}", file=sys.stderr)
        return 1
    return 0


def _mixed(share: float) -> str:
    """A colour between those of `DISC`, as #rrggbb."""
    return "#" + "".join(f"{round(first + (last - first) * share):02x}" for first, last in zip(*DISC))


def _words(text: str, x: float, baseline: float, size: float, color: str, bold: bool = False) -> str:
    """The letters of `text` as one SVG path; `size` in pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    letters = {
        Outline.MOVETO: "M",
        Outline.LINETO: "L",
        Outline.CURVE3: "Q",
        Outline.CURVE4: "C",
        Outline.CLOSEPOLY: "Z",
    }
    parts = []
    for points, code in TextPath((0, 0), text, size=size, prop=font).iter_segments():
        pairs = np.asarray([] if code == Outline.CLOSEPOLY else points).reshape(-1, 2)
        parts.append(letters[code] + " ".join(f"{x + dx:.2f} {baseline - dy:.2f}" for dx, dy in pairs))
    return f'<path d="{"".join(parts)}" fill="{color}"/>\n'


def _embedded(picture: npt.NDArray[np.floating]) -> str:
    """The picture [h, w, 3] as a data URL."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        write_picture(path, Picture(rgb=np.ascontiguousarray(picture, dtype=np.float32)))
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    escape_unprintable()
    sys.exit(main())
