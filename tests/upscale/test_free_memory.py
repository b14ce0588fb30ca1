"""Free memory as Linux tells it, from files as it writes them."""

from pathlib import Path

import pytest
import torch

from icmsr_core.upscale.free_memory import free_memory, free_system_memory

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


def test_nothing_is_known_where_the_system_does_not_say(tmp_path):
    assert free_system_memory(tmp_path) is None
    assert free_memory(torch.device("meta")) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_the_free_memory_of_this_machine_is_below_its_total():
    free = free_memory(torch.device("cpu"))
    total = next(
        line for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if line.startswith("MemTotal:")
    )
    assert free is not None
    assert 0 <= free < 1024 * float(total.split()[1])
