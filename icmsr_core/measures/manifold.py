"""What a diffusion prior sees in a noised latent: its clean estimate, with a condition and without.

The regulariser of ICM-SR relies on these estimates (arXiv 2511.22048, section 3 and figure 2): at high noise a teacher
without a condition could guess any picture, while one that sees the sparse structure stays near the truth. The grid of
pictures is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..backbone.protocol import Backbone
from ..errors import IcmsrError
from ..pictures.files import FloatArray, from_tensor
from ..pictures.panels import Cell, labelled_grid
from ..pictures.ranges import signed_to_unit
from .metrics import psnr_y


def seeded_noise(latent: Tensor, seed: int) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `latent` [N, C, h, w]; the same for the same seed.

    It is drawn on the CPU in float32, one sample after another, so the noise of sample n does not depend on the batch
    size or the device.
    """
    random = torch.Generator().manual_seed(seed)
    noise = torch.empty(latent.shape)
    for sample in noise:
        torch.randn(sample.shape, generator=random, out=sample)
    return noise.to(latent)


@torch.no_grad()
def clean_estimates(
    backbone: Backbone,
    latent: Tensor,
    timesteps: Sequence[int],
    noise: Tensor,
    features: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The clean estimate [N, C, h, w] of `latent` [N, C, h, w] from each of `timesteps`, in their order.

    ``z_t = a_t z + s_t noise``; the network's output at z_t is converted to x0 in closed form. `noise` [N, C, h, w] is
    the same at all timesteps: with the same noise, estimates with and without `features` differ only by the condition.
    `features` are those of `Backbone.predict_noise`; they are not changed.

    Raises `IcmsrError` for timesteps outside of the schedule, for no timestep, for other shapes, and for a backbone
    whose output is a residual: that is a one-step generator, which works at one timestep and without noise.
    """
    descriptor = backbone.descriptor
    if descriptor.prediction == "residual":
        raise IcmsrError(
            "clean estimates need a diffusion prior (prediction eps or v), the backbone predicts a residual: open the "
            "base without its generator"
        )
    if not timesteps:
        raise IcmsrError("timesteps is empty: name one or more, such as 200, 500, 800")
    for t in timesteps:
        descriptor.schedule.check_timestep(t)
    if latent.ndim != 4 or latent.shape[1] != descriptor.latent_channels or noise.shape != latent.shape:
        raise IcmsrError(
            f"latent and noise must both be [N, {descriptor.latent_channels}, h, w], got {list(latent.shape)} and "
            f"{list(noise.shape)}"
        )
    estimates = []
    for t in timesteps:
        noisy = descriptor.schedule.add_noise(latent, noise, t)
        # A new list for each call: a network that empties it would run unconditioned from the second call on.
        output = backbone.predict_noise(noisy, t, None if features is None else list(features))
        estimates.append(descriptor.schedule.x0_from_output(descriptor.prediction, noisy, output, t))
    return estimates


def latent_error(estimate: Tensor, latent: Tensor) -> Tensor:
    """Mean squared error of each sample of `estimate` [N, C, h, w] against `latent` [N, C, h, w].

    Float64 [N] on the CPU, for MPS has no such type.
    """
    return (estimate.cpu().double() - latent.cpu().double()).square().flatten(1).mean(1)


def decoded_pictures(backbone: Backbone, latent: Tensor) -> list[FloatArray]:
    """The pictures [H, W, 3] in [0, 1] of a latent [N, C, h, w], clamped."""
    with torch.no_grad():
        images = signed_to_unit(backbone.decode(latent)).clamp(0, 1)
    return [from_tensor(image[None]) for image in images]


def manifold_grid(
    truth: FloatArray,
    timesteps: Sequence[int],
    rows: Mapping[str, Sequence[FloatArray]],
    maps: Mapping[str, Mapping[str, FloatArray]] | None = None,
    truth_label: str = "truth",
) -> FloatArray:
    """The truth [H, W, 3] and its estimates at each of `timesteps`, as one labelled picture in [0, 1].

    `rows` has a name and a picture of the truth's size for each timestep: for example the decoded noised latent, the
    estimate without the condition, and with it. Each is labelled with its timestep and its PSNR of Y. `maps` has, by
    row, the pictures that the network was shown, by name; they stand at the left of the row. The truth stands first in
    the first row, labelled `truth_label`.
    Raises `IcmsrError` when a row does not have one picture for each timestep, or one of another size than the truth.
    """
    shown: dict[str, list[Cell]] = {name: list((maps or {}).get(name, {}).items()) for name in rows}
    for name, pictures in rows.items():
        if len(pictures) != len(timesteps):
            raise IcmsrError(
                f"row {name!r} must have a picture for each of {len(timesteps)} timesteps, got {len(pictures)}"
            )
    if rows:
        shown[next(iter(rows))].insert(0, (truth_label, truth))
    width = max(map(len, shown.values()), default=0)
    grid = {}
    for name, pictures in rows.items():
        blank: list[Cell] = [("", None)] * (width - len(shown[name]))
        labels = [f"t = {t}   {psnr_y(picture, truth):.1f} dB" for t, picture in zip(timesteps, pictures)]
        grid[name] = [*shown[name], *blank, *zip(labels, pictures)]
    return labelled_grid(grid)
