"""What options say of devices; torch is not imported here, so that wrong options are told at once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Compute(StrEnum):
    """What the devices of one process compute on.

    ``cuda``: each on a GPU of its own, of those that the process sees. ``auto``: that, where there are as many, else
    the CPU.
    """

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoom:
    """A device and its memory for KV.

    Attributes:
        name: of the device.
        kv_bytes: in bytes; None: its share of half of what is free on its GPU. The rest is left for weights.
        device: torch's name of it.
    """

    name: str
    kv_bytes: int | None
    device: str = "cpu"
