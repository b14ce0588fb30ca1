"""Reads JSON descriptions: in the metadata of a .safetensors file, or in a file next to the weights. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import IcmsrError
from .file_kinds import AGAIN

OWN_ENTRY = "icmsr"
"""Entry of the metadata with the description of one of our own files."""
Info = TypeVar("Info")


def read_description(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises `IcmsrError` when it is missing or holds anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise IcmsrError(f"{path}: the file cannot be read ({error.strerror}): {AGAIN}") from error
    except UnicodeDecodeError as error:
        raise IcmsrError(f"{path}: the file cannot be read as JSON ({error}): {AGAIN}") from error
    return parse_description(path, text, "the file")


def own_description(path: Path | str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description that one of our own files, at `path`, has in its `metadata`; empty when it has none.

    Raises `IcmsrError` for anything but a JSON object.
    """
    return parse_description(path, metadata.get(OWN_ENTRY, "{}"))


def parse_description(path: Path | str, text: str, what: str = "its description") -> dict[str, Any]:
    """The JSON object in `text`; the error for anything else calls it `what` of the file at `path`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: brackets in brackets, thousands deep
        raise IcmsrError(f"{path}: {what} cannot be read as JSON ({error}): {AGAIN}") from error
    if not isinstance(values, dict):
        raise IcmsrError(f"{path}: {what} must be a JSON object, got {type(values).__name__}: {AGAIN}")
    return values


def shortened(value: object, most: int = 60) -> str:
    """`value` as an error shows it: no more than `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "Prediction": (str,),
    "Mapping[str, Any]": (dict,),
}


def info_from(name: Path | str, kind: type[Info], values: Mapping[str, Any]) -> Info:
    """The dataclass `kind` filled with the `values` of a description; keys that it does not have are ignored.

    Its annotations must be texts (``from __future__ import annotations``). Raises `IcmsrError`, beginning with `name`,
    when a key is missing, of another type or not finite.
    """
    known = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name not in values:
            continue
        value = known[entry.name] = values[entry.name]
        fits = isinstance(value, _JSON_TYPES[str(entry.type)]) and not isinstance(value, bool)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise IcmsrError(f"{name}: {entry.name} in its description must be a {entry.type}, got {shortened(value)}")
    try:
        return kind(**known)
    except TypeError as error:
        raise IcmsrError(f"{name}: its description cannot be read ({error}): {AGAIN}") from error
