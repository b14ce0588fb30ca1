"""Copies photographs into one folder of at most so many megabytes, as JPEG: training data that can travel.

python train/pack_photographs.py --folders="['PHOTOS', 'MORE_PHOTOS']" --out PACKED --megabytes 45

All of them are kept. Their longer side is limited instead, by area, to the largest of a few sizes at which they fit.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig, find_photographs
from icmsr_core.train.data.sources import Pixels, read_photograph
from icmsr_core.train.run.launch import parse_config, run_script

SIDES = (2048, 1536, 1280, 1024, 896, 768, 640, 512, 448, 384, 320, 256)
"""Limits of the longer side that are tried, in pixels."""


@dataclass(frozen=True)
class Config:
    """Photographs as JPEG in one new folder."""

    out: str
    """Folder to make."""
    folders: list[str] = field(default_factory=list)
    """Folders with photographs, searched with their sub-folders."""
    megabytes: float = 45.0
    """Largest size of all files together, in millions of bytes."""
    quality: int = 92
    """JPEG quality, 1 to 100."""

    def __post_init__(self) -> None:
        if self.megabytes <= 0 or not 1 <= self.quality <= 100:
            raise IcmsrError(
                f"megabytes must be above 0 and quality 1 to 100, got {self.megabytes:g} and {self.quality}"
            )
        if Path(self.out).exists():
            raise IcmsrError(f"{self.out} is there already: name another folder")


def limited(picture: Pixels, side: int) -> Pixels:
    """`picture` [H, W, 3] with its longer side at most `side`, shrunk by area."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return picture
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def as_jpeg(picture: Pixels, quality: int) -> bytes:
    """`picture` [H, W, 3], R, G, B, as a JPEG file without subsampled colours."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    return cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), options)[1].tobytes()


def encoded(paths: list[Path], side: int, quality: int, limit: float) -> dict[str, bytes] | None:
    """The JPEG files by name at one limit of the side; None as soon as they are more than `limit` bytes."""
    files: dict[str, bytes] = {}
    total = 0
    for number, path in enumerate(paths):
        try:
            picture = read_photograph(path)
        except IcmsrError as error:
            if side == SIDES[-1]:
                logging.warning("left out: %s", error)
            continue
        files[f"{number:05d}.jpg"] = data = as_jpeg(limited(picture, side), quality)
        total += len(data)
        if total > limit:
            return None
    return files


def main() -> None:
    """Packs what the command line names."""
    config = parse_config(Config)
    found = find_photographs(DataConfig(folders=tuple(config.folders), synthetic=0.0), False)
    for side in SIDES:
        files = encoded(found.paths, side, config.quality, config.megabytes * 1e6)
        if files is not None:
            break
    else:
        raise IcmsrError(
            f"{len(found.paths)} photographs of at most {SIDES[-1]} px take more than {config.megabytes:g} MB: give "
            "fewer photographs, more megabytes or a lower quality"
        )
    out = Path(config.out)
    out.mkdir(parents=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    logging.info(
        "%d of %d photographs, longer side at most %d px, %.1f MB in %s",
        len(files),
        len(found.paths),
        side,
        sum(map(len, files.values())) / 1e6,
        out,
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
