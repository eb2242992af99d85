"""Errors of a device that holds KV.

HetisError
+-- DeviceError
    +-- DeviceLostError         it no longer answers; what it held is gone
        +-- UnreachedDeviceError   it could not even be asked
    +-- OutOfPagesError         it has too few free pages
    +-- UnknownSequenceError    it does not hold what it was asked for
    +-- StaleEpochError         another engine has taken over
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class DeviceError(HetisError):
    """A device could not do what it was asked to do. ``device`` is its name."""

    def __init__(self, device: str, message: str) -> None:
        super().__init__(f"{device}: {message}")
        self.device = device


class DeviceLostError(DeviceError):
    """The device no longer answers: requests with heads there have to be prefilled again."""


class UnreachedDeviceError(DeviceLostError):
    """There is no connection to the device. It may not know of the attempt, so only this side can try again."""


class OutOfPagesError(DeviceError):
    """The device needs ``needed`` pages and has ``free``."""

    def __init__(self, device: str, *, needed: int, free: int) -> None:
        super().__init__(device, f"{needed} KV pages are needed, {free} are free")
        self.needed, self.free = needed, free


class UnknownSequenceError(DeviceError):
    """The device does not hold the sequence, or not up to there: a bug of the caller."""


class StaleEpochError(DeviceError):
    """The device follows an engine of a later epoch."""

    def __init__(self, device: str, *, epoch: int, current: int) -> None:
        super().__init__(device, f"epoch {epoch} has ended, {current} is current")
        self.epoch, self.current = epoch, current
