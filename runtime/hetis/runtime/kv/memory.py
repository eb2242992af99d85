"""The memory that this machine, or one of its GPUs, can still provide."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def free_memory_bytes(device: str = "cpu") -> int:
    """Return the bytes that a torch device can still provide.

    For a CPU these can be allocated without swapping, on the machine or within the container's limit. For a GPU they
    include memory that torch has reserved but does not use now.
    """
    if device != "cpu":
        return _free_of_gpu(device)
    free = _available()
    for limit, used in _LIMITS:
        try:
            most, now = limit.read_text().strip(), int(used.read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            free = min(free, max(int(most) - now, 0))
    return free


def _free_of_gpu(device: str) -> int:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _available() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
