"""The state of a run: what it needs to go on as if it had never stopped, in memory and in ``state.safetensors``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import IcmsrError
from ...weights.tensor_files import read_tensors, write_tensors
from ..tasks.task import Player
from .loop_config import LoopConfig, learning_rate

STATE_FORMAT = "icmsr-training-state"


@dataclass
class Position:
    """Where a run is."""

    images: int = 0
    """Training images seen."""
    skipped: int = 0
    """Optimiser steps skipped because their gradient was not finite."""
    in_a_row: dict[str, int] = field(default_factory=dict)
    """By player: skipped steps since its last good one."""


class RunState:
    """Weights, running averages, optimisers and position of a run.

    The live weights train; `averaged` puts the running averages in their place, for what is exported and shown.
    """

    def __init__(self, players: Sequence[Player], config: LoopConfig, step: int, mark: str) -> None:
        """`step` is the effective batch in images; `mark` (a `fingerprint`) is what `load` compares."""
        self.players, self.config, self.step, self.mark = players, config, step, mark
        self.photographs = ""
        """What the samples are drawn from (`listing`); a resume compares it."""
        self.lengths: tuple[str, str] = ("", "")
        """The settings that hold the images of this stage and of the run's last one, such as ``loop.images``: a run
        whose last stage has a constant schedule may be resumed with more of them."""
        self.position = Position()
        self.averages = self._copies()
        self.optimizers = {
            player.name: torch.optim.AdamW(
                player.parameters.values(),
                lr=config.learning_rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
                foreach=True,
            )
            for player in players
        }

    def rate(self, player: Player) -> float:
        """The learning rate of `player` at this position."""
        return player.learning_rate * learning_rate(self.config, self.position.images, self.step)

    def descend(self, player: Player) -> Tensor | None:
        """One optimiser step of `player` along its gradients, which are clipped and then cleared.

        Returns the norm of the gradient; None if it is not finite: the step is then skipped and counted. Raises
        `IcmsrError` at the last of `LoopConfig.patience` skipped steps in a row.
        """
        optimizer, position, name = self.optimizers[player.name], self.position, player.name
        norm = nn.utils.clip_grad_norm_(player.parameters.values(), self.config.clip)
        good = bool(norm.isfinite())
        if good:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(player)
            optimizer.step()
            position.in_a_row[name] = 0
        else:
            position.skipped += 1
            position.in_a_row[name] = position.in_a_row.get(name, 0) + 1
        optimizer.zero_grad(set_to_none=True)
        if position.in_a_row[name] >= self.config.patience:
            raise IcmsrError(
                f"{self.config.patience} optimiser steps of {name} in a row had a non-finite gradient, "
                f"the last at {position.images} images: lower learning_rate, or use precision fp32"
            )
        return norm if good else None

    def update_average(self, player: Player) -> None:
        """Moves the running average of `player`, if it has one, towards its weights: by 1 / n in the first steps, which
        makes a plain mean, later with the half-life of `LoopConfig.average_images`."""
        if player.averaged:
            decay = 0.5 ** (self.step / self.config.average_images)
            weight = max(1 - decay, 1 / (1 + self.position.images / self.step))
            for name, parameter in player.parameters.items():
                self.averages[player.name][name].lerp_(parameter.detach(), weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running averages in place of the live weights, inside the block."""
        live = self._copies()
        self.use_averages()
        try:
            yield
        finally:
            self._fill(live)

    def use_averages(self) -> None:
        """Replaces the live weights by the running averages; nothing brings them back."""
        self._fill(self.averages)

    def save(self, path: Path) -> None:
        """Writes the state atomically: the file at `path` is always a whole one."""
        tensors: dict[str, Tensor] = {}
        for player in self.players:
            for name, parameter in player.parameters.items():
                tensors[f"weight/{player.name}/{name}"] = parameter.detach()
                if player.averaged:
                    tensors[f"average/{player.name}/{name}"] = self.averages[player.name][name]
                for key, value in self.optimizers[player.name].state.get(parameter, {}).items():
                    tensors[f"{key}/{player.name}/{name}"] = torch.as_tensor(value)
        meta = {
            "format": STATE_FORMAT,
            "position": json.dumps(vars(self.position)),
            "fingerprint": self.mark,
            "photographs": self.photographs,
        }
        write_tensors(path, {key: value.cpu() for key, value in tensors.items()}, meta)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote.

        Raises `IcmsrError` when the file is damaged, and when it was written under other settings that shape the
        weights, or with other photographs: going on would mix two runs.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != STATE_FORMAT:
            raise IcmsrError(f"{path}: not a training state")
        position = Position(**json.loads(metadata["position"]))
        self._check_settings(path.parents[2], _differences(metadata["fingerprint"], self.mark), position)
        before = metadata.get("photographs", "")  # older runs have none
        if before and before != self.photographs and not self.config.changed_photographs:
            raise IcmsrError(
                f"{path.parents[2]}: photographs were added, removed or replaced since this run began, so its samples "
                "would change: put them back, or set changed_photographs of the loop to true to go on with them"
            )
        try:
            for player in self.players:
                self._restore(player, tensors)
        except KeyError as error:
            raise IcmsrError(
                f"{path}: the tensor {error} is missing: remove this checkpoint to go on from the one before"
            ) from error
        if tensors:
            raise IcmsrError(f"{path}: tensors of no parameter: {sorted(tensors)[:4]}")
        self.position = position

    def _check_settings(self, run: Path, changed: Mapping[str, tuple[object, object]], position: Position) -> None:
        """Raises `IcmsrError` for `changed` settings, unless they only make this stage or a later one longer."""
        own, last = self.lengths
        images = self.config.images
        if not changed or (changed.keys() == {last} != {own}):
            return
        if changed.keys() == {own} == {last}:
            if self.config.schedule == "constant" and images >= position.images:
                return
            was = changed[own][0]
            if images < position.images:
                text = f"it is at {position.images} already: put {was} back, or choose another run folder"
            else:
                text = (
                    f"its {self.config.schedule} schedule ends at {was}, only a constant one can be extended: put "
                    f"{was} back, or begin another run folder, from this run's result (generator.networks.start, for a "
                    "prior start) or from the beginning"
                )
            raise IcmsrError(f"{run}: {own} was {was}, is {images}: {text}")
        listed = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in list(changed.items())[:3])
        raise IcmsrError(
            f"{run}: this run was started with another configuration ({listed}): choose another run folder, or put "
            "those values back"
        )

    @torch.no_grad()
    def _restore(self, player: Player, tensors: dict[str, Tensor]) -> None:
        """Fills `player` from `tensors`, and takes out of them what is used."""
        for name, parameter in player.parameters.items():
            parameter.copy_(tensors.pop(f"weight/{player.name}/{name}"))
            if player.averaged:
                self.averages[player.name][name].copy_(tensors.pop(f"average/{player.name}/{name}"))
            own = {key: f"{key}/{player.name}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if own["step"] in tensors:
                self.optimizers[player.name].state[parameter] = {
                    key: tensors.pop(full).to("cpu" if key == "step" else parameter.device) for key, full in own.items()
                }

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the live weights of the players that have an average."""
        return {
            player.name: {name: parameter.detach().clone() for name, parameter in player.parameters.items()}
            for player in self.players
            if player.averaged
        }

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        for player in self.players:
            for name, value in weights.get(player.name, {}).items():
                player.parameters[name].copy_(value)


def listing(photographs: Sequence[Path]) -> str:
    """A short text that changes with the names, sizes and order of `photographs`, and not with where they are."""
    digest = hashlib.blake2b(digest_size=16)
    for path in photographs:
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def fingerprint(values: Mapping[str, object]) -> str:
    """Settings as text, for telling two runs apart; the order of the keys does not matter."""
    return json.dumps(values, sort_keys=True, default=str)


def _differences(old_mark: str, new_mark: str) -> dict[str, tuple[object, object]]:
    """The settings in which two fingerprints differ, old and new."""
    old, new = (_flatten(json.loads(text)) for text in (old_mark, new_mark))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def _flatten(values: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
