"""Who measured, with what, on which host; and what kept watch over the device meanwhile. Needs torch."""

from __future__ import annotations

import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from hetis.formats.catalogue import UnknownNameError, find_gpu
from hetis.formats.measurements import MeasuredBy
from hetis.profiler.measure import host
from hetis.profiler.measure.device import CudaDevice, Device
from hetis.profiler.measure.nvidia import GpuWatch

if TYPE_CHECKING:
    from hetis.profiler.measure.session import RunRequest


class HostWatch:
    """Processor time that others took since it was made."""

    def __init__(self) -> None:
        self._busy, self._total = host.cpu_times()
        self._own = host.own_cpu_s()

    def share(self) -> float:
        """Of all cores; a little is always the system's own. 0 where the system does not say."""
        busy, total = host.cpu_times()
        elapsed = total - self._total
        if elapsed <= 0:
            return 0.0
        own = host.own_cpu_s() - self._own
        return max(0.0, (busy - self._busy - own) / elapsed)


class Watch:
    """What looks at the device and the host while points are measured."""

    def __init__(self, gpu: GpuWatch | None) -> None:
        self._gpu = gpu

    def start(self) -> HostWatch:
        return HostWatch()

    def look(self) -> None:
        if self._gpu is not None:
            self._gpu.look()

    @property
    def reasons(self) -> list[str]:
        return self._gpu.reasons if self._gpu is not None else []

    def other_processes(self) -> int:
        return self._gpu.other_processes() if self._gpu is not None else 0


def watch_of(device: Device) -> Watch:
    """NVML for a GPU; the host's own accounts always."""
    return Watch(GpuWatch(device.index) if isinstance(device, CudaDevice) else None)


def gpu_name(wanted: str, device: Device) -> str:
    """The GPU type of the result: as asked for, or the catalogue's name of what the driver calls the device."""
    for name in (wanted, device.name):
        if name:
            try:
                return find_gpu(name).gpu.name
            except UnknownNameError:
                if name == wanted:
                    return wanted
    return device.name


def settings_of(request: RunRequest, gpu: str) -> dict[str, str]:
    """What must be equal for an interrupted run to go on."""
    return {
        "device": request.device,
        "gpu": gpu,
        "model": request.model.name,
        "quick": str(request.quick),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def measured_by(request: RunRequest, device: Device) -> MeasuredBy:
    """The provenance of the result."""
    return MeasuredBy(
        tool=f"hetis-profile {_version('hetis')}",
        engine="torch",
        engine_version=str(torch.__version__),
        source=f"run --device {request.device} --model {request.model.name}" + (" --quick" if request.quick else ""),
        host=f"{host.cpu_name()}, {host.num_cores()} cores, {torch.get_num_threads()} threads, "
        f"{platform.system()} {platform.machine()}" + (f", driver CUDA {torch.version.cuda}" if device.on_cuda else ""),
        date=datetime.fromtimestamp(time.time(), UTC).date().isoformat(),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
