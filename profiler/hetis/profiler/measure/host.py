"""This host: its processor's name, its load, its cache sizes. Complete on Linux; elsewhere less is known."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from pathlib import Path

from hetis.profiler.measure.rotation import Cache

_CACHE_FILES = ("level", "size", "shared_cpu_list")
_ASSUMED_CACHE = 256 * 2**20  # as large as servers' are; more only costs memory


def cpu_name() -> str:
    """Return ``AMD EPYC``, for example, or the machine's architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine() or "CPU"
    name = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*$", " ", name)
    return " ".join(name.split())


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(_cores())


def cpu_device_name() -> str:
    """Return the GPU type that stands for this host: ``CPU-AMD-EPYC-2-cores``."""
    return f"CPU-{re.sub(r'[^A-Za-z0-9.]+', '-', cpu_name()).strip('-')}-{num_cores()}-cores"


def memory_bytes() -> int:
    """Return the physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def last_level_cache(cpus: Path = Path("/sys/devices/system/cpu"), cores: Collection[int] | None = None) -> Cache:
    """Return the total last-level cache of the cores that this process may use; each cache is counted once.

    Args:
        cpus: the kernel's folder with one folder per core.
        cores: their numbers. None: those of this process.
    """
    found: dict[tuple[int, str], int] = {}
    for core in _cores() if cores is None else cores:
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
    return Cache(num_bytes=num_bytes or _ASSUMED_CACHE, origin="as the system says" if num_bytes else "assumed")


def _cores() -> Collection[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def cpu_times() -> tuple[float, float]:
    """Return (seconds that cores were busy or stolen, total seconds) since boot over all cores; (0, 0) if unknown."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except (OSError, IndexError):
        return 0.0, 0.0
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[:8]]
    idle = ticks[3] + ticks[4]  # idle, waiting for a disk
    return sum(ticks) - idle, sum(ticks)


def own_cpu_s() -> float:
    """Return the processor time of this process and its children so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
