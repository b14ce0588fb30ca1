"""How much memory is free: on an accelerator what its driver says, in main memory what the system leaves us."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

try:
    import psutil
except ImportError:  # ComfyUI and accelerate need it; without it only Linux can be asked
    psutil = None

HIERARCHIES = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups of Linux, version 2 and version 1: controller, mount, the files with the limit and the use, and the
field of memory.stat that says how much of the use is cached files, which the system drops when it needs the memory."""


def free_memory(device: torch.device) -> float | None:
    """Bytes that can still be allocated on `device`, torch's own reserve included; None where nothing says so."""
    if device.type == "cpu":
        return free_system_memory()
    if device.type == "mps":
        return _free_on_mps()
    return _free_on_accelerator(getattr(torch, device.type, None), device)


def _free_on_accelerator(module: Any, device: torch.device) -> float | None:
    """For CUDA, ROCm, XPU and others whose `module` of torch has the same functions."""
    try:
        reserve = module.memory_reserved(device) - module.memory_allocated(device)
    except AttributeError:
        reserve = 0
    # XPU: missing before torch 2.8, and some drivers refuse to answer.
    with suppress(AttributeError, RuntimeError):
        return float(module.mem_get_info(device)[0] + reserve)
    with suppress(AttributeError, RuntimeError):
        total = module.get_device_properties(device).total_memory
        return float(total - module.memory_reserved(device) + reserve)
    return None


def _free_on_mps() -> float | None:
    """Of Apple's unified memory: what Metal recommends at most, and no more than the system has left."""
    system = free_system_memory()
    try:
        own = torch.mps.current_allocated_memory()
        reserve = max(0, torch.mps.driver_allocated_memory() - own)
        most = float(torch.mps.recommended_max_memory() - own)  # torch 2.5
    except AttributeError:
        return system
    return max(0.0, most if system is None else min(most, system + reserve))


def free_system_memory(root: Path = Path("/")) -> float | None:
    """Bytes that this process can still allocate in main memory; None where nothing says so.

    On Linux what the system or, if less, a control group leaves (`root` is the folder of ``proc`` and ``sys``),
    elsewhere what psutil says.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None if psutil is None else float(psutil.virtual_memory().available)
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
                stat = (folder / "memory.stat").read_text(encoding="utf-8")
                fields = dict(line.split() for line in stat.splitlines())
                rooms.append(float(most) - used + float(fields.get(cache, 0)))
        except OSError:
            pass  # no limit here: the root group of version 2 has no such file
        if folder == mount:
            return rooms
        folder = folder.parent
