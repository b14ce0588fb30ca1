"""How the suite is shared out between processes: no group names a file that has moved."""

import re

import pytest

from tests.support.places import ROOT
from tests.support.workers import LONGEST_FIRST, SHARED_SERVER, group_of, rank_of, worth_sharing


def test_every_named_file_exists():
    assert [name for name in (*SHARED_SERVER, *LONGEST_FIRST) if not (ROOT / name).is_file()] == []
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)
    assert not set(SHARED_SERVER[1:]) & set(LONGEST_FIRST), "a group is named by its first file"


def test_the_files_that_use_the_running_comfyui_are_one_group():
    fixture = re.compile(r"def \w+\(.*\bcomfy_server\b")
    files = (ROOT / "tests").rglob("test_*.py")
    users = {path.relative_to(ROOT).as_posix() for path in files if fixture.search(path.read_text(encoding="utf-8"))}
    assert users == set(SHARED_SERVER)
    assert {group_of(f"{name}::test_a[b::c]") for name in SHARED_SERVER} == {SHARED_SERVER[0]}
    assert group_of("tests/upscale/test_color.py::test_a") == "tests/upscale/test_color.py"


def test_long_groups_come_first():
    ranks = [rank_of(f"{name}::test_a") for name in (*LONGEST_FIRST, "tests/upscale/test_color.py")]
    assert ranks == sorted(ranks)
    assert rank_of(f"{SHARED_SERVER[1]}::test_a") == rank_of(f"{SHARED_SERVER[0]}::test_a")


@pytest.mark.parametrize(
    ("arguments", "shared"),
    [
        (["tests"], True),
        (["tests/upscale", "tests/pack/test_workers.py"], True),
        (["tests/pack/test_workers.py"], False),
        (["tests/pack/test_workers.py::test_long_groups_come_first"], False),
    ],
)
def test_a_folder_is_shared_out_and_a_file_is_not(arguments, shared, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert worth_sharing(arguments) is shared
