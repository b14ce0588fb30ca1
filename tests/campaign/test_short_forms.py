"""The campaigns in short: that they run, that what they found stays mended, and that they can find something."""

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from icmsr_core.errors import IcmsrError
from tests.campaign import fuzz, fuzz_kinds
from tests.campaign.fuzz import run_fuzz
from tests.campaign.fuzz_kinds import KINDS, Case
from tests.campaign.graphs import run_graphs
from tests.campaign.kills import broken_files, differences, results, run_kills
from tests.campaign.together import run_together
from tests.support.pictures import write_random_picture

pytestmark = pytest.mark.long


def silent(_: str) -> None:
    pass


def test_changed_files_are_read_or_refused_in_words(tmp_path: Path) -> None:
    report = run_fuzz(120, seed=7, minutes=60, keep=tmp_path)
    assert report.findings == []
    assert report.inputs == 120
    assert {kind for kind, _ in report.counts} == set(KINDS)
    assert {outcome for _, outcome in report.counts} == {fuzz.RESULT, fuzz.REFUSED}


def test_the_fuzz_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(random: Random, folder: Path, stock: Path) -> Case:
        def read() -> None:
            number = len(list(stock.parent.glob("turn*")))
            (stock.parent / f"turn{number}").touch()
            if number == 3:
                (folder / "left.part").touch()
            if number == 0:
                raise KeyError("x")
            if number == 1:
                raise IcmsrError("it is damaged")
            if number == 2:
                raise IcmsrError("named: two\nlines")

        return Case(read, ("named",))

    monkeypatch.setattr(fuzz, "KINDS", {"planted": (make, 1)})
    monkeypatch.setattr(fuzz_kinds, "KINDS", {"planted": (make, 1)})
    report = run_fuzz(5, seed=0, minutes=5, keep=tmp_path)
    assert [finding["outcome"] for finding in report.findings] == [
        "raised KeyError",
        "an error that does not name the file",
        "an error of several lines",
        "a half file stays",
    ]
    assert report.counts["planted", fuzz.RESULT] == 1


@pytest.mark.slow
def test_a_killed_run_and_a_failing_disk_change_no_result() -> None:
    report = run_kills(1, kills=2, failures=1, seed=3, minutes=60, say=silent)
    assert report.findings == []
    assert (report.runs, report.kills, report.failures) == (1, 2, 1)
    assert report.compared >= 1


def test_the_kills_find_what_is_not_whole(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole" / "run", tmp_path / "other" / "run"
    for folder, width in ((whole, 8), (other, 9)):
        folder.mkdir(parents=True)
        write_random_picture(folder / "a.png", width, 8)
    assert broken_files(tmp_path) == []
    assert differences(results(whole.parent), results(other.parent)) == ["run/a.png differs"]
    (other / "a.png").write_bytes((whole / "a.png").read_bytes()[:60])
    (other / "b.json").write_text("{", encoding="utf-8")
    (other / ".icmsr-x.part").write_bytes(b"half")
    (other / "7.damaged").mkdir()
    said = ["7.damaged", "a.png is not whole", "b.json is not whole"]
    assert [text.split(":")[0] for text in broken_files(other)] == said
    (other / "a.png").write_bytes((whole / "a.png").read_bytes())
    save_file({"x": torch.arange(3.0)}, whole / "w.safetensors", {"b": "1", "a": "2"})
    data = (whole / "w.safetensors").read_bytes()
    one, two = b'{"b":"1","a":"2"}', b'{"a":"2","b":"1"}'  # the library writes the metadata in any order
    (other / "w.safetensors").write_bytes(data.replace(one, two) if one in data else data.replace(two, one))
    assert (other / "w.safetensors").read_bytes() != data
    assert differences(results(whole.parent), results(other.parent)) == []
    save_file({"x": torch.arange(3.0)}, other / "w.safetensors", {"b": "1", "a": "3"})
    assert differences(results(whole.parent), results(other.parent)) == ["run/w.safetensors differs"]
    save_file({"x": torch.arange(1, 4.0)}, other / "w.safetensors", {"b": "1", "a": "2"})
    assert differences(results(whole.parent), results(other.parent)) == ["run/w.safetensors differs"]


@pytest.mark.slow
def test_programs_at_once_do_not_disturb_each_other() -> None:
    report = run_together(1, seed=0, minutes=60, clients=0)
    assert report.findings == []
    assert report.counts.total() == 2


@pytest.mark.slow
@pytest.mark.comfy
def test_random_graphs_give_the_librarys_results(comfyui: Path, comfy_python: Path) -> None:
    report = run_graphs(12, prompts=12, seed=1, minutes=60, side=24, say=silent)
    assert [finding for finding in report.findings if "memory" not in str(finding.get("finding"))] == []
    assert report.counts["plain: compared"] >= 20, "the first ten and their repeats"
    assert report.compared >= 20
    assert 0 < report.furthest <= 1 / 255
