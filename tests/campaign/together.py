"""Several programs at once on the same files and the same ComfyUI.

    python -m tests.campaign.together --rounds 10 --seed 0 --minutes 30

A round has two `icmsr` folder runs into one folder at the same time, and a training with a folder run next to it; with
``--comfy``, three clients that queue two prompts each on one ComfyUI. A finding is: a process that ends with another
code than 0; a result that is not whole, or differs from that of a run alone; a file that nobody asked for; a prompt
that does not end well.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign.graphs import Campaign, Graph, random_graph, start_comfyui
from tests.campaign.kills import SLOWEST, Command, Process, broken_files, commands, differences, results


@dataclass
class Report:
    """What came of the rounds."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)


def run_together(rounds: int, seed: int, minutes: float, clients: int) -> Report:
    """`rounds` of two folder runs, of a training with an upscale, and of `clients` on one ComfyUI (0: none)."""
    report, random, ends = Report(), Random(seed), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="icmsr-together-") as place:
        stock = Path(place) / "stock"
        stock.mkdir()
        known = {command.name: command for command in commands(stock)}
        training, folder = known["adapter"], known["folder, all again"]
        alone, seconds = {}, {}
        for again in ("first", "then"):  # the first process of all waits for imports
            for command in (training, folder):
                where = Path(place) / f"{command.script} {again}"
                where.mkdir()
                started = time.monotonic()
                _wait([Process(command, where)], report, "alone")
                seconds[command.name], alone[command.name] = time.monotonic() - started, results(where)
                if not alone[command.name]:
                    raise RuntimeError(f"{command.name} has no results")
        for number in range(rounds):
            if time.monotonic() > ends:
                break
            for pair in ((folder, folder), (training, folder)):
                where = Path(place) / f"{number} {pair[0].name}"
                where.mkdir()
                _pair(pair, where, random.uniform(0, 0.8) * seconds[pair[0].name], alone, report)
        if clients:
            _clients(Path(place) / "comfy", clients, rounds, seed, ends, report)
    return report


def _pair(
    pair: tuple[Command, Command], where: Path, delay: float, alone: dict[str, dict[str, str]], report: Report
) -> None:
    """Two commands at once, the second `delay` seconds later; the same command twice in one folder."""
    one = where / "one"
    other = one if pair[0] is pair[1] else where / "other"
    for folder in {one, other}:
        folder.mkdir()
    first = Process(pair[0], one, log="first.txt")
    name = f"{pair[0].name} and {pair[1].name}"
    if first.wait(delay) is not None:
        name += ", one after the other"
    _wait([first, Process(pair[1], other, log="second.txt")], report, name)
    for command, folder in zip(pair, (one, other)):
        for text in [*broken_files(folder), *differences(alone[command.name], results(folder))]:
            report.findings.append({"round": name, "finding": text})
        parts = [path.name for path in folder.rglob("*.part")]
        if parts:
            report.findings.append({"round": name, "finding": f"left behind: {parts}"})
    report.counts[name] += 1


def _wait(processes: list[Process], report: Report, name: str) -> None:
    for process in processes:
        code = process.wait(SLOWEST)
        if code != 0:
            process.kill()
            report.findings.append({"round": name, "finding": f"ended with {code}: {process.output()[-1500:]}"})


def _clients(base: Path, clients: int, rounds: int, seed: int, ends: float, report: Report) -> None:
    """Clients that queue prompts on one ComfyUI at the same time; every result is compared with the library's."""
    with start_comfyui(base) as server:
        campaign = Campaign(server, base / "models" / "icmsr", seed)
        random = Random(seed)
        for number in range(rounds):
            if time.monotonic() > ends:
                break
            graphs: list[list[Graph]] = [
                [_plain(random, 100 * number + 10 * client + place) for place in range(2)] for client in range(clients)
            ]
            threads = [threading.Thread(target=_run_each, args=(campaign, own)) for own in graphs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        report.counts.update({f"client's prompt, {end}": count for end, count in campaign.report.counts.items()})
        report.findings += campaign.report.findings


def _plain(random: Random, number: int) -> Graph:
    graph = random_graph(random, number, 32)
    return replace(graph, number=number, kind="plain", errors=0)


def _run_each(campaign: Campaign, graphs: list[Graph]) -> None:
    for graph in graphs:
        campaign.run(graph)


def main() -> int:
    """The command line; 0 without findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="begin no round after this long")
    parser.add_argument("--comfy", action="store_true", help="also three clients on one ComfyUI")
    options = parser.parse_args()
    print(f"seed {options.seed}, at most {options.minutes:g} minutes", flush=True)
    started = time.monotonic()
    report = run_together(options.rounds, options.seed, options.minutes, 3 if options.comfy else 0)
    for finding in report.findings:
        print(json.dumps(finding))
    for name, count in sorted(report.counts.items()):
        print(f"{name:<50}{count:>5}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, {len(report.findings)} findings")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
