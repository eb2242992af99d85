"""A `pynvml` that answers from plain values: names, shapes and errors of nvidia-ml-py 13, without its driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml as real

GIB = 2**30


@dataclass(kw_only=True)
class Gpu:
    """One GPU, or a MIG slice in ``slices``. A name in ``refused`` makes that call fail with the error's number."""

    name: str = "NVIDIA A100-SXM4-80GB"
    uuid: str = "GPU-0"
    memory_bytes: int = 80 * GIB
    memory_used_bytes: int = 3 * GIB
    bus_id: str = "00000000:3B:00.0"
    capability: tuple[int, int] = (8, 0)
    pcie: tuple[int, int] = (4, 16)
    max_clock_mhz: int = 1410
    clock_mhz: int = 1380
    reasons: int = 0
    busy_percent: int = 37
    temperature_c: int = 61
    power_mw: int = 312_500
    limit_mw: int = 400_000
    remapped_rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    uncorrected: int = 0
    links: set[str] = field(default_factory=set)  # bus ids of GPUs that NVLink reaches
    remotes: list[str] = field(default_factory=list)  # bus ids at the other ends of its NVLinks: GPUs or switches
    processes: list[int] = field(default_factory=list)  # pids of compute processes
    compute_mode: int = real.NVML_COMPUTEMODE_DEFAULT
    recovery: int = real.NVML_GPU_RECOVERY_ACTION_NONE
    slices: list[Gpu] | None = None
    refused: dict[str, int] = field(default_factory=dict)


def fake_pynvml(
    *gpus: Gpu, driver: str = "580.65.06", refused: dict[str, int] | None = None, names: dict[int, str] | None = None
) -> ModuleType:
    """A replacement for ``pynvml``; ``module.events`` is the list of unread events."""
    module: Any = ModuleType("pynvml")
    for name in dir(real):
        if name.startswith(("NVML_", "nvmlClocks", "nvmlEventType", "NVMLError")):
            setattr(module, name, getattr(real, name))
    refused = refused or {}
    module.events = []
    module.shutdowns = 0
    registered: list[Gpu] = []

    def system(name: str, value: Any) -> None:
        def call(*_: Any) -> Any:
            if name in refused:
                raise real.NVMLError(refused[name])
            return value() if callable(value) else value

        setattr(module, name, call)

    def device(name: str, value: Any) -> None:
        def call(gpu: Gpu, *arguments: Any) -> Any:
            if name in gpu.refused or "*" in gpu.refused:
                raise real.NVMLError(gpu.refused.get(name, gpu.refused.get("*")))
            return value(gpu, *arguments)

        setattr(module, name, call)

    def shutdown() -> None:
        module.shutdowns += 1

    def handle(index: int) -> Gpu:
        if "open" in gpus[index].refused:
            raise real.NVMLError(gpus[index].refused["open"])
        return gpus[index]

    def mig_mode(gpu: Gpu) -> tuple[int, int]:
        enabled = int(gpu.slices is not None)
        return enabled, enabled

    def slice_at(gpu: Gpu, index: int) -> Gpu:
        assert gpu.slices is not None
        if index >= len(gpu.slices):
            raise real.NVMLError(real.NVML_ERROR_NOT_FOUND)
        return gpu.slices[index]

    def wait(_events: object, timeout_ms: int) -> Any:
        assert timeout_ms == 0, "a sample never waits for events"
        if not module.events:
            raise real.NVMLError(real.NVML_ERROR_TIMEOUT)
        gpu, xid = module.events.pop(0)
        return SimpleNamespace(device=gpu, eventType=real.nvmlEventTypeXidCriticalError, eventData=xid)

    def process_name(pid: int) -> str:
        if pid not in (names or {}):
            raise real.NVMLError(real.NVML_ERROR_NOT_FOUND)
        return (names or {})[pid]

    def computing(gpu: Gpu) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in gpu.processes]

    def link_state(gpu: Gpu, link: int) -> int:
        if not gpu.remotes:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)  # the answer of boards without NVLink
        return int(link < len(gpu.remotes))

    def field_values(gpu: Gpu, wanted: list[int]) -> Any:
        values = (real.c_nvmlFieldValue_t * len(wanted))()
        for value, number in zip(values, wanted, strict=True):
            assert number == real.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
            value.fieldId, value.value.uiVal = number, gpu.recovery
        return values

    system("nvmlInit", None)
    system("nvmlShutdown", shutdown)
    system("nvmlSystemGetDriverVersion", driver)
    system("nvmlDeviceGetCount", len(gpus))
    system("nvmlEventSetCreate", object())
    system("nvmlEventSetFree", None)
    module.nvmlDeviceGetHandleByIndex = handle
    module.nvmlEventSetWait_v2 = wait
    module.registered = registered
    device("nvmlDeviceRegisterEvents", lambda gpu, _types, _events: registered.append(gpu))
    device("nvmlDeviceGetMigMode", mig_mode)
    device("nvmlDeviceGetMaxMigDeviceCount", lambda gpu: 7)
    device("nvmlDeviceGetMigDeviceHandleByIndex", slice_at)
    device("nvmlDeviceGetName", lambda gpu: gpu.name)
    device("nvmlDeviceGetUUID", lambda gpu: gpu.uuid)
    device("nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(total=gpu.memory_bytes, used=gpu.memory_used_bytes))
    device("nvmlDeviceGetCudaComputeCapability", lambda gpu: gpu.capability)
    device("nvmlDeviceGetPciInfo", lambda gpu: SimpleNamespace(busId=gpu.bus_id))
    device("nvmlDeviceGetMaxPcieLinkGeneration", lambda gpu: gpu.pcie[0])
    device("nvmlDeviceGetMaxPcieLinkWidth", lambda gpu: gpu.pcie[1])
    device("nvmlDeviceGetMaxClockInfo", lambda gpu, kind: gpu.max_clock_mhz if kind == real.NVML_CLOCK_SM else 0)
    device("nvmlDeviceGetClockInfo", lambda gpu, kind: gpu.clock_mhz if kind == real.NVML_CLOCK_SM else 0)
    device("nvmlDeviceGetEnforcedPowerLimit", lambda gpu: gpu.limit_mw)
    device("nvmlDeviceGetPowerUsage", lambda gpu: gpu.power_mw)
    device("nvmlDeviceGetP2PStatus", lambda gpu, other, _kind: 0 if other.bus_id in gpu.links else 5)
    device("nvmlDeviceGetNvLinkState", link_state)
    device("nvmlDeviceGetNvLinkRemotePciInfo", lambda gpu, link: SimpleNamespace(busId=gpu.remotes[link]))
    device("nvmlDeviceGetComputeRunningProcesses", computing)
    device("nvmlDeviceGetMPSComputeRunningProcesses", lambda gpu: [])
    device("nvmlDeviceGetComputeMode", lambda gpu: gpu.compute_mode)
    device("nvmlDeviceGetFieldValues", field_values)
    module.nvmlSystemGetProcessName = process_name
    device("nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=gpu.busy_percent, memory=1))
    device("nvmlDeviceGetCurrentClocksEventReasons", lambda gpu: gpu.reasons)
    device("nvmlDeviceGetCurrentClocksThrottleReasons", lambda gpu: gpu.reasons)
    device("nvmlDeviceGetTemperatureV", lambda gpu, _sensor: gpu.temperature_c)
    device("nvmlDeviceGetTemperature", lambda gpu, _sensor: gpu.temperature_c)
    device("nvmlDeviceGetRemappedRows", lambda gpu: gpu.remapped_rows)
    device("nvmlDeviceGetTotalEccErrors", lambda gpu, _type, _counter: gpu.uncorrected)
    return module
