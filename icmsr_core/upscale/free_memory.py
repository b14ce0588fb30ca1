"""How much memory is free: on a graphics card what the driver says, else what Linux and its control groups leave."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

HIERARCHIES = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups of Linux, version 2 and version 1: controller, mount, the files with the limit and the use, and the
field of memory.stat that says how much of the use is cached files, which the system drops when it needs the memory."""


def free_memory(device: torch.device) -> float | None:
    """Bytes that can still be allocated on `device`; None where the platform does not say (not Linux, not CUDA)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Torch's own reserve is free for new tensors too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_system_memory() if device.type == "cpu" else None


def free_system_memory(root: Path = Path("/")) -> float | None:
    """Bytes that this process can still allocate on Linux: what the system or, if less, a control group leaves.

    `root` is the folder of ``proc`` and ``sys``. None where the system does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller, mount, *names in HIERARCHIES:
                if controller in controllers.split(",") and (controller or controllers == ""):
                    free = min([free, *_group_rooms(root / mount, path.strip("/"), *names)])
    return max(0.0, free)


def _group_rooms(mount: Path, path: str, limit: str, use: str, cache: str) -> list[float]:
    """Bytes that the group at `path` and each group above it leave. In a container only the top one is mounted."""
    folder, rooms = mount / path, []
    while True:
        try:
            most = (folder / limit).read_text(encoding="utf-8").strip()
            if most != "max":
                used = float((folder / use).read_text(encoding="utf-8"))
                fields = dict(
                    line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                )
                rooms.append(float(most) - used + float(fields.get(cache, 0)))
        except OSError:
            pass  # no limit here: the root group of version 2 has no such file
        if folder == mount:
            return rooms
        folder = folder.parent
