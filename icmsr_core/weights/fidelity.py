"""The fidelity: how much of a generator's realistic set is added to its faithful one (`merging.py`). Needs no torch."""

from __future__ import annotations

from ..errors import IcmsrError

MAX_FIDELITY = 2.0


def check_fidelity(fidelity: float) -> float:
    """`fidelity` itself; raises `IcmsrError` unless it is from 0 to 2."""
    if not 0 <= fidelity <= MAX_FIDELITY:
        raise IcmsrError(f"fidelity must be a number from 0 to {MAX_FIDELITY:g}, got {fidelity}: 1 is the trained one")
    return fidelity


def check_fidelity_applies(name: str, two_sets: bool, fidelity: float | None) -> None:
    """Raises `IcmsrError` for a fidelity beyond 0..2, or for any fidelity when the generator `name` holds one set.

    None, no choice, always passes.
    """
    if fidelity is None:
        return
    check_fidelity(fidelity)
    if not two_sets:
        raise IcmsrError(
            f"{name}: fidelity needs a generator with a faithful and a realistic set of weights, this one holds a "
            f"single set: omit fidelity (in ComfyUI: leave it at 1), got {fidelity:g}"
        )
