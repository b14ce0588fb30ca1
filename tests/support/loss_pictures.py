"""Pictures for tests of losses, and a comparison of two losses."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from icmsr_core.weights.embedded import demo_picture


def picture(side: int = 128, count: int = 1) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(demo_picture()).convert("RGB"))).permute(2, 0, 1)
    crops = [pixels[:, 20 * n : 20 * n + side, 30 * n : 30 * n + side] for n in range(count)]
    return torch.stack(crops).float() / 127.5 - 1


def noisy(image: torch.Tensor, amount: float = 0.2) -> torch.Tensor:
    return image + amount * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))


def assert_same_distance(
    ours: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    theirs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    result: torch.Tensor,
    truth: torch.Tensor,
    precision: float,
) -> None:
    """Both have the same mean over the batch, which is not near 0, and the same gradient in `result`."""
    values, gradients = [], []
    for measure in (ours, theirs):
        given = result.clone().requires_grad_()
        value = measure(given, truth).mean()
        value.backward()
        values.append(value.item())
        gradients.append(given.grad)
    assert values[1] > 0.01
    assert values[0] == pytest.approx(values[1], rel=precision)
    assert (gradients[0] - gradients[1]).norm() < precision * gradients[1].norm()
