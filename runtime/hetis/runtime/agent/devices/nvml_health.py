"""The health of a GPU: critical events (XID), failed row remappings, uncorrected memory errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)

# Events that an application causes or from which a GPU recovers on its own: engine exceptions and kernel faults (13,
# 31, 43, 45, 68, 109), recorded remappings (63), a high rate of corrected errors (92), and contained memory errors
# (94), after which only the affected process has to restart.
HARMLESS_XIDS = frozenset({13, 31, 43, 45, 63, 68, 92, 94, 109})
_MAX_EVENTS = 256  # per call: an event storm must not delay a sample


class GpuHealth:
    """Critical events of the GPUs since this object was made, which are kept, and error counters as they are now."""

    def __init__(self, library: ModuleType, handles: Sequence[Any]) -> None:
        self._nvml = library
        self._handles = handles
        self._xids: dict[str, int] = {}  # by PCI address; the first harmful one
        self._events = self._register()

    def read_events(self) -> None:
        """Take in the events since the last call, without waiting."""
        nvml = self._nvml
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError as error:  # usually: no event is waiting
                if getattr(error, "value", None) != nvml.NVML_ERROR_TIMEOUT:
                    _log.debug("NVML events: %s", error)
                return
            if event.eventType == nvml.nvmlEventTypeXidCriticalError and event.eventData not in HARMLESS_XIDS:
                self._xids.setdefault(self._address(event.device), int(event.eventData))

    def of(self, index: int) -> str:
        """Return why the GPU at this index of ``handles`` cannot be used, or an empty string if no reason is known."""
        handle = self._handles[index]
        xid = self._xids.get(self._address(handle))
        if xid is not None:
            return f"critical event XID {xid}: reset the GPU, then restart the agent"
        remapping = self._remapping(handle)
        if remapping is not None:
            return "a faulty row of its memory could not be remapped: replace the GPU" if remapping else ""
        errors = self._uncorrected(handle)
        return f"{errors} uncorrected memory errors since the driver was loaded: reset the GPU" if errors else ""

    def close(self) -> None:
        if self._events is not None:
            try:
                self._nvml.nvmlEventSetFree(self._events)
            except self._nvml.NVMLError as error:
                _log.debug("NVML events: %s", error)
            self._events = None

    def _register(self) -> Any | None:
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError as error:
            _log.debug("NVML has no events here: %s", error)
            return None
        for address, handle in {self._address(handle): handle for handle in self._handles}.items():
            try:
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError as error:
                _log.debug("NVML sends no events of %s: %s", address, error)
        return events

    def _address(self, handle: Any) -> str:
        try:
            return str(self._nvml.nvmlDeviceGetPciInfo(handle).busId)
        except self._nvml.NVMLError:
            return ""

    def _remapping(self, handle: Any) -> bool | None:
        """Return whether remapping a row has failed, or None if the GPU does not remap rows. A pending remapping waits
        for the next reset and is harmless until then.
        """
        try:
            _corrected, _uncorrected, _pending, failed = self._nvml.nvmlDeviceGetRemappedRows(handle)
        except self._nvml.NVMLError:
            return None
        return bool(failed)

    def _uncorrected(self, handle: Any) -> int:
        nvml = self._nvml
        try:
            return int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )
        except nvml.NVMLError:
            return 0
