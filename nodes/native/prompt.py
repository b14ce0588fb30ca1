"""A CONDITIONING as one plain prompt: what a single step cannot act on is refused, not dropped."""

from __future__ import annotations

from torch import Tensor

from ...icmsr_core.errors import IcmsrError
from .core_objects import Clip, Conditioning

NOT_HERE = {
    "control": "a ControlNet (use control_net with an adapter from ICM-SR Load Adapter)",
    "mask": "a mask",
    "area": "an area",
    "strength": "a strength",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
    "gligen": "GLIGEN boxes",
    "unclip_conditioning": "an unCLIP picture",
    "hooks": "hooks",
    "concat_latent_image": "an inpainting latent",
    "reference_latents": "reference latents",
}
"""What core's nodes put into a CONDITIONING, by its key, in words; none of it has a meaning in the one step."""
NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
"""Values that change nothing."""


def embed(clip: Clip, prompt: str, width: int) -> Tensor:
    """The context [tokens, width] of `prompt`, as CLIP Text Encode gives it.

    Raises `IcmsrError` when the CLIP is not that of a MODEL whose text has `width` values per token.
    """
    context = clip.encode_from_tokens(clip.tokenize(prompt))
    if context.shape[-1] != width:
        raise IcmsrError(
            f"this clip gives {context.shape[-1]} values per token, the MODEL takes {width}: connect the CLIP of the "
            "same checkpoint"
        )
    return context[0].float().cpu()


def check_conditioning(conditioning: Conditioning) -> None:
    """Raises `IcmsrError` unless `conditioning` is one prompt for the whole picture, as CLIP Text Encode makes it."""
    if not len(conditioning):
        raise IcmsrError("the conditioning is empty: connect CLIP Text Encode, or leave conditioning unconnected")
    if len(conditioning) > 1:
        raise IcmsrError(
            f"the conditioning holds {len(conditioning)} prompts, the one step takes one: connect CLIP Text Encode "
            "without Conditioning (Combine)"
        )
    options = conditioning[0][1] if len(conditioning[0]) > 1 else {}
    found = [
        words
        for key, words in NOT_HERE.items()
        if options.get(key) is not None and options[key] != NEUTRAL.get(key, object())
    ]
    if found:
        raise IcmsrError(
            f"the conditioning holds {', '.join(dict.fromkeys(found))}, which the one step cannot use: connect CLIP "
            "Text Encode directly"
        )
