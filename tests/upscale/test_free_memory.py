"""Free memory as each platform tells it: Linux in files as it writes them, others by planted answers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from icmsr_core.upscale import free_memory as module
from icmsr_core.upscale.free_memory import free_memory, free_system_memory
from tests.support.vaes import backbone_of, random_vae

GIB = 2**30


def system(root: Path, available: int, cgroup: str = "") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       67108864 kB\nMemFree:          123456 kB\nMemAvailable:   {available // 1024} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_limits_it_is_what_is_available(tmp_path):
    assert free_system_memory(system(tmp_path, 5 * GIB)) == 5 * GIB


def test_the_tightest_group_counts_and_its_file_cache_is_free(tmp_path):
    root = system(tmp_path, 50 * GIB, "0::/outer/inner\n")
    group(
        root / "sys/fs/cgroup/outer",
        memory__max=f"{8 * GIB}",
        memory__current=f"{6 * GIB}",
        memory__stat=f"anon 1\ninactive_file {GIB}\nactive_file 7",
    )
    group(root / "sys/fs/cgroup/outer/inner", memory__max="max", memory__current=f"{6 * GIB}")
    assert free_system_memory(root) == 3 * GIB
    group(root / "sys/fs/cgroup/outer/inner", memory__max=f"{2 * GIB}", memory__current=f"{GIB}", memory__stat="anon 1")
    assert free_system_memory(root) == GIB
    group(root / "sys/fs/cgroup/outer/inner", memory__current=f"{3 * GIB}")
    assert free_system_memory(root) == 0


def test_a_container_may_see_its_own_group_as_the_root(tmp_path):
    root = system(tmp_path, 50 * GIB, "0::/docker/3f2a\n")
    group(root / "sys/fs/cgroup", memory__max=f"{4 * GIB}", memory__current=f"{GIB}", memory__stat="inactive_file 0")
    assert free_system_memory(root) == 3 * GIB


def test_limits_of_the_first_version_of_groups_count_too(tmp_path):
    root = system(tmp_path, 50 * GIB, "5:cpu,cpuacct:/x\n4:memory:/jobs/1\n0::/\n")
    group(
        root / "sys/fs/cgroup/memory/jobs/1",
        memory__limit_in_bytes=f"{6 * GIB}",
        memory__usage_in_bytes=f"{2 * GIB}",
        memory__stat=f"cache 5\ntotal_inactive_file {GIB}",
    )
    group(
        root / "sys/fs/cgroup/memory",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes=f"{2 * GIB}",
        memory__stat="cache 5",
    )
    assert free_system_memory(root) == 5 * GIB


def test_nothing_is_known_where_nobody_can_be_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "psutil", None)
    assert free_system_memory(tmp_path) is None
    assert free_memory(torch.device("meta")) is None


def psutil_says(monkeypatch, available: int) -> None:
    stand_in = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=available, total=16 * GIB))
    monkeypatch.setattr(module, "psutil", stand_in)


def test_windows_and_macos_are_asked_through_psutil(tmp_path, monkeypatch):
    """They have no /proc."""
    psutil_says(monkeypatch, 3 * GIB)
    assert free_system_memory(tmp_path) == 3 * GIB


def test_on_linux_proc_is_read_whether_there_is_psutil_or_not(tmp_path, monkeypatch):
    """It is what psutil reads, and control groups count on top of it."""
    psutil_says(monkeypatch, 3 * GIB)
    root = system(tmp_path, 5 * GIB)
    assert free_system_memory(root) == 5 * GIB
    monkeypatch.setattr(module, "psutil", None)
    assert free_system_memory(root) == 5 * GIB


CARD = {"mem_get_info": (GIB, 8 * GIB), "memory_reserved": 3 * GIB, "memory_allocated": 2 * GIB}
"""Of 8 GiB one is free, and one of the three that torch holds."""


def stand_in_for(monkeypatch, kind: str, raising: tuple[str, ...] = (), **answers: object) -> None:
    """Plants what the module of a device answers, and takes away its other functions."""
    planted = {name: lambda *_, answer=answer: answer for name, answer in answers.items()}

    def refuses(*_: object) -> None:
        raise RuntimeError("The device does not support querying the available free memory")

    planted |= dict.fromkeys(raising, refuses)
    monkeypatch.setattr(torch, kind, SimpleNamespace(**planted), raising=False)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "npu"])
def test_an_accelerator_s_free_memory_includes_what_torch_keeps(monkeypatch, kind):
    stand_in_for(monkeypatch, kind, **CARD)
    assert free_memory(SimpleNamespace(type=kind)) == 2 * GIB


@pytest.mark.parametrize("raising", [(), ("mem_get_info",)])
def test_xpu_without_an_answer_is_all_that_torch_has_not_taken(monkeypatch, raising):
    """torch before 2.8, and drivers that do not say what other programs use."""
    answers = {key: value for key, value in CARD.items() if key != "mem_get_info"}
    properties = SimpleNamespace(total_memory=8 * GIB)
    stand_in_for(monkeypatch, "xpu", raising, get_device_properties=properties, **answers)
    assert free_memory(torch.device("xpu")) == 6 * GIB
    stand_in_for(monkeypatch, "xpu", (*raising, "get_device_properties"))
    assert free_memory(torch.device("xpu")) is None


@pytest.mark.parametrize(
    ("available", "most", "expected"),
    [
        (10, 12, 9),  # Metal's limit: 12 but for the 3 of this program's tensors
        (4, 12, 6),  # the system's: 4, and 2 that torch keeps
        (4, 2, 0),
        (None, 12, 9),
    ],
)
def test_mps_is_limited_by_metal_and_by_the_system(monkeypatch, available, most, expected):
    monkeypatch.setattr(module, "free_system_memory", lambda: None if available is None else available * GIB)
    taken = {"current_allocated_memory": 3 * GIB, "driver_allocated_memory": 5 * GIB}
    stand_in_for(monkeypatch, "mps", recommended_max_memory=most * GIB, **taken)
    assert free_memory(torch.device("mps")) == expected * GIB
    stand_in_for(monkeypatch, "mps", **taken)  # an older torch
    assert free_memory(torch.device("mps")) == (None if available is None else available * GIB)


@pytest.mark.parametrize(("kind", "room"), [("cuda", 2 * GIB), ("meta", float("inf"))])
def test_whole_maps_of_the_diffusers_vae_may_take_that_much(monkeypatch, kind, room):
    backbone = backbone_of(random_vae(2, False, False))
    stand_in_for(monkeypatch, "cuda", **CARD)
    backbone.device = torch.device(kind)
    assert backbone.vae_half("decoder", 64).room() == room


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_the_free_memory_of_this_machine_is_below_its_total():
    free = free_memory(torch.device("cpu"))
    total = next(
        line for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if line.startswith("MemTotal:")
    )
    assert free is not None
    assert 0 <= free < 1024 * float(total.split()[1])
