"""Throws changed files at every reader: a result or one line that names the file, in bounded time and memory.

    python -m tests.campaign.fuzz --inputs 20000 --seed 0 --minutes 90

Each input is read in a process that is watched from outside. A finding is: any other exception than `IcmsrError`; an
error of several lines, or one that does not name the file; over 20 s of processor time, or three minutes of the clock;
more memory than the larger of 2 GB and six times the decoded picture (float32, as it is kept); a half file, or any file
after a refusal; code in a pickle that ran; the end of the process. A finding's input is kept, and made again by
``--only "KIND NUMBER"`` with the same seed.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import stored_size
from icmsr_core.train.run.checkpoint import DAMAGED
from tests.campaign.fuzz_kinds import KINDS, MARK, Wrong, make_stock, shares

SECONDS = 20
"""Of the processor, so that a busy machine finds nothing that is not there."""
HANGS = 180
"""Of the clock."""
MEMORY = 2 << 30
RESULT, REFUSED = "result", "refused"


@dataclass
class Report:
    """What came of a run."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind and outcome."""
    findings: list[dict] = field(default_factory=list)
    slowest: float = 0.0
    """Seconds."""
    most_memory: int = 0
    """Bytes, beyond what the process had before."""

    @property
    def inputs(self) -> int:
        """How many there were."""
        return self.counts.total()


def run_fuzz(inputs: int, seed: int, minutes: float, keep: Path, only: tuple[str, int] | None = None) -> Report:
    """Reads `inputs` files, or as many as `minutes` allow; the inputs of findings stay in `keep`."""
    report, ends = Report(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="icmsr-fuzz-") as place:
        stock = Path(place) / "stock"
        stock.mkdir()
        make_stock(stock)
        watched = Watched(Path(place), stock, seed)
        try:
            for kind, number in [only] if only else mixed(inputs):
                if time.monotonic() > ends:
                    break
                answer = watched.read(kind, number)
                report.counts[kind, answer["outcome"]] += 1
                report.slowest = max(report.slowest, answer["seconds"])
                report.most_memory = max(report.most_memory, answer["memory"])
                if answer["outcome"] not in (RESULT, REFUSED):
                    report.findings.append({"kind": kind, "number": number, "seed": seed, **answer})
                    if (Path(place) / "case").exists():
                        keep.mkdir(parents=True, exist_ok=True)
                        shutil.copytree(Path(place) / "case", keep / f"{kind} {number}", dirs_exist_ok=True)
        finally:
            watched.stop()
    return report


def mixed(inputs: int) -> Iterator[tuple[str, int]]:
    """The kinds in turn by their shares, so that a run that is cut short has seen all of them."""
    order = [((number + 0.5) / count, kind, number) for kind, count in shares(inputs) for number in range(count)]
    for _, kind, number in sorted(order):
        yield kind, number


class Watched:
    """A process that makes and reads one input at a time; a new one takes its place when it hangs or dies."""

    def __init__(self, place: Path, stock: Path, seed: int) -> None:
        self._case, self._stock, self._seed = place / "case", stock, seed
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def read(self, kind: str, number: int) -> dict:
        """Outcome, seconds, memory, and for findings what happened."""
        if self._process is None:
            self._start()
        assert self._pipe is not None
        assert self._process is not None
        shutil.rmtree(self._case, ignore_errors=True)
        self._case.mkdir()
        self._pipe.send((kind, number))
        try:
            if self._pipe.poll(HANGS):
                return self._pipe.recv()
            outcome = f"hangs: over {HANGS} s"
        except EOFError:
            self._process.join(5)
            outcome = f"the process ended with {self._process.exitcode}"
        self.stop()
        return {"outcome": outcome, "seconds": 0.0, "memory": 0}

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._case, self._stock, self._seed), daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection, case: Path, stock: Path, seed: int) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)  # libtiff and others write to the descriptor itself
    os.dup2(null, 2)
    while True:
        kind, number = pipe.recv()
        try:
            pipe.send(_read(kind, number, case, stock, seed))
        except Exception:  # the campaign's own fault, and shown as such
            answer = {"outcome": "no input was made", "detail": traceback.format_exc()[-3000:]}
            pipe.send({**answer, "seconds": 0.0, "memory": 0})


def _read(kind: str, number: int, case: Path, stock: Path, seed: int) -> dict:
    random = Random(f"{seed}/{kind}/{number}")
    made = KINDS[kind][0](random, case, stock)
    files = {path for path in case.rglob("*") if path.is_file()}
    sizes = [stored_size(path) for path in files if path.name.startswith("in.")]
    decoded = max((12 * size[0] * size[1] for size in sizes if size), default=0)
    before = _memory("VmRSS:")
    _forget_peak()
    started, detail = time.process_time(), ""
    try:
        made.read()
        outcome = RESULT
    except IcmsrError as error:
        outcome, detail = REFUSED, str(error)
        if "\n" in detail:
            outcome = "an error of several lines"
        elif not any(name in detail for name in made.names):
            outcome = "an error that does not name the file"
    except Wrong as error:
        outcome, detail = "wrong", str(error)
    except BaseException as error:
        outcome, detail = f"raised {type(error).__name__}", traceback.format_exc()[-3000:]
    seconds = time.process_time() - started
    memory = max(0, _memory("VmHWM:") - before)
    left = {path for path in case.rglob("*") if path.is_file()} - files
    if (case / MARK).exists():
        outcome = "code was run"
    elif any(path.name.endswith(".part") for path in left):
        outcome = "a half file stays"
    elif outcome == REFUSED and not all(DAMAGED in str(path) for path in left):
        outcome = "a file stays after a refusal"
    elif outcome in (RESULT, REFUSED) and seconds > SECONDS:
        outcome = f"over {SECONDS} s"
    elif outcome in (RESULT, REFUSED) and memory > max(MEMORY, 6 * decoded):
        outcome = "too much memory"
    return {"outcome": outcome, "seconds": seconds, "memory": memory, "detail": detail}


def _memory(name: str) -> int:
    """Bytes of this process: resident now (VmRSS:), or at most since `_forget_peak` (VmHWM:)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> int:
    """The command line; 0 without findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=90, help="stop after this long, with what was read until then")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where the inputs of findings go")
    parser.add_argument("--only", default="", help='one input, such as "picture 17"')
    options = parser.parse_args()
    only = None
    if options.only:
        kind, _, number = options.only.rpartition(" ")
        only = kind, int(number)
    print(f"seed {options.seed}, {options.inputs} inputs, at most {options.minutes:g} minutes", flush=True)
    started = time.monotonic()
    report = run_fuzz(options.inputs, options.seed, options.minutes, options.keep, only)
    for finding in report.findings:
        print(json.dumps(finding))
    for (kind, outcome), count in sorted(report.counts.items()):
        print(f"{kind:<20}{outcome:<40}{count:>7}")
    print(
        f"{report.inputs} inputs in {(time.monotonic() - started) / 60:.1f} minutes, {len(report.findings)} findings, "
        f"slowest {report.slowest:.1f} s, most memory {report.most_memory / 1e6:.0f} MB"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
