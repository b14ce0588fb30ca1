"""The checkpoints of a run: whole folders that appear at once, of which the newest few are kept.

A checkpoint ``checkpoints/000016000`` holds ``state.safetensors`` (weights, running averages, the optimisers' moments,
the position) and what the task exports. It is written under another name and then renamed: after a kill at any moment
there is either the whole folder or a leftover that the next start clears away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import IcmsrError
from ...weights.generator_file import read_tensors, write_tensors
from ..tasks.task import Player

FORMAT = "icmsr-training-state"
STATE_FILE = "state.safetensors"
PARTIAL = ".partial"


@dataclass
class Position:
    """Where a run is."""

    images: int = 0
    """Training images seen."""
    skipped: int = 0
    """Optimiser steps left out because of non-finite gradients."""
    in_a_row: dict[str, int] = field(default_factory=dict)
    """By player: those of them since its last good one."""


class Averages(dict[str, dict[str, Tensor]]):
    """Running averages by player and parameter name."""


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; clears away what a kill left unfinished."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = sorted(path for path in folder.iterdir() if path.name.isdigit())
    return found[-1] if found else None


def write_checkpoint(
    run: Path,
    players: Sequence[Player],
    averages: Averages,
    optimizers: Mapping[str, torch.optim.Optimizer],
    position: Position,
    mark: str,
    keep: int,
    export: Callable[[Path], object],
) -> Path:
    """Writes the checkpoint of `position`, exported files included, then removes all but the newest `keep`."""
    final = run / "checkpoints" / f"{position.images:09d}"
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    export(partial)
    save_state(partial / STATE_FILE, players, averages, optimizers, position, mark)
    os.replace(partial, final)
    for old in sorted(path for path in final.parent.iterdir() if path.name.isdigit())[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_state(
    path: Path,
    players: Sequence[Player],
    averages: Averages,
    optimizers: Mapping[str, torch.optim.Optimizer],
    position: Position,
    mark: str,
) -> None:
    """Writes a run's state atomically: the file at `path` is always a whole one."""
    tensors: dict[str, Tensor] = {}
    for player in players:
        for name, parameter in player.parameters.items():
            tensors[f"weight/{player.name}/{name}"] = parameter.detach()
            if player.averaged:
                tensors[f"average/{player.name}/{name}"] = averages[player.name][name]
            for key, value in optimizers[player.name].state.get(parameter, {}).items():
                tensors[f"{key}/{player.name}/{name}"] = torch.as_tensor(value)
    meta = {"format": FORMAT, "position": json.dumps(vars(position)), "fingerprint": mark}
    write_tensors(path, {key: value.cpu() for key, value in tensors.items()}, meta)


def load_state(
    path: Path,
    players: Sequence[Player],
    averages: Averages,
    optimizers: Mapping[str, torch.optim.Optimizer],
    mark: str,
) -> Position:
    """Restores what `save_state` wrote into the live objects and returns the position.

    Raises `IcmsrError` when the file is of another configuration: resuming would mix two runs.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise IcmsrError(f"{path}: not a training state")
    if metadata["fingerprint"] != mark:
        raise IcmsrError(
            f"{path.parents[2]}: this run was started with another configuration ({_differences(metadata, mark)}): "
            "choose another run folder, or put those values back"
        )
    try:
        with torch.no_grad():
            for player in players:
                state = optimizers[player.name].state
                for name, parameter in player.parameters.items():
                    parameter.copy_(tensors.pop(f"weight/{player.name}/{name}"))
                    if player.averaged:
                        averages[player.name][name].copy_(tensors.pop(f"average/{player.name}/{name}"))
                    own = {key: f"{key}/{player.name}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
                    if own["step"] in tensors:
                        state[parameter] = {
                            key: tensors.pop(full).to("cpu" if key == "step" else parameter.device)
                            for key, full in own.items()
                        }
    except KeyError as error:
        raise IcmsrError(f"{path}: no tensor {error}: remove this checkpoint to go on from the one before") from error
    if tensors:
        raise IcmsrError(f"{path}: tensors of no parameter: {sorted(tensors)[:4]}")
    return Position(**json.loads(metadata["position"]))


def fingerprint(values: Mapping[str, object]) -> str:
    """A configuration as text, for telling two runs apart; order of keys does not matter."""
    return json.dumps(values, sort_keys=True, default=str)


def _differences(metadata: Mapping[str, str], mark: str) -> str:
    old, new = (_flatten(json.loads(text)) for text in (metadata["fingerprint"], mark))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed[:3])


def _flatten(values: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
