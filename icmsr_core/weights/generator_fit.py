"""Whether a generator belongs on a base, according to the descriptions of both; `merging.py` checks its tensors."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import IcmsrError
from .generator_file import Generator
from .sd_families import SD_HUB_IDS


def check_family(generator: Generator, family: str, where: str) -> None:
    """Raises `IcmsrError` unless the generator is for `family`; `where` names the base."""
    info = generator.info
    if info.family != family:
        hub = f" (--base {SD_HUB_IDS[info.family]}, say)" if info.family in SD_HUB_IDS else ""
        raise IcmsrError(
            f"{generator.name}: the generator is for the family {info.family!r}, {where} is {family!r}: choose files "
            f"of one family{hub}"
        )


def check_prior(
    generator: Generator, prediction: str, where: str, own_base: Callable[[], bool] = lambda: False
) -> None:
    """Raises `IcmsrError` when the generator's LoRA does not belong on a prior that predicts `prediction`.

    A LoRA has to start from the prediction that it was trained from. A generator with residual prediction does not
    state it: eps is assumed, unless `own_base` says that this is the very base it was trained on. A UNet whose tensors
    are replaced may predict anything. `where` names the base in the error.
    """
    if not any(weights.lora for weights in generator.sets("unet")):
        return
    own = generator.info.prediction
    if (prediction == "eps" or own_base()) if own == "residual" else prediction == own:
        return
    wanted = "eps" if own == "residual" else own
    model = "v-prediction (768 px)" if wanted == "v" else "eps-prediction (512 px, such as SD2.1-base)"
    raise IcmsrError(
        f"the generator is for a base that predicts {wanted}, this one predicts {prediction} ({where}): "
        f"choose the {model} model"
    )
