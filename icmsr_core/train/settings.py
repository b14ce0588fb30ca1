"""A run's settings: what its files keep of them, what a resume compares, and what an exported file may tell others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

FREE = MappingProxyType({"free": True})
"""Metadata of a dataclass field that changes nothing in the weights: a run may be resumed with another value."""
UNRECORDED = MappingProxyType({"unrecorded": True})
"""Metadata of a dataclass field that no file keeps."""
ADDED = MappingProxyType({"added": True})
"""Metadata of a dataclass field that came after runs existed: a resume does not compare it while it has its default, so
that a run begun before the field goes on."""
PATH_KEYS = (
    "adapters",
    "base",
    "captions",
    "dists_weights",
    "folders",
    "lists",
    "start",
    "start_base",
    "weights",
)
"""Settings that may hold paths."""


def plain_settings(settings: Any) -> dict[str, Any]:
    """`settings` (a dataclass, or a mapping of them) as nested dictionaries for JSON, without `UNRECORDED` fields."""
    return _plain(settings, lambda field, value: "unrecorded" not in field.metadata)


def compared_settings(settings: Any) -> dict[str, Any]:
    """`plain_settings` without `FREE` fields, and without `ADDED` ones at their default: what a resume compares."""

    def kept(field: Field[Any], value: Any) -> bool:
        if "added" in field.metadata and value == _default(field):
            return False
        return not {"free", "unrecorded"} & field.metadata.keys()

    return _plain(settings, kept)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any, kept: Callable[[Field[Any], Any], bool]) -> Any:
    if is_dataclass(value):
        found = {field: getattr(value, field.name) for field in fields(value)}
        return {field.name: _plain(entry, kept) for field, entry in found.items() if kept(field, entry)}
    if isinstance(value, Mapping):
        return {key: _plain(entry, kept) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, kept) for entry in value]
    return value


def shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain `settings` as a file may carry them to others: paths by their last name, no run folder, no device."""

    def named(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [named(entry) for entry in value]
        return Path(value).name if isinstance(value, str) else value

    shared = {}
    for key, value in settings.items():
        if key not in ("run", "device"):
            nested = isinstance(value, Mapping)
            shared[key] = shareable(value) if nested else named(value) if key in PATH_KEYS else value
    return shared
