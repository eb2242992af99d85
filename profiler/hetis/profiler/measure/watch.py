"""Signs that a device was not used exclusively: NVML's view of a GPU while it is measured, and notes about all signs.

CUDA may number GPUs differently than NVML (``CUDA_DEVICE_ORDER``, fastest first by default) and sees only visible
ones, so a GPU is found by its UUID or its bus address, never by its number.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetis.formats.discovery.nvml import Nvml
from hetis.profiler.measure.points import Measured

# Clock-event reasons that make kernels slower than the GPU can be: bits of nvmlDeviceGetCurrentClocksEventReasons.
_REASONS = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}
# Violation counters: nvmlPerfPolicyType_t of nvmlDeviceGetViolationStatus. Sync boost and low utilisation are left out:
# they lower the clocks of a GPU that waits for work, not of one that does it.
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
    (12, 0): "RTX Blackwell",
}
_UNKNOWN = (13, 0)
_LOOK_INTERVAL_S = 0.02  # a sample takes the host from a few microseconds to a millisecond
BUSY_SHARE = 0.1  # share of the cores that others use
_DRIFT = 0.1
_JITTER = 0.25
_JITTERY_SHARE = 0.2  # share of the points
_UNSURE_SPREAD = 0.1
_THROTTLED_SHARE = 0.01  # share of the samples, or of the time


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAddress:
    """The address of a GPU in terms that NVML knows too. Empty fields are unknown to CUDA."""

    uuid: str = ""  # hexadecimal digits and dashes, without a leading ``GPU-`` or ``MIG-``
    bus: str = ""  # ``00000000:3B:00.0``


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNews:
    """Observations of a GPU between `GpuWatch.begin` and `GpuWatch.news`."""

    watched: bool = False  # whether NVML answered at all; otherwise only the variance of times is informative
    looks: int = 0  # number of clock samples, each taken with work queued
    # reasons that lowered the clocks, with the number of samples
    reasons: Mapping[str, int] = field(default_factory=dict)
    # seconds in the GPU's own counters, by what limited its clocks
    held_s: Mapping[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0  # seconds between the two readings of those counters, on the host's clock
    other_processes: int = 0  # maximum number of other processes with a context on the GPU


class GpuWatch:
    """Samples one GPU from time to time."""

    def __init__(self, address: GpuAddress | None, *, clock: Callable[[], float], nvml: Any = None) -> None:
        """Initialise. Without an ``address`` there is no GPU, and nothing is ever seen. ``clock`` returns monotonic
        seconds, and ``nvml`` is a module with the functions of ``pynvml``, or None for that one if installed.
        """
        self._clock = clock
        self._nvml, self._device = _opened(address, nvml)
        self._began_s = clock()
        self._counters: Mapping[str, float] = {}
        self._looks = 0
        self._reasons: Counter[str] = Counter()
        self._others = 0
        self._next_s = 0.0

    def begin(self) -> None:
        """Discard all observations and read the violation counters for the first time."""
        self._looks, self._others = 0, 0
        self._reasons.clear()
        self._counters, self._began_s = self._read_counters(), self._clock()

    def look(self) -> None:
        """Sample the clocks. Call this while work is queued, because an idle GPU lowers them harmlessly."""
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
        """Count the processes with a compute context that are not this one or among ``own``, its helpers."""
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if running is not None:
            pids = [int(process.pid) for process in running]
            self._others = max(self._others, strangers(pids, {os.getpid(), *own}))

    def news(self) -> GpuNews:
        """Return all observations since `begin`."""
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
        """Return the driver's version, or an empty string if NVML does not report it."""
        version = "" if self._nvml is None else self._nvml.ask("nvmlSystemGetDriverVersion", otherwise="")
        return version.decode() if isinstance(version, bytes) else str(version)  # older libraries return bytes

    def _read_counters(self) -> Mapping[str, float]:
        """Return the seconds of violations since the driver started, by policy, of those that the GPU counts."""
        found = {name: self._ask("nvmlDeviceGetViolationStatus", policy) for policy, name in _POLICIES.items()}
        return {name: int(status.violationTime) * 1e-9 for name, status in found.items() if status is not None}

    def _ask(self, function: str, *arguments: object) -> Any:
        """Return the answer, or None: not every GPU, driver or permission supports every query."""
        return None if self._device is None else self._nvml.ask(function, self._device, *arguments)


def architecture_of(major: int, minor: int) -> str:
    """Return the catalogue's name for a compute capability, or ``sm_65``, for example, if it has none."""
    known = [name for since, name in _ARCHITECTURES.items() if since <= (major, minor)]
    return known[-1] if known and (major, minor) < _UNKNOWN else f"sm_{major}{minor}"


def throttle_reasons(bits: int) -> set[str]:
    """Return the reasons in a mask that make kernels slower, which excludes idle clocks and the owner's settings."""
    return {name for bit, name in _REASONS.items() if bits & bit}


def strangers(running: Sequence[int], own: Collection[int]) -> int:
    """Return how many of the processes ``running`` on a GPU are not ``own``.

    In a container NVML may report the host's process ids, among which ours cannot be recognised. Then the number of our
    processes is subtracted.
    """
    known = sum(pid in own for pid in running)
    return len(running) - known if known else max(0, len(running) - len(own))


def _opened(address: GpuAddress | None, library: Any) -> tuple[Any, Any]:
    """Return (NVML, handle of the GPU), with None for what is unavailable: no module, driver, GPU or permission."""
    if address is None:
        return None, None
    try:
        library = library or importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception:
        return None, None
    nvml = Nvml(library)
    questions = [("nvmlDeviceGetHandleByUUID", f"{kind}-{address.uuid}") for kind in ("GPU", "MIG") if address.uuid]
    questions += [("nvmlDeviceGetHandleByPciBusId", address.bus)] if address.bus else []
    found = (nvml.ask(function, name) for function, name in questions)  # the bus of a MIG slice is the whole GPU's
    return nvml, next((device for device in found if device is not None), None)


def disturbance_notes(
    measured: Sequence[Measured], *, reference_s: tuple[float, float] | None, others_share: float, gpu: GpuNews | None
) -> list[str]:
    """Return a sentence per sign.

    Args:
        measured: every point.
        reference_s: seconds of the same point before and after everything else. None: interrupted in between.
        others_share: share of the host's cores that other processes took meanwhile; 0 to 1.
        gpu: what was seen of the GPU. None: on a processor.
    """
    notes = _gpu_notes(gpu) if gpu is not None else []
    if others_share > BUSY_SHARE:
        notes.append(f"other processes took {others_share:.0%} of the host's cores while measuring")
    if reference_s is not None:
        before, after = reference_s
        if abs(after / before - 1.0) > _DRIFT:
            notes.append(
                f"the same point took {before * 1e3:.3g} ms at the start and {after * 1e3:.3g} ms at the end "
                f"({after / before - 1.0:+.0%}): clocks or neighbours changed"
            )
    jittery = sum(found.sample.jitter > _JITTER for found in measured)
    if measured and jittery > _JITTERY_SHARE * len(measured):
        notes.append(
            f"{jittery} of {len(measured)} points jitter by more than {_JITTER:.0%} from call to call, as on a shared "
            "device"
        )
    unsure = sum(found.sample.spread > _UNSURE_SPREAD for found in measured)
    if unsure:
        notes.append(f"{unsure} of {len(measured)} medians are only known to {_UNSURE_SPREAD:.0%}")
    return notes


def _gpu_notes(gpu: GpuNews) -> list[str]:
    if not gpu.watched:
        return ["NVML is not available: a throttled or shared GPU would only show as jitter and drift"]
    notes = []
    seen = [
        f"{name} in {count} of {gpu.looks} samples"
        for name, count in gpu.reasons.items()
        if count > _THROTTLED_SHARE * gpu.looks
    ]
    seen += [
        f"limited by {name} for {held_s:.3g} of {gpu.elapsed_s:.3g} s"
        for name, held_s in gpu.held_s.items()
        if held_s > _THROTTLED_SHARE * gpu.elapsed_s
    ]
    if seen:
        notes.append(f"the GPU was throttled while measuring ({', '.join(seen)}): its times are too long")
    if gpu.other_processes:
        count = "1 other process" if gpu.other_processes == 1 else f"{gpu.other_processes} other processes"
        notes.append(f"{count} had the GPU open while measuring: it may have been shared")
    return notes
