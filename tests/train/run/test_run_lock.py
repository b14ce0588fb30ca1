"""One training at a time in a run folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.run_lock import HOLDER, run_lock
from tests.support.places import ROOT

HOLD = """
import sys, time
from pathlib import Path
from icmsr_core.train.run.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of `tmp_path` / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.long
def test_a_second_start_is_told_who_trains_here_and_a_crash_releases(tmp_path, holder):
    run = tmp_path / "run"
    with (
        pytest.raises(IcmsrError, match=rf"run: process {holder.pid} on .*, since 20\d\d-.* is training here: wait"),
        run_lock(run),
    ):
        pass
    holder.kill()
    holder.wait()
    with run_lock(run):
        assert f"process {os.getpid()} " in (run / HOLDER).read_text()
    assert not (run / HOLDER).exists()


def test_the_lock_can_be_held_again_and_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="training failed"), run_lock(tmp_path / "new" / "run"):
        raise ValueError("training failed")
    with run_lock(tmp_path / "new" / "run"):
        pass


def test_a_file_in_the_place_of_the_run_folder_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(IcmsrError, match="run: is a file, a run needs a folder"), run_lock(tmp_path / "run"):
        pass
