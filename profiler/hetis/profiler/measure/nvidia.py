"""What NVML says of a GPU while it is measured: throttled clocks and other processes. Silent where NVML is not."""

from __future__ import annotations

import os
from typing import Any

# Clock-event reasons that make kernels slower than the GPU can be: bits of nvmlDeviceGetCurrentClocksEventReasons.
_REASONS = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}


class GpuWatch:
    """Collects throttle reasons from look to look."""

    def __init__(self, index: int) -> None:
        self._seen: set[str] = set()
        self._device: Any = None
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(_physical(index))
            self._nvml = pynvml
        except Exception:  # no module, no driver, no permission: then it is only variance that tells
            self._device = None

    def look(self) -> None:
        """Call now and then while kernels run."""
        if self._device is None:
            return
        try:
            bits = int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device))
        except Exception:
            return
        self._seen |= throttle_reasons(bits)

    @property
    def reasons(self) -> list[str]:
        return sorted(self._seen)

    def other_processes(self) -> int:
        """Processes but this one with a compute context."""
        if self._device is None:
            return 0
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device)
        except Exception:
            return 0
        return sum(process.pid != os.getpid() for process in running)


def throttle_reasons(bits: int) -> set[str]:
    """The reasons in a mask that make kernels slower; idle clocks and settings of the owner are none."""
    return {name for bit, name in _REASONS.items() if bits & bit}


def _physical(index: int) -> int:
    """NVML counts all GPUs, CUDA those that are visible."""
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return int(visible[index]) if index < len(visible) and visible[index].strip().isdecimal() else index
