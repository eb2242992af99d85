"""What GPUs a node has and how they are: NVML, simulated ones, or none. One `Devices` per agent."""

from __future__ import annotations

from hetis.runtime.agent.devices.source import Devices, DevicesUnavailableError, discover, open_devices

__all__ = ["Devices", "DevicesUnavailableError", "discover", "open_devices"]
