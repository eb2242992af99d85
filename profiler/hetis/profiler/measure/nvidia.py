"""What NVML says of a GPU while it is measured: throttled clocks and other processes. Silent where NVML is not.

CUDA may count GPUs in another order than NVML (``CUDA_DEVICE_ORDER``, fastest first by default) and only those that
are visible to it, so a GPU is found by its UUID or its place on the bus, never by its number.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Clock-event reasons that make kernels slower than the GPU can be: bits of nvmlDeviceGetCurrentClocksEventReasons.
_REASONS = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}
# Violation counters: nvmlPerfPolicyType_t of nvmlDeviceGetViolationStatus. Sync boost and low utilisation are left
# out: they lower the clocks of a GPU that waits for work, not of one that does it.
_POLICIES = {0: "power", 1: "heat", 3: "the board's limit", 5: "reliability"}
# The first compute capability of each architecture, ascending.
_ARCHITECTURES = {
    (6, 0): "Pascal",
    (7, 0): "Volta",
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
}
_UNKNOWN = (13, 0)
_LOOK_INTERVAL_S = 0.02  # a look takes a few microseconds to a millisecond of the host


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAddress:
    """Which GPU, in words that NVML has too; empty where CUDA does not say.

    Attributes:
        uuid: hexadecimal digits and dashes, without the ``GPU-`` or ``MIG-`` in front.
        bus: ``00000000:3B:00.0``.
    """

    uuid: str = ""
    bus: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNews:
    """What was seen of a GPU between `GpuWatch.begin` and `GpuWatch.news`.

    Attributes:
        watched: whether NVML answered at all; without it only the variance of times tells.
        looks: how often the clocks were looked at, each time with work queued.
        reasons: reasons that lowered the clocks, and in how many looks.
        held_s: seconds that the GPU's own counters add up to, by what held its clocks down.
        elapsed_s: between the two readings of those counters, on the host's clock.
        other_processes: the most that were seen at once with a context on the GPU, ours left out.
    """

    watched: bool = False
    looks: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    held_s: Mapping[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    other_processes: int = 0


class GpuWatch:
    """Looks at one GPU from time to time."""

    def __init__(self, address: GpuAddress, *, clock: Callable[[], float], nvml: Any = None) -> None:
        """``nvml``: a module with the functions of ``pynvml``; None: that one, if it is here."""
        self._clock = clock
        self._nvml, self._device = _opened(address, nvml)
        self._began_s = clock()
        self._counters: Mapping[str, float] = {}
        self._looks = 0
        self._reasons: Counter[str] = Counter()
        self._others = 0
        self._next_s = 0.0

    def begin(self) -> None:
        """Forgets what was seen so far and reads the violation counters for the first time."""
        self._looks, self._others = 0, 0
        self._reasons.clear()
        self._counters, self._began_s = self._read_counters(), self._clock()

    def look(self) -> None:
        """Looks at the clocks: call it while work is queued, as an idle GPU lowers them for no harm."""
        if self._device is None or self._clock() < self._next_s:
            return
        self._next_s = self._clock() + _LOOK_INTERVAL_S
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # the name before driver 535
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is not None:
            self._looks += 1
            self._reasons.update(throttle_reasons(int(bits)))

    def look_at_processes(self, own: Collection[int]) -> None:
        """Counts the processes with a compute context that are not among ``own``."""
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if running is not None:
            self._others = max(self._others, strangers([int(process.pid) for process in running], own))

    def news(self) -> GpuNews:
        """Everything seen since `begin`."""
        now = self._read_counters()
        held_s = {
            name: now[name] - before_s for name, before_s in self._counters.items() if now.get(name, 0.0) > before_s
        }
        return GpuNews(
            watched=self._device is not None,
            looks=self._looks,
            reasons=dict(sorted(self._reasons.items())),
            held_s=held_s,
            elapsed_s=self._clock() - self._began_s,
            other_processes=self._others,
        )

    def driver(self) -> str:
        """The driver's version; empty where NVML does not say."""
        if self._nvml is None:
            return ""
        try:
            version = self._nvml.nvmlSystemGetDriverVersion()
        except Exception:
            return ""
        return version.decode() if isinstance(version, bytes) else str(version)

    def _read_counters(self) -> Mapping[str, float]:
        """Seconds of violations since the driver started, by policy; what the GPU does not count is left out."""
        found = {}
        for policy, name in _POLICIES.items():
            status = self._ask("nvmlDeviceGetViolationStatus", policy)
            if status is not None:
                found[name] = int(status.violationTime) * 1e-9
        return found

    def _ask(self, function: str, *arguments: object) -> Any:
        """The answer, or None: not every GPU, driver or permission has every question."""
        if self._device is None:
            return None
        try:
            return getattr(self._nvml, function)(self._device, *arguments)
        except Exception:
            return None


def architecture_of(major: int, minor: int) -> str:
    """Return what the catalogue calls a compute capability; ``sm_65`` where it has no name for it."""
    known = [name for since, name in _ARCHITECTURES.items() if since <= (major, minor)]
    return known[-1] if known and (major, minor) < _UNKNOWN else f"sm_{major}{minor}"


def throttle_reasons(bits: int) -> set[str]:
    """The reasons in a mask that make kernels slower; idle clocks and settings of the owner are none."""
    return {name for bit, name in _REASONS.items() if bits & bit}


def strangers(running: Sequence[int], own: Collection[int]) -> int:
    """Return how many of the processes ``running`` on a GPU are not ``own``.

    In a container NVML may give the numbers of the host, among which ours are not to be recognised: then as many as
    are ours are taken off.
    """
    known = sum(pid in own for pid in running)
    return len(running) - known if known else max(0, len(running) - len(own))


def own_processes() -> set[int]:
    """This process."""
    return {os.getpid()}


def _opened(address: GpuAddress, nvml: Any) -> tuple[Any, Any]:
    """(NVML, handle of the GPU); None for what is not to be had: no module, no driver, no such GPU, no permission."""
    try:
        nvml = nvml if nvml is not None else importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:
        return None, None
    questions = [("nvmlDeviceGetHandleByUUID", f"{kind}-{address.uuid}") for kind in ("GPU", "MIG") if address.uuid]
    questions += [("nvmlDeviceGetHandleByPciBusId", address.bus)] if address.bus else []
    for function, name in questions:
        try:
            return nvml, getattr(nvml, function)(name)
        except Exception:  # a part of a GPU (MIG) is known by another name; its bus is the whole GPU's
            continue
    return nvml, None
