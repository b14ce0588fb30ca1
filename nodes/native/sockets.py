"""Conversion between IMAGE ([B, H, W, C] in [0, 1]) and the pictures of icmsr_core ([N, C, H, W]), both ways."""

from __future__ import annotations

import comfy.model_management
import torch
from einops import rearrange
from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.pictures.channels import as_rgb

ALPHA = 3
"""Index of the fourth channel of an IMAGE: opacity, 1 opaque."""


SOCKETS = {
    "model": ("MODEL", "model_options"),
    "vae": ("VAE", "patcher"),
    "clip": ("CLIP", "tokenize"),
    "mask": ("MASK", "movedim"),
}
"""For each input its kind, and an attribute by which an object of that kind is known. Images have `check_image`, and
`Condition.connected` looks at its own two."""


def check_sockets(**inputs: object) -> None:
    """Raises `IcmsrError` unless each input, if it is there, is of its kind in `SOCKETS`.

    Core looks at the kinds of links only: a prompt that is posted with a number in the place of a link gets here.
    """
    for name, value in inputs.items():
        kind, attribute = SOCKETS[name]
        if value is not None and not hasattr(value, attribute):
            raise IcmsrError(f"{name}: must be a {kind}, got {type(value).__name__}: connect a node's {kind} output")


def check_image(name: str, image: object) -> None:
    """Raises `IcmsrError`, which says the input's `name`, unless `image` is an IMAGE.

    That is a float tensor [pictures, height, width, 1, 3 or 4 channels], not empty. `check_values` looks at its values.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise IcmsrError(
            f"{name}: must be an IMAGE [pictures, height, width, 3 or 4 channels], got {got}: check the node that "
            "made it"
        )
    if not image.numel():
        raise IcmsrError(f"{name}: holds no picture ({list(image.shape)}): check the node that made it")
    if not image.is_floating_point():
        raise IcmsrError(
            f"{name}: holds {str(image.dtype).removeprefix('torch.')} values, an IMAGE has floating-point values from "
            "0 to 1: the node that made it must divide them by the value of white (255 for 8 bits)"
        )


def check_values(name: str, image: Tensor) -> None:
    """Raises `IcmsrError`, which says the input's `name`, for NaN or infinite values in any picture of an IMAGE."""
    for index in range(image.shape[0]):
        if not bool(image[index].isfinite().all()):
            raise IcmsrError(
                f"{name}: NaN or infinite values in picture {index + 1} of {image.shape[0]}: check the node that made "
                "it"
            )


def to_pictures(image: Tensor) -> Tensor:
    """RGB pictures [N, 3, H, W], float32, of an IMAGE. Alpha is dropped, and grey becomes three equal channels."""
    return as_rgb(rearrange(image, "n h w c -> n c h w")).float()


def visible_picture(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """The RGB picture [1, 3, H, W] of an IMAGE of one, and its opacity [1, 1, H, W]; None without a fourth channel.

    Colours under opacity 0 are those of the nearest visible pixel (`fill_hidden`).
    """
    picture = to_pictures(image)
    if image.shape[-1] <= ALPHA:
        return picture, None
    alpha = image[..., ALPHA].float()
    if bool((alpha > 0).all()):
        return picture, alpha[:, None]
    from ...icmsr_core.pictures.transparency import fill_hidden  # imports OpenCV, so only when it is needed

    rgb = rearrange(picture, "1 c h w -> h w c").cpu().numpy()
    filled = torch.from_numpy(fill_hidden(rgb, alpha[0].cpu().numpy())).to(picture)
    return rearrange(filled, "h w c -> 1 c h w"), alpha[:, None]


def to_image(pictures: Tensor) -> Tensor:
    """An IMAGE [N, H, W, C], float32, clamped to [0, 1], on the device where core keeps outputs (usually the CPU)."""
    image = rearrange(pictures.float().clamp(0, 1), "n c h w -> n h w c")
    return image.contiguous().to(comfy.model_management.intermediate_device())
