"""Pickles that run code, to prove that no reader of ours does."""

from contextlib import suppress
from pathlib import Path

import torch


class HostileValue:
    """A value whose pickle creates the file `mark` when it is read by anything that runs the code in a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def assert_runs_code(path: Path, mark: Path) -> None:
    """An ordinary reader of the pickle at `path` does create the file `mark`, which is then removed."""
    assert not mark.exists()
    with suppress(RuntimeError):  # a pickle that torch.save did not write is refused after its first object was read
        torch.load(path, weights_only=False)
    assert mark.exists()
    mark.unlink()
