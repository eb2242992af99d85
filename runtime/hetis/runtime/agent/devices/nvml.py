"""NVIDIA's management library: the GPUs and MIG slices of a node and their condition.

Any single value may be missing, because old boards, virtual GPUs and containers refuse one call or another. A refused
value counts as unknown and a GPU that is gone as unhealthy. Only a missing library or driver is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from hetis.formats.catalogue import GpuEntry, UnknownNameError, find_gpu
from hetis.runtime.agent.devices.node import MAX_DEVICES, DevicesUnavailableError, node_inventory
from hetis.runtime.agent.devices.nvml_health import GpuHealth
from hetis.v1 import inventory_pb2, report_pb2

T = TypeVar("T")
U = TypeVar("U")

_log = logging.getLogger(__name__)

_PCIE_1_LANE_BYTES_PER_S = 0.25e9  # nominal, one direction; every generation doubles it
_MHZ = 1e6
LOST = "the driver has lost the GPU: reset it or reboot the node"
_Reason = report_pb2.ThrottleReason
# Bits of nvmlDeviceGetCurrentClocksEventReasons, by the suffix of their names. The bits mapped to `ThrottleReason` are
# in every version of the library.
_THROTTLE_REASONS: dict[str, _Reason.ValueType] = {
    "GpuIdle": report_pb2.THROTTLE_REASON_IDLE,
    "SwPowerCap": report_pb2.THROTTLE_REASON_POWER,
    "SwThermalSlowdown": report_pb2.THROTTLE_REASON_THERMAL,
    "HwThermalSlowdown": report_pb2.THROTTLE_REASON_THERMAL,
    "ApplicationsClocksSetting": report_pb2.THROTTLE_REASON_SETTING,
    "UserDefinedClocks": report_pb2.THROTTLE_REASON_SETTING,
    "SyncBoost": report_pb2.THROTTLE_REASON_SETTING,
    "HwSlowdown": report_pb2.THROTTLE_REASON_HARDWARE,
    "HwPowerBrakeSlowdown": report_pb2.THROTTLE_REASON_HARDWARE,
}
# Drivers report less than the nominal memory: ECC on GDDR takes a sixteenth, firmware some hundred MiB. Boards that
# share a name differ by a quarter or more (A100 40 and 80 GB, V100 16 and 32 GB).
LEAST_MEMORY_SHARE = 0.88
MOST_MEMORY_SHARE = 1.06
# Words that drivers add but that distinguish no two boards: `RTX PRO 6000 Blackwell Server Edition`, `B300 SXM6 AC`.
_DECORATION = re.compile(r"\b(blackwell|edition|superchip|ac|dgx display)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A device as NVML knows it. ``whole`` is its GPU: the same handle unless the device is a MIG slice."""

    handle: Any
    whole: Any
    is_slice: bool


class NvmlDevices:
    """The GPUs of this node. A GPU in MIG mode is represented by its slices, each a device of its own.

    The devices are enumerated once: after GPUs were added or sliced anew, the agent has to be restarted.
    """

    def __init__(
        self, library: ModuleType, found: list[_Found], *, gpu_types: Mapping[str, str], host_name: str
    ) -> None:
        self._nvml = library
        self._found = found
        self._gpu_types = gpu_types
        self._host_name = host_name
        self._devices: dict[int, inventory_pb2.GpuDevice] = {}  # as they were when last readable
        self._health = GpuHealth(library, [device.whole for device in found])

    @classmethod
    def open(cls, *, gpu_types: Mapping[str, str], host_name: str = "") -> NvmlDevices:
        """Start the library and enumerate the devices.

        Raises:
            DevicesUnavailableError: there is no library or no driver, or neither may be used.
        """
        try:
            import pynvml
        except ModuleNotFoundError:
            raise DevicesUnavailableError("NVML: nvidia-ml-py is not installed: pip install 'hetis[agent]'") from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DevicesUnavailableError(f"NVML cannot be used: {error}") from None
        return cls(pynvml, _find(pynvml), gpu_types=gpu_types, host_name=host_name)

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(
            inventory_pb2.DEVICE_SOURCE_NVML,
            [self._device(index, found) for index, found in enumerate(self._found)],
            host_name=self._host_name,
            driver_version=self._known(self._nvml.nvmlSystemGetDriverVersion, ""),
        )

    def sample(self) -> list[report_pb2.DeviceReport]:
        self._health.read_events()
        return [self._report(index, found) for index, found in enumerate(self._found)]

    def close(self) -> None:
        self._health.close()
        self._known(self._nvml.nvmlShutdown, None)

    # --- inventory

    def _device(self, index: int, found: _Found) -> inventory_pb2.GpuDevice:
        """Return the description of a device. A lost GPU keeps its description; its reports say that it is lost."""
        if index not in self._devices or not self._is_lost(found):
            self._devices[index] = self._described(index, found)
        return self._devices[index]

    def _described(self, index: int, found: _Found) -> inventory_pb2.GpuDevice:
        nvml = self._nvml
        product_name = self._known(lambda: nvml.nvmlDeviceGetName(found.handle), "")
        memory_bytes = self._known(lambda: int(nvml.nvmlDeviceGetMemoryInfo(found.handle).total), 0)
        entry = None if found.is_slice else gpu_entry(product_name, memory_bytes)
        major, minor = self._known(lambda: nvml.nvmlDeviceGetCudaComputeCapability(found.whole), (0, 0))
        return inventory_pb2.GpuDevice(
            index=index,
            gpu_type=self._gpu_types.get(product_name) or (entry.gpu.name if entry else ""),
            product_name=product_name,
            uuid=self._known(lambda: nvml.nvmlDeviceGetUUID(found.handle), ""),
            # Drivers subtract what ECC and firmware take; the cluster's document counts the nominal size.
            memory_bytes=entry.gpu.memory_bytes if entry else memory_bytes,
            compute_capability=major * 10 + minor,
            pci_bus_id=self._known(lambda: nvml.nvmlDeviceGetPciInfo(found.whole).busId, ""),
            pcie_bytes_per_s=self._pcie_bytes_per_s(found),
            linked_devices=[] if found.is_slice else self._linked(index),
            max_clock_hz=_MHZ * self._known(lambda: nvml.nvmlDeviceGetMaxClockInfo(found.whole, nvml.NVML_CLOCK_SM), 0),
            power_limit_w=self._known(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(found.whole), 0) / 1e3,
            mig_slice=found.is_slice,
        )

    def _pcie_bytes_per_s(self, found: _Found) -> float:
        generation = self._known(lambda: self._nvml.nvmlDeviceGetMaxPcieLinkGeneration(found.whole), 0)
        lanes = self._known(lambda: self._nvml.nvmlDeviceGetMaxPcieLinkWidth(found.whole), 0)
        return _PCIE_1_LANE_BYTES_PER_S * 2 ** (generation - 1) * lanes if generation else 0.0

    def _linked(self, index: int) -> list[int]:
        """Return the devices that NVLink reaches, directly or through a switch. Slices have none."""
        nvml, handle = self._nvml, self._found[index].handle

        def reaches(other: Any) -> bool:
            status = nvml.nvmlDeviceGetP2PStatus(handle, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
            return bool(status == nvml.NVML_P2P_STATUS_OK)

        return [
            other
            for other, found in enumerate(self._found)
            if other != index and not found.is_slice and self._known(partial(reaches, found.handle), False)
        ]

    # --- sample

    def _report(self, index: int, found: _Found) -> report_pb2.DeviceReport:
        nvml = self._nvml
        report = report_pb2.DeviceReport(index=index)
        try:
            # Read first and without `_known`: if the GPU is lost, nothing else is worth asking.
            report.memory_used_bytes = int(nvml.nvmlDeviceGetMemoryInfo(found.handle).used)
        except nvml.NVMLError as error:
            if _is_lost(nvml, error):
                report.unhealthy = LOST
                return report
        busy_percent = self._known(lambda: nvml.nvmlDeviceGetUtilizationRates(found.handle).gpu, 0)
        report.busy_ratio = min(max(busy_percent / 100, 0.0), 1.0)
        report.clock_hz = _MHZ * self._known(lambda: nvml.nvmlDeviceGetClockInfo(found.whole, nvml.NVML_CLOCK_SM), 0)
        report.throttle_reasons.extend(self._throttle_reasons(found))
        temperature_c = self._temperature_c(found)
        if temperature_c is not None:
            report.temperature_c = temperature_c
        report.power_w = self._known(lambda: nvml.nvmlDeviceGetPowerUsage(found.whole), 0) / 1e3
        report.unhealthy = self._health.of(index)
        return report

    def _throttle_reasons(self, found: _Found) -> list[_Reason.ValueType]:
        nvml = self._nvml

        mask = self._known(lambda: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(found.whole)), None)
        if mask is None:  # the function's name before driver 535
            mask = self._known(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(found.whole)), 0)
        return sorted(
            {
                reason
                for name, reason in _THROTTLE_REASONS.items()
                if mask
                & getattr(nvml, f"nvmlClocksEventReason{name}", getattr(nvml, f"nvmlClocksThrottleReason{name}", 0))
            }
        )

    def _temperature_c(self, found: _Found) -> float | None:
        for name in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # the second is for drivers before 570
            read = partial(self._temperature_by, name, found.whole)
            value: float | None = self._known(read, None)
            if value is not None:
                return value
        return None

    def _temperature_by(self, name: str, handle: Any) -> float | None:
        return float(getattr(self._nvml, name)(handle, self._nvml.NVML_TEMPERATURE_GPU))

    def _is_lost(self, found: _Found) -> bool:
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(found.handle)
        except self._nvml.NVMLError as error:
            return _is_lost(self._nvml, error)
        return False

    def _known(self, read: Callable[[], T], otherwise: U) -> T | U:
        """Return the result of a call, or ``otherwise`` if the call is unsupported or not permitted."""
        try:
            return read()
        except (self._nvml.NVMLError, AttributeError, TypeError, ValueError) as error:
            _log.debug("NVML does not say: %s", error)
            return otherwise


def _find(nvml: ModuleType) -> list[_Found]:
    found: list[_Found] = []
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        raise DevicesUnavailableError(f"NVML cannot count the GPUs: {error}") from None
    for index in range(count):
        try:
            whole = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:  # lost in the meantime, or not ours to use
            _log.warning("GPU %d cannot be opened and is left out: %s", index, error)
            continue
        slices = _slices(nvml, whole)
        if slices is None:
            found.append(_Found(handle=whole, whole=whole, is_slice=False))
        elif not slices:
            _log.warning("GPU %d is in MIG mode without a slice and is left out", index)
        else:
            found += [_Found(handle=handle, whole=whole, is_slice=True) for handle in slices]
    if len(found) > MAX_DEVICES:
        _log.warning("the node has %d devices, the first %d are used", len(found), MAX_DEVICES)
    return found[:MAX_DEVICES]


def _slices(nvml: ModuleType, whole: Any) -> list[Any] | None:
    """Return the MIG slices of a GPU, or None if it is not in MIG mode."""
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(whole)
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(whole)
    except nvml.NVMLError:
        return None
    slices = []
    for index in range(most):
        try:
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, index))
        except nvml.NVMLError:  # no slice in this place
            continue
    return slices


def _is_lost(nvml: ModuleType, error: Exception) -> bool:
    return getattr(error, "value", None) in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)


def gpu_entry(product_name: str, memory_bytes: int) -> GpuEntry | None:
    """Return the catalogue's entry for a product, or None if no entry matches both name and memory.

    Args:
        product_name: as the driver reports it, such as ``NVIDIA H100 80GB HBM3``.
        memory_bytes: as the driver reports it. 0: unknown, so the name alone decides.
    """
    for name in (product_name, _DECORATION.sub(" ", product_name)):
        try:
            found = [find_gpu(name)]
        except UnknownNameError as error:
            found = [find_gpu(candidate) for candidate in error.candidates] if _is_ambiguous(error) else []
        fitting = [entry for entry in found if _fits(entry, memory_bytes)]
        # `NVIDIA H200` is the SXM board: for the others the driver's name includes PCIe or NVL.
        of_the_name = fitting if len(fitting) == 1 else [entry for entry in fitting if "-SXM" in entry.gpu.name]
        if len(of_the_name) == 1:
            return of_the_name[0]
    return None


def _is_ambiguous(error: UnknownNameError) -> bool:
    return len(error.candidates) > 1  # a single candidate is a guess, not a match


def _fits(entry: GpuEntry, memory_bytes: int) -> bool:
    share = memory_bytes / entry.gpu.memory_bytes
    return not memory_bytes or LEAST_MEMORY_SHARE <= share <= MOST_MEMORY_SHARE
