"""A node without GPUs: its agent is connected and reports, and no plan uses it."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.runtime.agent.devices.node import node_inventory
from hetis.v1 import inventory_pb2, report_pb2


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
