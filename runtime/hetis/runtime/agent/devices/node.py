"""What all sources of devices share: their error, the host's part of an inventory, and the inventory's digest.

HetisError (hetis.solver.errors)
+-- DevicesUnavailableError   the requested source cannot be read on this machine
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable

from hetis.solver.errors import HetisError
from hetis.v1 import inventory_pb2


class DevicesUnavailableError(HetisError):
    """The requested source of devices cannot be read on this machine."""


MAX_DEVICES = 64  # per node, as the contract says


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
    bare = inventory_pb2.NodeInventory()
    bare.CopyFrom(inventory)
    bare.digest = ""
    return f"sha256:{hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()}"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # the system does not tell
        return 0
