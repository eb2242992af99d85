"""The GPUs of a node and their condition, from NVML, simulated, or none. There is one `Devices` per agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hetis.runtime.agent.devices.node import DevicesUnavailableError, SimulatedDevices, node_inventory
from hetis.v1 import inventory_pb2, report_pb2

__all__ = ["SOURCES", "Devices", "DevicesUnavailableError", "SimulatedDevices", "discover", "open_devices"]

SOURCES = "`auto`, `nvml`, `none`, or `simulated:TYPE:COUNT[,TYPE:COUNT...]`"


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
            from hetis.runtime.agent.devices.nvml import NvmlDevices

            try:
                return NvmlDevices.open(host_name=host_name)
            except DevicesUnavailableError:
                if kind == "nvml":
                    raise
                return NoDevices(host_name)
        case "none" if not rest:
            return NoDevices(host_name)
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


@dataclass(frozen=True, slots=True)
class NoDevices:
    """A node without devices."""

    host_name: str

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(inventory_pb2.DEVICE_SOURCE_NONE, [], host_name=self.host_name)

    def sample(self) -> list[report_pb2.DeviceReport]:
        return []

    def close(self) -> None:
        pass
