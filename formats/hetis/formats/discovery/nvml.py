"""The GPUs of this host, read from NVIDIA's management library (NVML), which comes with the driver.

Any single value may be refused, because old boards, virtual GPUs and containers lack one call or another; it counts as
unknown. Only a missing library or driver is an error.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from types import ModuleType
from typing import Any, TypeVar

from hetis.formats.discovery.driver_gpus import DriverGpu, host_node
from hetis.formats.discovery.found import Inventory, inventory
from hetis.formats.errors import Problem, single_problem

LABEL = "nvml"

T = TypeVar("T")
U = TypeVar("U")

_ACTIONS = {1: "Reset", 2: "Reboot", 3: "Drain P2P", 4: "Drain and Reset"}  # as nvidia-smi prints them


def read_nvml(*, with_busy: bool = False) -> Inventory:
    """Return this host. With ``with_busy``, GPUs in use count as free.

    Raises:
        DocumentError: the library or the driver is missing, or refuses to answer.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        raise single_problem(LABEL, "needs nvidia-ml-py, which is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise single_problem(LABEL, _refused(pynvml, error)) from None
    try:
        return _inventory(_Nvml(pynvml), with_busy)
    except pynvml.NVMLError as error:
        raise single_problem(LABEL, f"cannot count the GPUs: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _refused(nvml: ModuleType, error: Any) -> str:
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "needs libnvidia-ml.so.1, which is not on this host: it comes with NVIDIA's driver"
    return f"NVIDIA's library cannot be used: {error}"


def _inventory(nvml: _Nvml, with_busy: bool) -> Inventory:
    host = socket.gethostname()
    handles = nvml.handles()
    gpus = [nvml.gpu(handle) for handle in handles]
    whole = [handle for handle, gpu in zip(handles, gpus, strict=True) if gpu.product and gpu.num_parts is None]
    where = Problem(file=LABEL, message="")
    node = host_node(host, gpus, pairs=nvml.linked_pairs(whole), with_busy=with_busy, where=where)
    return inventory([node], [], [f"NVML describes this host alone, {host}, and not its zone"], file=LABEL)


class _Nvml:
    """The library, whose refusals become unknown values. A GPU that cannot be opened has the handle None."""

    def __init__(self, library: ModuleType) -> None:
        self._nvml = library

    def handles(self) -> list[Any]:
        """Return a handle for every GPU.

        Raises:
            NVMLError: the library cannot count them.
        """
        nvml = self._nvml
        return [
            self._known(lambda index: nvml.nvmlDeviceGetHandleByIndex(index), None, index)
            for index in range(nvml.nvmlDeviceGetCount())
        ]

    def gpu(self, handle: Any) -> DriverGpu:
        nvml = self._nvml
        if handle is None:
            return DriverGpu(product="")
        memory = self._known(lambda: nvml.nvmlDeviceGetMemoryInfo(handle), None)
        mode = self._known(lambda: nvml.nvmlDeviceGetComputeMode(handle), None)
        return DriverGpu(
            product=self._known(lambda: nvml.nvmlDeviceGetName(handle), ""),
            memory_bytes=int(memory.total) if memory else None,
            used_bytes=int(memory.used) if memory else None,
            processes=tuple(dict.fromkeys(self._processes(handle))),
            num_parts=self._num_parts(handle),
            recovery=self._recovery(handle),
            is_prohibited=mode == nvml.NVML_COMPUTEMODE_PROHIBITED,
        )

    def linked_pairs(self, handles: Sequence[Any]) -> list[int]:
        """Return the NVLinks between the two GPUs of every pair, or nothing if those of any pair are unknown.

        Through a switch, all links of a GPU lead to every other one.
        """
        remotes = [self._remotes(handle) for handle in handles]
        addresses = [self._address(handle) for handle in handles]
        found: list[int] = []
        for one, other in itertools.combinations(range(len(handles)), 2):
            reaches = self._reaches(handles[one], handles[other])
            direct = remotes[one].count(addresses[other])
            links = direct or min(len(remotes[one]), len(remotes[other]))
            if reaches is None or (reaches and not links):
                return []
            found.append(links if reaches else 0)
        return found

    def _processes(self, handle: Any) -> Iterator[str]:
        nvml = self._nvml
        for read in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses"):
            for one in self._known(lambda read: getattr(nvml, read)(handle), [], read):
                name = self._known(lambda pid: nvml.nvmlSystemGetProcessName(pid), "", one.pid)
                yield PurePath(name).name or f"process {one.pid}"

    def _num_parts(self, handle: Any) -> int | None:
        """Return the number of MIG parts, or None if the GPU is not in MIG mode."""
        nvml = self._nvml
        current, _pending = self._known(lambda: nvml.nvmlDeviceGetMigMode(handle), (None, None))
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
        most = self._known(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0)
        parts = (
            self._known(lambda index: nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index), None, index)
            for index in range(most)
        )
        return sum(part is not None for part in parts)

    def _recovery(self, handle: Any) -> str:
        nvml = self._nvml
        values = self._known(
            lambda: nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]), None
        )
        if values is None or values[0].nvmlReturn != nvml.NVML_SUCCESS or not values[0].value.uiVal:
            return ""
        return f"recovery ({_ACTIONS.get(values[0].value.uiVal, f'action {values[0].value.uiVal}')})"

    def _reaches(self, one: Any, other: Any) -> bool | None:
        """Return whether NVLink leads from one GPU to another, directly or through a switch; None: unknown."""
        nvml = self._nvml
        status = self._known(lambda: nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK), None)
        return None if status is None else bool(status == nvml.NVML_P2P_STATUS_OK)

    def _remotes(self, handle: Any) -> list[str]:
        """Return the PCI address at the other end of every active NVLink."""
        nvml = self._nvml

        def is_active(link: int) -> bool:
            return bool(nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED)

        active = (link for link in range(nvml.NVML_NVLINK_MAX_LINKS) if self._known(is_active, False, link))
        return [
            self._known(lambda link: str(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId), "", link).upper()
            for link in active
        ]

    def _address(self, handle: Any) -> str:
        return self._known(lambda: str(self._nvml.nvmlDeviceGetPciInfo(handle).busId), "unknown").upper()

    def _known(self, read: Callable[..., T], otherwise: U, *arguments: Any) -> T | U:
        """Return the result of a call, or ``otherwise`` if the call is refused or not in this library."""
        try:
            return read(*arguments)
        except (self._nvml.NVMLError, AttributeError):
            return otherwise
