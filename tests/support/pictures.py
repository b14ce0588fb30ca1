"""Pictures of random samples, in the forms that the modules take."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data


def random_picture(height: int, width: int, count: int = 1, channels: int = 3, *, seed: int = 0) -> torch.Tensor:
    """Pictures [count, channels, height, width], float32 in [0, 1)."""
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def write_random_picture(path: Path, width: int = 20, height: int = 12, mode: str = "RGB") -> Path:
    """A file of 8-bit samples at `path`; pictures of different sizes differ. `mode` is L, RGB or RGBA."""
    random = np.random.default_rng(width * 1000 + height)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    Image.fromarray(random.integers(0, 256, (height, width, *channels), dtype=np.uint8)).save(path)
    return path


def photo(height: int, width: int) -> torch.Tensor:
    """A part of scikit-image's astronaut, [1, 3, height, width], float32 in [0, 1]."""
    crop = np.ascontiguousarray(data.astronaut()[:height, 100 : 100 + width])
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float().contiguous() / 255
