"""Pictures for tests of losses."""

import numpy as np
import torch
from PIL import Image

from icmsr_core.weights.embedded import demo_picture


def picture(side: int = 128, count: int = 1) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(demo_picture()).convert("RGB"))).permute(2, 0, 1)
    crops = [pixels[:, 20 * n : 20 * n + side, 30 * n : 30 * n + side] for n in range(count)]
    return torch.stack(crops).float() / 127.5 - 1


def noisy(image: torch.Tensor, amount: float = 0.2) -> torch.Tensor:
    return image + amount * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
