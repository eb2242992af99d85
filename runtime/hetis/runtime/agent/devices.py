"""The GPUs of a node and their condition, from NVML, simulated, or none. There is one `Devices` per agent.

Any single value may be missing from NVML, NVIDIA's management library, because old boards, virtual GPUs and containers
do not support every call. A missing value counts as unknown and a GPU that is gone as unhealthy. Only a missing library
or driver is an error.

HetisError (hetis.solver.errors)
+-- DevicesUnavailableError   the requested source cannot be read on this machine
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from hetis.formats.catalogue import UnknownNameError, find_gpu
from hetis.formats.discovery.fleet import UnclearBoardError, board_of
from hetis.formats.discovery.found import FoundGpus
from hetis.formats.discovery.nvml import Nvml
from hetis.solver.cluster import GpuType
from hetis.solver.errors import HetisError
from hetis.v1 import inventory_pb2, report_pb2

SOURCES = "`auto`, `nvml`, `none`, or `simulated:TYPE:COUNT[,TYPE:COUNT...]`"

# Events that an application causes or from which a GPU recovers on its own: engine exceptions and kernel faults (13,
# 31, 43, 45, 68, 109), recorded remappings (63), a high rate of corrected errors (92), and contained memory errors
# (94), after which only the affected process has to restart.
HARMLESS_XIDS = frozenset({13, 31, 43, 45, 63, 68, 92, 94, 109})
_MAX_EVENTS = 256  # events read per call: an event storm must not delay a sample
_PCIE_1_LANE_BYTES_PER_S = 0.25e9  # nominal, in one direction; every generation doubles it
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
MAX_DEVICES = 64  # limit per node, from the contract
MAX_CLOCK_HZ = 1.5e9  # stands in for clocks, which the catalogue lacks; only the distance of a clock from it matters
COOL_C = 45.0
_PART = re.compile(r"(?P<type>[^:,]+):(?P<count>\d+)")
_log = logging.getLogger(__name__)


class DevicesUnavailableError(HetisError):
    """The requested source of devices cannot be read on this machine."""


def node_inventory(
    source: inventory_pb2.DeviceSource.ValueType,
    devices: Iterable[inventory_pb2.GpuDevice],
    *,
    host_name: str = "",
    driver_version: str = "",
) -> inventory_pb2.NodeInventory:
    """Return an inventory with its digest and with what the operating system reports about the node."""
    inventory = inventory_pb2.NodeInventory(
        devices=devices,
        host_name=host_name or socket.gethostname(),
        source=source,
        driver_version=driver_version,
        num_cpus=os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    inventory.digest = digest_of(inventory)
    return inventory


def digest_of(inventory: inventory_pb2.NodeInventory) -> str:
    """Return ``sha256:`` and the SHA-256 of the inventory's deterministic binary form without its digest."""
    bare = deepcopy(inventory)
    bare.digest = ""
    return f"sha256:{hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevices:
    """Idle, healthy devices of the given types, all linked if their type has NVLink; or a node without devices."""

    types: tuple[GpuType, ...] = ()  # one per device, in the order of their index
    host_name: str = ""  # host name in the inventory. Empty: the system's own.

    @classmethod
    def parse(cls, text: str, *, host_name: str = "") -> SimulatedDevices:
        """Return the devices that a string such as ``A100-SXM-80GB:4,L4:2`` describes. Raises DevicesUnavailableError
        if the string is malformed, names an unknown type, or has more than `MAX_DEVICES`.
        """
        types: list[GpuType] = []
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                form = "TYPE:COUNT[,TYPE:COUNT...], such as A100-SXM-80GB:4,L4:2"
                raise DevicesUnavailableError(f"simulated devices are {text!r}, must be {form}")
            try:
                gpu = find_gpu(match["type"]).gpu
            except UnknownNameError as error:
                raise DevicesUnavailableError(f"simulated devices: {error}") from None
            if len(types) + int(match["count"]) > MAX_DEVICES:
                raise DevicesUnavailableError(
                    f"simulated devices: {text!r} has too many, a node has at most {MAX_DEVICES}"
                )
            types += [gpu] * int(match["count"])
        return cls(types=tuple(types), host_name=host_name)

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(
            inventory_pb2.DEVICE_SOURCE_SIMULATED if self.types else inventory_pb2.DEVICE_SOURCE_NONE,
            [self._device(index, gpu) for index, gpu in enumerate(self.types)],
            host_name=self.host_name,
        )

    def sample(self) -> list[report_pb2.DeviceReport]:
        return [
            report_pb2.DeviceReport(index=index, clock_hz=MAX_CLOCK_HZ, temperature_c=COOL_C)
            for index in range(len(self.types))
        ]

    def close(self) -> None:
        pass

    def _device(self, index: int, gpu: GpuType) -> inventory_pb2.GpuDevice:
        linked = gpu.nvlink_bytes_per_s is not None
        return inventory_pb2.GpuDevice(
            index=index,
            gpu_type=gpu.name,
            product_name=f"simulated {gpu.name}",
            uuid=f"SIM-{self.host_name}-{index}",
            memory_bytes=gpu.memory_bytes,
            pcie_bytes_per_s=gpu.pcie_bytes_per_s,
            linked_devices=[
                other for other, peer in enumerate(self.types) if linked and other != index and peer == gpu
            ],
            max_clock_hz=MAX_CLOCK_HZ,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A device as NVML represents it. ``whole`` is its GPU: the same handle unless the device is a MIG slice.

    ``index`` is the driver's of a whole GPU, by which engines are started. Slices have indices after those of all GPUs.
    """

    index: int
    handle: Any
    whole: Any
    is_slice: bool


class NvmlDevices:
    """The GPUs of this node. A GPU in MIG mode is represented by its slices, each a device of its own.

    The devices are enumerated once: after GPUs were added or sliced anew, the agent has to be restarted. Critical
    events since then are kept.
    """

    def __init__(self, library: ModuleType, found: list[_Found], *, host_name: str) -> None:
        self._nvml, self._found, self._host_name = library, found, host_name
        self._ask, self._address = Nvml(library).ask, Nvml(library).address
        self._devices: dict[int, inventory_pb2.GpuDevice] = {}  # last readable description of each device, by index
        self._xids: dict[str, int] = {}  # first harmful event of each GPU, by PCI address
        self._events = self._register_events()

    @classmethod
    def open(cls, *, host_name: str = "") -> NvmlDevices:
        """Start the library and find the devices. Raises DevicesUnavailableError if NVML cannot be used here."""
        try:
            import pynvml
        except ModuleNotFoundError:
            raise DevicesUnavailableError("NVML: nvidia-ml-py is not installed: pip install 'hetis[agent]'") from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DevicesUnavailableError(f"NVML cannot be used: {error}") from None
        return cls(pynvml, _find(pynvml), host_name=host_name)

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(
            inventory_pb2.DEVICE_SOURCE_NVML,
            [self._device(found) for found in self._found],
            host_name=self._host_name,
            driver_version=self._ask("nvmlSystemGetDriverVersion", otherwise=""),
        )

    def sample(self) -> list[report_pb2.DeviceReport]:
        self._read_events()
        return [self._report(found) for found in self._found]

    def close(self) -> None:
        if self._events is not None:
            self._ask("nvmlEventSetFree", self._events)
            self._events = None
        self._ask("nvmlShutdown")

    # --- inventory

    def _device(self, found: _Found) -> inventory_pb2.GpuDevice:
        """Return the description of a device. A lost GPU keeps its description; its reports state that it is lost."""
        if found.index not in self._devices or not self._is_lost(found):
            self._devices[found.index] = self._described(found)
        return self._devices[found.index]

    def _described(self, found: _Found) -> inventory_pb2.GpuDevice:
        nvml, ask = self._nvml, self._ask
        product_name = ask("nvmlDeviceGetName", found.handle, otherwise="")
        memory = ask("nvmlDeviceGetMemoryInfo", found.handle)
        memory_bytes = int(memory.total) if memory is not None else 0
        known = None if found.is_slice else gpu_of(product_name, memory_bytes)
        major, minor = ask("nvmlDeviceGetCudaComputeCapability", found.whole, otherwise=(0, 0))
        return inventory_pb2.GpuDevice(
            index=found.index,
            gpu_type=known.name if known else "",
            product_name=product_name,
            uuid=ask("nvmlDeviceGetUUID", found.handle, otherwise=""),
            # Drivers subtract what ECC and firmware take; the cluster's document counts the nominal size.
            memory_bytes=known.memory_bytes if known else memory_bytes,
            compute_capability=major * 10 + minor,
            pci_bus_id=self._address(found.whole),
            pcie_bytes_per_s=self._pcie_bytes_per_s(found),
            linked_devices=[] if found.is_slice else self._linked(found),
            max_clock_hz=_MHZ * ask("nvmlDeviceGetMaxClockInfo", found.whole, nvml.NVML_CLOCK_SM, otherwise=0),
            power_limit_w=ask("nvmlDeviceGetEnforcedPowerLimit", found.whole, otherwise=0) / 1e3,
            mig_slice=found.is_slice,
        )

    def _pcie_bytes_per_s(self, found: _Found) -> float:
        generation = int(self._ask("nvmlDeviceGetMaxPcieLinkGeneration", found.whole, otherwise=0))
        lanes = int(self._ask("nvmlDeviceGetMaxPcieLinkWidth", found.whole, otherwise=0))
        return _PCIE_1_LANE_BYTES_PER_S * 2 ** (generation - 1) * lanes if generation else 0.0

    def _linked(self, found: _Found) -> list[int]:
        """Return the devices that NVLink reaches, directly or through a switch. Slices have none."""

        def reaches(other: _Found) -> bool:
            ends = found.handle, other.handle
            status = self._ask("nvmlDeviceGetP2PStatus", *ends, self._nvml.NVML_P2P_CAPS_INDEX_NVLINK)
            return bool(status == self._nvml.NVML_P2P_STATUS_OK)

        others = (other for other in self._found if other is not found and not other.is_slice)
        return [other.index for other in others if reaches(other)]

    # --- sample

    def _report(self, found: _Found) -> report_pb2.DeviceReport:
        nvml, ask = self._nvml, self._ask
        report = report_pb2.DeviceReport(index=found.index)
        try:
            # Read first and without `_ask`: if the GPU is lost, nothing else is worth reading.
            report.memory_used_bytes = int(nvml.nvmlDeviceGetMemoryInfo(found.handle).used)
        except nvml.NVMLError as error:
            if _is_lost(nvml, error):
                report.unhealthy = LOST
                return report
        busy = ask("nvmlDeviceGetUtilizationRates", found.handle)
        report.busy_ratio = min(max(busy.gpu / 100, 0.0), 1.0) if busy is not None else 0.0
        report.clock_hz = _MHZ * ask("nvmlDeviceGetClockInfo", found.whole, nvml.NVML_CLOCK_SM, otherwise=0)
        report.throttle_reasons.extend(self._throttle_reasons(found))
        for name in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # the second is for drivers before 570
            if (value := ask(name, found.whole, nvml.NVML_TEMPERATURE_GPU)) is not None:
                report.temperature_c = float(value)
                break
        report.power_w = ask("nvmlDeviceGetPowerUsage", found.whole, otherwise=0) / 1e3
        report.unhealthy = self._why_unhealthy(found.whole)
        return report

    def _throttle_reasons(self, found: _Found) -> list[_Reason.ValueType]:
        nvml = self._nvml
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons", found.whole)
        if mask is None:  # the function's name before driver 535
            mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", found.whole, otherwise=0)
        bits = {
            name: getattr(nvml, f"nvmlClocksEventReason{name}", getattr(nvml, f"nvmlClocksThrottleReason{name}", 0))
            for name in _THROTTLE_REASONS
        }
        return sorted({_THROTTLE_REASONS[name] for name, bit in bits.items() if int(mask) & bit})

    # --- health: critical events (XID), failed row remappings, uncorrected memory errors

    def _why_unhealthy(self, handle: Any) -> str:
        """Return why a GPU cannot be used, or an empty string if no reason is known."""
        xid = self._xids.get(self._address(handle))
        if xid is not None:
            return f"critical event XID {xid}: reset the GPU, then restart the agent"
        # Corrected, uncorrected, pending (which waits for the next reset and is harmless until then) and failed rows.
        remapped = self._ask("nvmlDeviceGetRemappedRows", handle)
        if remapped is not None:  # otherwise the GPU does not remap rows
            return "a faulty row of its memory could not be remapped: replace the GPU" if remapped[3] else ""
        kinds = self._nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self._nvml.NVML_VOLATILE_ECC
        errors = int(self._ask("nvmlDeviceGetTotalEccErrors", handle, *kinds, otherwise=0))
        return f"{errors} uncorrected memory errors since the driver was loaded: reset the GPU" if errors else ""

    def _register_events(self) -> Any | None:
        events = self._ask("nvmlEventSetCreate")
        if events is not None:
            kind = self._nvml.nvmlEventTypeXidCriticalError
            for handle in {self._address(found.whole): found.whole for found in self._found}.values():
                self._ask("nvmlDeviceRegisterEvents", handle, kind, events)
        return events

    def _read_events(self) -> None:
        """Read the events since the last call, without waiting."""
        nvml = self._nvml
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError as error:  # usually: no event is waiting
                if getattr(error, "value", None) != nvml.NVML_ERROR_TIMEOUT:
                    _log.debug("NVML events: %s", error)
                return
            if event.eventType == nvml.nvmlEventTypeXidCriticalError and event.eventData not in HARMLESS_XIDS:
                self._xids.setdefault(self._address(event.device), int(event.eventData))

    # --- the library

    def _is_lost(self, found: _Found) -> bool:
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(found.handle)
        except self._nvml.NVMLError as error:
            return _is_lost(self._nvml, error)
        return False


def _find(nvml: ModuleType) -> list[_Found]:
    found, sliced = list[_Found](), list[tuple[Any, Any]]()
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        raise DevicesUnavailableError(f"NVML cannot count the GPUs: {error}") from None
    for index in range(count):
        try:
            whole = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:  # the GPU was lost in the meantime, or access is denied
            _log.warning("GPU %d cannot be opened and is ignored: %s", index, error)
            continue
        slices = Nvml(nvml).slices(whole)
        if slices is None:  # also if the slices cannot be counted, which is logged
            found.append(_Found(index=index, handle=whole, whole=whole, is_slice=False))
        elif not slices:
            _log.warning("GPU %d is in MIG mode without a slice and is ignored", index)
        else:
            sliced += [(handle, whole) for handle in slices]
    for index, (handle, whole) in enumerate(sliced, count):
        found.append(_Found(index=index, handle=handle, whole=whole, is_slice=True))
    if len(found) > MAX_DEVICES:
        _log.warning("the node has %d devices, only the first %d are used", len(found), MAX_DEVICES)
    return found[:MAX_DEVICES]


def _is_lost(nvml: ModuleType, error: Exception) -> bool:
    return getattr(error, "value", None) in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)


def gpu_of(product_name: str, memory_bytes: int) -> GpuType | None:
    """Return the catalogue's type of the product that the driver reports, or None if none or several match both name
    and memory (0: unknown).
    """
    try:
        board = board_of(FoundGpus(product=product_name, count=1, memory_bytes=memory_bytes or None), {})
    except UnclearBoardError:
        return None
    return find_gpu(board).gpu


class Devices(Protocol):
    """The devices of one node. Calls may take tens of milliseconds; only one thread may call at a time."""

    def inventory(self) -> inventory_pb2.NodeInventory:
        """Return the node's hardware, digest included. Equal inventories have equal digests."""

    def sample(self) -> list[report_pb2.DeviceReport]:
        """Return the current state of every device, in the inventory's order. The engine fills in the KV fields.

        Never fails: a device that cannot be read is ``unhealthy``, and a value that cannot be read counts as unknown.
        """

    def close(self) -> None:
        """Release the library. No method may be called afterwards."""


def open_devices(source: str, *, host_name: str = "") -> Devices:
    """Open the devices that ``source`` names. Raises DevicesUnavailableError if the source is malformed, unknown, or
    unusable here. The message says what to do.

    ``source``: one of `SOURCES`. ``auto`` is NVML if it works and none otherwise. ``host_name``: for the inventory.
    Empty: the system's own.
    """
    kind, _, rest = source.partition(":")
    match kind:
        case "auto" | "nvml" if not rest:
            try:
                return NvmlDevices.open(host_name=host_name)
            except DevicesUnavailableError:
                if kind == "nvml":
                    raise
                return SimulatedDevices(host_name=host_name)
        case "none" if not rest:
            return SimulatedDevices(host_name=host_name)
        case "simulated":
            return SimulatedDevices.parse(rest, host_name=host_name)
    raise DevicesUnavailableError(f"unknown source of devices {source!r}, expected {SOURCES}")


def discover(source: str, *, host_name: str = "") -> inventory_pb2.NodeInventory:
    """Return the inventory of ``source``, for callers that need no samples. See `open_devices`."""
    devices = open_devices(source, host_name=host_name)
    try:
        return devices.inventory()
    finally:
        devices.close()
