"""Simulated devices for tests, demonstrations and dry runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from hetis.formats.catalogue import UnknownNameError, find_gpu
from hetis.runtime.agent.devices.node import MAX_DEVICES, DevicesUnavailableError, node_inventory
from hetis.solver.cluster import GpuType
from hetis.v1 import inventory_pb2, report_pb2

MAX_CLOCK_HZ = 1.5e9  # the catalogue has no clocks; readers only look at how far a clock is below this one
COOL_C, HOT_C = 45.0, 88.0
_PART = re.compile(r"(?P<type>[^:,]+):(?P<count>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """The condition of a simulated device.

    Attributes:
        clock_ratio: its clock divided by its highest clock; below 1 the device reports thermal throttling.
        busy_ratio: share of time in which a kernel runs, from 0 to 1.
        memory_used_bytes: by all processes.
        unhealthy: why it cannot be used. Empty: it can.
    """

    clock_ratio: float = 1.0
    busy_ratio: float = 0.0
    memory_used_bytes: int = 0
    unhealthy: str = ""


def _well(_index: int) -> Condition:
    return Condition()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevices:
    """Devices of the given types, all linked if their type has NVLink.

    Attributes:
        types: one per device, in the order of their index.
        host_name: for the inventory. Empty: the system's own.
        condition: returns the current condition of the device with an index; called at every sample.
    """

    types: tuple[GpuType, ...]
    host_name: str = ""
    condition: Callable[[int], Condition] = field(default=_well)

    @classmethod
    def parse(
        cls, text: str, *, host_name: str = "", condition: Callable[[int], Condition] = _well
    ) -> SimulatedDevices:
        """Return the devices that a string such as ``A100-SXM-80GB:4,L4:2`` describes.

        Raises:
            DevicesUnavailableError: the string is malformed, names an unknown type, or asks for more than
                `MAX_DEVICES`.
        """
        types: list[GpuType] = []
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                form = "TYPE:COUNT[,TYPE:COUNT...], such as A100-SXM-80GB:4,L4:2"
                raise DevicesUnavailableError(f"simulated devices are written {form}; not {text!r}")
            try:
                gpu = find_gpu(match["type"]).gpu
            except UnknownNameError as error:
                raise DevicesUnavailableError(f"simulated devices: {error}") from None
            if len(types) + int(match["count"]) > MAX_DEVICES:
                raise DevicesUnavailableError(f"simulated devices: a node has at most {MAX_DEVICES} of them: {text!r}")
            types += [gpu] * int(match["count"])
        return cls(types=tuple(types), host_name=host_name, condition=condition)

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(
            inventory_pb2.DEVICE_SOURCE_SIMULATED,
            [self._device(index, gpu) for index, gpu in enumerate(self.types)],
            host_name=self.host_name,
        )

    def sample(self) -> list[report_pb2.DeviceReport]:
        return [self._report(index) for index in range(len(self.types))]

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

    def _report(self, index: int) -> report_pb2.DeviceReport:
        now = self.condition(index)
        throttled = now.clock_ratio < 1
        return report_pb2.DeviceReport(
            index=index,
            memory_used_bytes=now.memory_used_bytes,
            busy_ratio=now.busy_ratio,
            clock_hz=MAX_CLOCK_HZ * now.clock_ratio,
            throttle_reasons=[report_pb2.THROTTLE_REASON_THERMAL] if throttled else [],
            temperature_c=HOT_C if throttled else COOL_C,
            unhealthy=now.unhealthy,
        )
