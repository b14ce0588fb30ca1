"""Trains an auxiliary for a generator that stays as it is, and asks teacher and auxiliary about its latents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...whole_file import replace_file
from ..losses.teacher import table
from .generator import GeneratorTask
from .task import Batch, Player


class TeacherTest(GeneratorTask):
    """A distillation in which only the auxiliary takes turns. What it exports is the table of readings."""

    def players(self) -> Sequence[Player]:
        """See `Task`."""
        return [player for player in super().players() if player.name == "auxiliary"]

    def prepare(self, player: str, batch: Batch, images: int, turn: int) -> Batch:
        """See `Task`. Adds ``latent``: the generator's."""
        prepared = super().prepare(player, batch, images, turn)
        with torch.no_grad():
            return {**prepared, "latent": self.denoised(self.given_latent(prepared))}

    def export(self, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
        """``teacher_test.json`` and ``teacher_test.md`` in `folder`; nothing where there is no `probe`."""
        if not self.probe:
            return []
        readings = self.readings()
        found = {str(t): vars(reading) for t, reading in readings.items()}
        paths = [folder / "teacher_test.json", folder / "teacher_test.md"]
        replace_file(paths[0], (json.dumps(found, indent=2) + "\n").encode())
        replace_file(paths[1], table(readings).encode())
        return paths
