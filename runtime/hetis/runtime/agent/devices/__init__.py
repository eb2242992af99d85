"""The GPUs of a node and their condition, from NVML, simulated, or none. There is one `Devices` per agent."""

from __future__ import annotations

from hetis.runtime.agent.devices.source import Devices, DevicesUnavailableError, discover, open_devices

__all__ = ["Devices", "DevicesUnavailableError", "discover", "open_devices"]
