"""This host: its processor's name, its load, its cache sizes.

Operands rotate, so that each call finds its own where serving does: in memory, not in a cache. Between two uses of the
same bytes, at least `TIMES` the last-level cache of other bytes are read. That has the effect of a flush between calls,
without its time in the loop. The cache size is read from the device, never underestimated.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TIMES = 2  # replacement is not strictly by age, and caches hash addresses: once would leave some lines behind
MAX_SETS = 16384  # limit for sets of operands; each is a node of a CUDA graph
_CACHE_FILES = ("level", "size", "shared_cpu_list")
_ASSUMED_CACHE = 256 * 2**20  # as large as servers' are; more only costs memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A device's last-level cache, and the origin of its size: ``as reported by the driver``, ``assumed``."""

    num_bytes: int
    origin: str

    def sets(self, num_bytes: int) -> int:
        """Return how many sets of operands of ``num_bytes`` each to rotate through."""
        if num_bytes >= TIMES * self.num_bytes:
            return 1  # one pass over them already empties the cache
        return min(MAX_SETS, 1 + -(-TIMES * self.num_bytes // num_bytes))

    def is_evicted(self, sets: int, num_bytes: int) -> bool:
        """Return whether one of ``sets`` has left the cache by its next turn."""
        others = num_bytes * (sets - 1) if sets > 1 else num_bytes
        return others >= TIMES * self.num_bytes


def cpu_name() -> str:
    """Return ``AMD EPYC``, for example, or the machine's architecture."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine() or "CPU"
    name = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*$", " ", name)
    return " ".join(name.split())


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_device_name() -> str:
    """Return the GPU type that stands for this host: ``CPU-AMD-EPYC-2-cores``."""
    return f"CPU-{re.sub(r'[^A-Za-z0-9.]+', '-', cpu_name()).strip('-')}-{num_cores()}-cores"


def last_level_cache(cpus: Path = Path("/sys/devices/system/cpu"), cores: Collection[int] | None = None) -> Cache:
    """Return the total last-level cache of these cores, or of those that this process may use; each cache is counted
    once.

    ``cpus`` is the kernel's folder with one folder per core.
    """
    found: dict[tuple[int, str], int] = {}
    for core in os.sched_getaffinity(0) if cores is None else cores:
        for cache in (cpus / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, size, shared = ((cache / name).read_text(encoding="ascii").strip() for name in _CACHE_FILES)
            except OSError:
                continue
            read = re.fullmatch(r"(\d+)([KM])", size)
            if read and level.isdecimal():
                found[int(level), shared] = int(read.group(1)) * {"K": 2**10, "M": 2**20}[read.group(2)]
    last = max((level for level, _ in found), default=0)
    num_bytes = sum(size for (level, _), size in found.items() if level == last)
    return Cache(num_bytes=num_bytes or _ASSUMED_CACHE, origin="as reported by the system" if num_bytes else "assumed")


class HostWatch:
    """Processor time that other processes took since it was created."""

    def __init__(self) -> None:
        self._busy, self._total = _cpu_times()
        self._own = _own_cpu_s()

    def share(self) -> float:
        """Return their share of all cores, or 0 before a tick has passed. A little is always the system's own."""
        busy, total = _cpu_times()
        elapsed = total - self._total
        if elapsed <= 0:
            return 0.0
        own = _own_cpu_s() - self._own
        return max(0.0, (busy - self._busy - own) / elapsed)


def _cpu_times() -> tuple[float, float]:
    """Return (seconds that cores were busy or stolen, total seconds) since boot over all cores."""
    first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[:8]]
    idle = ticks[3] + ticks[4]  # idle, waiting for a disk
    return sum(ticks) - idle, sum(ticks)


def _own_cpu_s() -> float:
    """Return the processor time of this process and its children so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
