"""What all sources of devices share, and the simulated one for tests, demonstrations and dry runs.

HetisError (hetis.solver.errors)
+-- DevicesUnavailableError   the requested source cannot be read on this machine
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

from hetis.formats.catalogue import UnknownNameError, find_gpu
from hetis.solver.cluster import GpuType
from hetis.solver.errors import HetisError
from hetis.v1 import inventory_pb2, report_pb2

MAX_DEVICES = 64  # per node, as the contract says
MAX_CLOCK_HZ = 1.5e9  # the catalogue has no clocks; readers only look at how far a clock is below this one
COOL_C = 45.0
_PART = re.compile(r"(?P<type>[^:,]+):(?P<count>\d+)")


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
        memory_bytes=_memory_bytes(),
    )
    inventory.digest = digest_of(inventory)
    return inventory


def digest_of(inventory: inventory_pb2.NodeInventory) -> str:
    """Return ``sha256:`` and the SHA-256 of the inventory's deterministic binary form without its digest."""
    bare = deepcopy(inventory)
    bare.digest = ""
    return f"sha256:{hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()}"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # the system does not tell
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevices:
    """Idle, healthy devices of the given types, all linked if their type has NVLink."""

    types: tuple[GpuType, ...]  # one per device, in the order of their index
    host_name: str = ""  # for the inventory. Empty: the system's own.

    @classmethod
    def parse(cls, text: str, *, host_name: str = "") -> SimulatedDevices:
        """Return the devices that a string such as ``A100-SXM-80GB:4,L4:2`` describes. Raises DevicesUnavailableError
        if the string is malformed, names an unknown type, or asks for more than `MAX_DEVICES`.
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
        return cls(types=tuple(types), host_name=host_name)

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(
            inventory_pb2.DEVICE_SOURCE_SIMULATED,
            [self._device(index, gpu) for index, gpu in enumerate(self.types)],
            host_name=self.host_name,
        )

    def sample(self) -> list[report_pb2.DeviceReport]:
        reports, size = report_pb2.DeviceReport, len(self.types)
        return [reports(index=index, clock_hz=MAX_CLOCK_HZ, temperature_c=COOL_C) for index in range(size)]

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
