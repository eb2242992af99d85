"""The GPUs of this host by NVIDIA's library, NVML."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from types import ModuleType
from typing import Any

from hetis.formats.discovery.found import Inventory, inventory
from hetis.formats.discovery.nvidia import DriverGpu, host_node
from hetis.formats.errors import Problem, single_problem

LABEL = "nvml"
_log = logging.getLogger(__name__)
_ACTIONS = {1: "Reset", 2: "Reboot", 3: "Drain P2P", 4: "Drain and Reset"}  # as nvidia-smi prints them


def read_nvml(*, with_busy: bool = False) -> Inventory:
    """Return this host. With ``with_busy``, GPUs in use count as free. Raises DocumentError without a driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise single_problem(LABEL, "needs nvidia-ml-py, which is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise single_problem(LABEL, _refused(pynvml, error)) from None
    try:
        return _inventory(Nvml(pynvml), with_busy)
    except pynvml.NVMLError as error:
        raise single_problem(LABEL, f"cannot count the GPUs: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _refused(nvml: ModuleType, error: Any) -> str:
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "needs libnvidia-ml.so.1, which is not on this host: it comes with NVIDIA's driver"
    return f"NVIDIA's library cannot be used: {error}"


def _inventory(nvml: Nvml, with_busy: bool) -> Inventory:
    host = socket.gethostname()
    handles = nvml.handles()
    gpus = [nvml.gpu(handle) for handle in handles]
    whole = [handle for handle, gpu in zip(handles, gpus, strict=True) if gpu.product and gpu.num_parts is None]
    where = Problem(file=LABEL, message="")
    node = host_node(host, gpus, pairs=nvml.linked_pairs(whole), with_busy=with_busy, where=where)
    return inventory([node], [], [f"NVML only describes this host, {host}, and does not report its zone"], file=LABEL)


class Nvml:
    """The library, whose refusals become unknown values, because old boards, virtual GPUs and containers lack one call
    or another. A GPU that cannot be opened has the handle None."""

    def __init__(self, library: ModuleType) -> None:
        self._nvml = library

    def handles(self) -> list[Any]:
        """Return a handle for every GPU. Raises NVMLError if the library cannot count them."""
        return [self.ask("nvmlDeviceGetHandleByIndex", i) for i in range(self._nvml.nvmlDeviceGetCount())]

    def ask(self, name: str, *arguments: Any, otherwise: Any = None) -> Any:
        """Return a function's result, or ``otherwise`` if it is unsupported, not permitted or not in this library."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except Exception as error:  # a library of another version than the driver may raise anything
            _log.debug("NVML does not report: %s", error)
            return otherwise

    def address(self, handle: Any) -> str:
        """Return the PCI address of a GPU, or an empty string if it is unknown."""
        place = self.ask("nvmlDeviceGetPciInfo", handle)
        return "" if place is None else str(place.busId)

    def slices(self, handle: Any) -> list[Any] | None:
        """Return the MIG slices of a GPU, or None if it is not in MIG mode or they cannot be counted."""
        if not self.is_sliced(handle):
            return None
        most = self.ask("nvmlDeviceGetMaxMigDeviceCount", handle)
        if most is None:
            _log.warning(
                "the MIG slices of the GPU %s cannot be counted", self.address(handle) or "at an unknown address"
            )
            return None
        found = (self.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, i) for i in range(most))
        return [one for one in found if one is not None]

    def is_sliced(self, handle: Any) -> bool:
        """Return whether a GPU is known to be in MIG mode."""
        current, _pending = self.ask("nvmlDeviceGetMigMode", handle, otherwise=(None, None))
        return bool(current == getattr(self._nvml, "NVML_DEVICE_MIG_ENABLE", 1))  # a partial library may lack it

    def gpu(self, handle: Any) -> DriverGpu:
        nvml = self._nvml
        if handle is None:
            return DriverGpu(product="")
        # Its second version does not count what the driver itself keeps as used.
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle, getattr(nvml, "nvmlMemory_v2", None))
        memory = memory or self.ask("nvmlDeviceGetMemoryInfo", handle)
        mode = self.ask("nvmlDeviceGetComputeMode", handle)
        slices = self.slices(handle)
        return DriverGpu(
            product=self.ask("nvmlDeviceGetName", handle, otherwise=""),
            memory_bytes=int(memory.total) if memory else None,
            used_bytes=int(memory.used) if memory else None,
            processes=tuple(dict.fromkeys(self._processes(handle))),
            num_parts=len(slices or ()) if self.is_sliced(handle) else None,
            recovery=self._recovery(handle),
            is_prohibited=mode == nvml.NVML_COMPUTEMODE_PROHIBITED,
        )

    def linked_pairs(self, handles: Sequence[Any]) -> list[int]:
        """Return the NVLinks between the two GPUs of every pair, or nothing if those of any pair are unknown.

        Through a switch, all links of a GPU lead to every other one.
        """
        remotes = [self._remotes(handle) for handle in handles]
        addresses = [self.address(handle).upper() or "UNKNOWN" for handle in handles]
        found: list[int] = []
        for one, other in itertools.combinations(range(len(handles)), 2):
            kind = getattr(self._nvml, "NVML_P2P_CAPS_INDEX_NVLINK", None)  # a partial library may lack it
            status = None if kind is None else self.ask("nvmlDeviceGetP2PStatus", handles[one], handles[other], kind)
            reaches = status == self._nvml.NVML_P2P_STATUS_OK
            links = remotes[one].count(addresses[other]) or min(len(remotes[one]), len(remotes[other]))
            if status is None or (reaches and not links):
                return []
            found.append(links if reaches else 0)
        return found

    def _processes(self, handle: Any) -> Iterator[str]:
        for read in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses"):
            for one in self.ask(read, handle, otherwise=[]):
                name = self.ask("nvmlSystemGetProcessName", one.pid, otherwise="")
                yield PurePath(name).name or f"process {one.pid}"

    def _recovery(self, handle: Any) -> str:
        field = getattr(self._nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)  # older libraries lack it
        values = None if field is None else self.ask("nvmlDeviceGetFieldValues", handle, [field])
        if values is None or values[0].nvmlReturn != self._nvml.NVML_SUCCESS or not values[0].value.uiVal:
            return ""
        return f"recovery ({_ACTIONS.get(values[0].value.uiVal, f'action {values[0].value.uiVal}')})"

    def _remotes(self, handle: Any) -> list[str]:
        """Return the PCI address at the other end of every active NVLink."""
        links, enabled = range(self._nvml.NVML_NVLINK_MAX_LINKS), getattr(self._nvml, "NVML_FEATURE_ENABLED", None)
        if enabled is None:
            return []
        active = [link for link in links if self.ask("nvmlDeviceGetNvLinkState", handle, link) == enabled]
        ends = [self.ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link) for link in active]
        return ["" if end is None else str(end.busId).upper() for end in ends]
