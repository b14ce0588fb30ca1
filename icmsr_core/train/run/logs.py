"""What a run writes down about itself: one JSON line after another in `metrics.jsonl`, and the same for TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...errors import IcmsrError
from ...whole_file import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """A run's metrics over the images it has seen, in `run`/metrics.jsonl and, with `tensorboard`, `run`/tensorboard.

    Lines that are written survive the end of the process, however it comes. What a killed run wrote after its last
    saved state is dropped by `truncate_after`, and the log then reads as if the run had never been stopped. In
    distributed training one process only keeps it. A context manager; without the package tensorboard it warns once
    and goes on.
    """

    def __init__(self, run: Path, tensorboard: bool = False) -> None:
        self.path = run / METRICS_FILE
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._written = False
        run.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._keep(read_metrics(self.path))  # or the next line would be glued to the torn one

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """Appends `values` (by name; numbers or scalar tensors) as of `images` images seen.

        Floats keep 7 significant digits, all that a float32 has; what is not finite is written as null. Raises
        `IcmsrError` for a value called ``images``.
        """
        if "images" in values:
            raise IcmsrError("a metric cannot be called 'images', the position of the line: give it another name")
        self._written = True
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        with open(self.path, "ab") as file:  # one short write at the end of the file: no half lines when killed
            file.write(_line({"images": images} | numbers))
        writer = self._summary_writer()
        if writer is not None:
            for name, value in numbers.items():
                if math.isfinite(value):
                    writer.add_scalar(name, value, images)
            writer.flush()  # its own rhythm is two minutes, which a kill would take with it

    def truncate_after(self, images: int) -> None:
        """Drops everything later than `images`: call it on resuming, with the saved position, before any `write`.

        At 0 nothing is saved yet, and the log starts from the beginning. The file is replaced atomically. TensorBoard
        is told to forget the same steps. Raises `IcmsrError` after a `write`.
        """
        if self._written:
            raise IcmsrError("truncate_after must come before the first write: open the log again")
        first = images + 1 if images > 0 else 0
        self._purge_step = first
        if self.path.exists():
            rows = read_metrics(self.path)
            kept = [row for row in rows if row["images"] < first]
            if len(kept) < len(rows):
                self._keep(kept)

    def close(self) -> None:
        """Closes TensorBoard's file; metrics.jsonl is never left open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        replace_file(self.path, b"".join(map(_line, rows)))

    def _summary_writer(self) -> SummaryWriter | None:
        if self._tensorboard and self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                log.warning("no TensorBoard log: %s; metrics.jsonl has the same numbers (extra `train`)", error)
                self._tensorboard = False
                return None
            self._writer = SummaryWriter(str(self.path.parent / TENSORBOARD_FOLDER), purge_step=self._purge_step)
        return self._writer


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order, each a dict with ``images`` and values by name, None where not finite.

    A last line that was torn when the run was killed is dropped. Raises `IcmsrError` when there is no such file, and
    for any other line that is not a JSON object with ``images``.
    """
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file: give a run's {METRICS_FILE}")
    lines = path.read_bytes().splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["images"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise IcmsrError(f"{path}, line {number}: not a line of metrics: {line[:60]!r}: remove it") from None
        rows.append(row)
    return rows


def _line(values: Mapping[str, Any]) -> bytes:
    plain = {name: _plain(value) for name, value in values.items()}
    return json.dumps(plain, allow_nan=False).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    """A float as JSON can hold it; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
