"""What a user says about a foreign file that does not say it itself. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Told:
    """Each field may be left out. A published relative knows its own values, and takes no others but `coeff_t`."""

    family: str = ""
    """``sd21`` or ``sd15``; empty: not told."""
    timestep: int | None = None
    """The UNet's one input timestep."""
    prediction: str | None = None
    """What the UNet's output means: eps, v or residual."""
    coeff_t: int | None = None
    """The timestep of the closed form, where it is to differ from the UNet's: lower is a weaker effect (HYPIR's
    ``coeff_t``)."""
