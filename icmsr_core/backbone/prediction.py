"""What a network's output can mean. Needs no torch, so that the command line can name the choices at once."""

from __future__ import annotations

from typing import Literal, get_args

from ..errors import IcmsrError

Prediction = Literal["eps", "v", "residual"]
"""What a network's output means: the noise, the velocity, or (as in PiSA-SR) ``z - x0``."""

PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def check_prediction(value: str) -> Prediction:
    """`value` as a `Prediction`; raises `IcmsrError` for any other text."""
    if value not in PREDICTIONS:
        raise IcmsrError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {value!r}")
    return value  # type: ignore[return-value]
