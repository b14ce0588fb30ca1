"""The loss on the lattice of the latent's cells: its value, what it sees, what it does not look at."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icmsr_core.errors import IcmsrError
from icmsr_core.train.losses.lattice import lattice_l1

FLOOR = 0.004


def edge(angle: float, steps: int) -> torch.Tensor:
    """An edge [1, 1, 128, 128] at `angle` degrees from upright that keeps its place over `steps` rows at a time."""
    rows = (torch.arange(128) // steps * steps + (steps - 1) / 2).double()
    across = torch.arange(128).double()[None] - 64 - (rows[:, None] - 64) * math.tan(math.radians(angle))
    return (across.clamp(-1, 1) * 0.5)[None, None].float()


def weave(amplitude: float) -> torch.Tensor:
    """One column in four brighter."""
    picture = torch.zeros(1, 3, 128, 128)
    picture[..., ::4] = amplitude
    return picture


@pytest.mark.parametrize(("period", "size"), [(4, (64, 96)), (4, (70, 75)), (8, (64, 64))])
def test_it_is_the_same_sum_in_float64(period, size) -> None:
    pictures = torch.rand(2, 1, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    window = 32
    values = []
    for transposed in (False, True):
        shares = []
        for picture in pictures[:, 0].double().numpy():
            turned = picture.transpose(0, 2, 1) if transposed else picture
            contrast = np.abs(np.diff(turned, axis=2, append=turned[:, :, -1:])).mean(0)
            found = np.empty((contrast.shape[0] // window, contrast.shape[1] // window, period))
            for row, column, position in product(*(range(length) for length in found.shape)):
                part = contrast[row * window : (row + 1) * window, column * window : (column + 1) * window]
                found[row, column, position] = part[:, position::period].mean() + FLOOR
            shares.append(found / found.sum(-1, keepdims=True))
        values.append(np.abs(shares[0] - shares[1]).sum(-1).mean())
    assert float(lattice_l1(*pictures, period=period)) == pytest.approx(np.mean(values), rel=1e-5)


def test_a_weave_costs_and_its_descent_removes_it() -> None:
    """A stronger weave costs more, and the gradient points to a weaker one."""
    texture = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    costs = [float(lattice_l1(texture + weave(amplitude), texture, period=4)) for amplitude in (0, 0.05, 0.1, 0.2)]
    assert costs[0] == 0
    assert costs == sorted(costs)
    strength = torch.tensor(0.2, requires_grad=True)
    loss = lattice_l1(texture + strength * weave(1.0), texture, period=4)
    loss.backward()
    assert strength.grad > 0


@pytest.mark.parametrize("angle", [7, 12, 20])
def test_a_staircase_costs_more_than_a_straight_edge_that_is_soft(angle) -> None:
    straight = edge(angle, 1)
    soft = F.avg_pool2d(F.pad(straight, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    assert lattice_l1(edge(angle, 4), straight, period=4) > 3 * lattice_l1(soft, straight, period=4)


def test_neither_the_amount_of_contrast_nor_the_mean_counts() -> None:
    texture = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 0.2
    assert lattice_l1(0.5 * texture + 0.3, texture, period=4) < 0.01


def test_flat_areas_do_not_count() -> None:
    """A quarter of a grey level of 255, however regular, is less than the floor."""
    assert lattice_l1(weave(0.5 / 255), torch.zeros(1, 3, 128, 128), period=4) < 0.25
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lattice_l1(picture, torch.zeros(1, 3, 64, 64), period=4).backward()
    assert picture.grad.isfinite().all()


def test_pictures_below_a_window_and_windows_of_broken_cells_are_refused() -> None:
    picture = torch.zeros(1, 3, 32, 28)
    with pytest.raises(IcmsrError, match="at least 32 pixels"):
        lattice_l1(picture, picture, period=4)
    with pytest.raises(IcmsrError, match="multiple of the period"):
        lattice_l1(picture, picture, period=5)
