"""What an option says of a device; torch is not imported here, so that wrong options are told at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoom:
    """A device and its memory for KV, in bytes."""

    name: str
    kv_bytes: int
