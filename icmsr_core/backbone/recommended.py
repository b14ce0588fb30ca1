"""The settings that a generator's authors ran it with, as its file states them. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import IcmsrError


@dataclass(frozen=True)
class Recommended:
    """Values for the settings of `UpscaleSettings` that have the same names; None: no recommendation.

    Whether a value is allowed is checked when settings are made of it. A setting that the user chose goes first.
    """

    color_fix: str | None = None
    """Colour correction."""
    tile: int | None = None
    """Tile of the UNet in pixels of the result."""
    overlap: int | None = None
    """Overlap of the tiles, in pixels of the result."""
    smallest: int | None = None
    """Least shorter side, in pixels, in which the networks see a result."""
    resize: str | None = None
    """Kernel that enlarges the input."""

    def values(self) -> dict[str, Any]:
        """What is recommended, by the setting's name."""
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


TEXT_FIELDS = ("color_fix", "resize")
"""Fields that are texts; the others are whole numbers."""


def recommended_from(name: object, values: Mapping[str, Any]) -> Recommended:
    """What the file called `name` recommends, from the JSON object `values`; entries that are not known are ignored.

    Raises `IcmsrError` for a value of another type.
    """
    known = {entry.name: values[entry.name] for entry in fields(Recommended) if entry.name in values}
    for key, value in known.items():
        kind = str if key in TEXT_FIELDS else int
        if not isinstance(value, kind) or isinstance(value, bool):
            raise IcmsrError(f"{name}: recommended {key} must be a {kind.__name__}, got {value!r}")
    return Recommended(**known)
