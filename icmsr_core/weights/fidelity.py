"""The fidelity: how much of a generator's realistic set is laid over its faithful one. Needs no torch."""

from __future__ import annotations

from ..errors import IcmsrError

MAX_FIDELITY = 2.0


def check_fidelity(fidelity: float) -> float:
    """`fidelity` when it lies in 0..2; an `IcmsrError` otherwise."""
    if not 0 <= fidelity <= MAX_FIDELITY:
        raise IcmsrError(f"fidelity must be a number from 0 to {MAX_FIDELITY:g}, got {fidelity}: 1 is the trained one")
    return fidelity
