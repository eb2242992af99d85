"""Sources of devices, each said in one string, and what every source can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hetis.runtime.agent.devices.node import node_inventory
from hetis.runtime.agent.devices.unavailable import DevicesUnavailableError
from hetis.v1 import inventory_pb2, report_pb2

__all__ = ["SOURCES", "Devices", "DevicesUnavailableError", "discover", "open_devices"]

SOURCES = "`auto`, `nvml`, `none`, or `simulated:TYPE:COUNT[,TYPE:COUNT...]`"


class Devices(Protocol):
    """The devices of one node. Calls may take tens of milliseconds; one thread at a time."""

    def inventory(self) -> inventory_pb2.NodeInventory:
        """Return what the node has, digest included. Equal inventories have equal digests."""

    def sample(self) -> list[report_pb2.DeviceReport]:
        """Return how every device of the inventory is now, in its order; KV fields are the engine's to fill in. Never
        fails: a device that cannot be read is ``unhealthy``, a value that cannot be read is not known."""

    def close(self) -> None:
        """Lets go of the library. Nothing may be called after it."""


def open_devices(source: str, *, gpu_types: Mapping[str, str] | None = None, host_name: str = "") -> Devices:
    """The devices that ``source`` says.

    Args:
        source: `SOURCES`. ``auto`` is NVML where it works and otherwise none.
        gpu_types: GPU type by what the driver calls the product, before the catalogue: for types that only the
            cluster's document has, MIG slices among them.
        host_name: of the inventory; empty: what the system says.

    Raises:
        DevicesUnavailableError: the source is malformed, unknown, or not usable here; the message says what to do.
    """
    kind, _, rest = source.partition(":")
    match kind:
        case "auto" | "nvml" if not rest:
            from hetis.runtime.agent.devices.nvml import NvmlDevices

            try:
                return NvmlDevices.open(gpu_types=gpu_types or {}, host_name=host_name)
            except DevicesUnavailableError as error:
                if kind == "nvml":
                    raise
                return NoDevices(host_name=host_name, reason=str(error))
        case "none" if not rest:
            return NoDevices(host_name=host_name, reason="the agent was told that there are none")
        case "simulated":
            from hetis.runtime.agent.devices.simulated import SimulatedDevices

            return SimulatedDevices.parse(rest, host_name=host_name)
    raise DevicesUnavailableError(f"unknown source of devices {source!r}, expected {SOURCES}")


def discover(
    source: str, *, gpu_types: Mapping[str, str] | None = None, host_name: str = ""
) -> inventory_pb2.NodeInventory:
    """The inventory of ``source``, for callers that need no samples; arguments and errors as `open_devices`."""
    devices = open_devices(source, gpu_types=gpu_types, host_name=host_name)
    try:
        return devices.inventory()
    finally:
        devices.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDevices:
    """No devices, and why, for the log."""

    host_name: str
    reason: str

    def inventory(self) -> inventory_pb2.NodeInventory:
        return node_inventory(inventory_pb2.DEVICE_SOURCE_NONE, [], host_name=self.host_name)

    def sample(self) -> list[report_pb2.DeviceReport]:
        return []

    def close(self) -> None:
        pass
