"""The device under measurement: its clock, and the memory that operands are views of. Needs torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hetis.profiler.measure import host
from hetis.profiler.measure.host import TIMES, Cache
from hetis.profiler.measure.watch import GpuAddress, architecture_of
from hetis.solver.errors import InvalidProblemError

Call = Callable[[], object]
TimeCalls = Callable[[int], float]

_ALIGNMENT = 128  # elements; sets of operands start at multiples of it
_ASSUMED_L2 = 128 * 2**20  # if torch does not report it; no GPU on sale has more


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator as calls over rotating operands. With ``cold``, each call finds its operands outside the cache."""

    calls: Sequence[Call]
    cold: bool = False


class OperandPool:
    """One long 16-bit tensor that operands are views of. It grows to the size that the largest point needs."""

    def __init__(self, device: torch.device, cache: Cache) -> None:
        self.cache = cache
        self._device = device
        self._data = torch.empty(0, dtype=torch.bfloat16, device=device)

    def views(self, elements: int) -> tuple[list[torch.Tensor], bool]:
        """Return (disjoint views of ``elements`` each to use in turn, whether each leaves the cache until its next)."""
        stride = -(-elements // _ALIGNMENT) * _ALIGNMENT
        sets = self.cache.sets(2 * elements)
        self._grow(stride * sets)
        views = [self._data[index * stride : index * stride + elements] for index in range(sets)]
        return views, self.cache.is_evicted(sets, 2 * elements)

    def rows(self, count: int, elements: int) -> torch.Tensor:
        """Return ``count`` rows of ``elements`` each."""
        self._grow(count * elements)
        return self._data[: count * elements].view(count, elements)

    def flush(self) -> None:
        """Read more than the cache holds, from the first operands on, so that none of them is left in it."""
        elements = TIMES * self.cache.num_bytes // 2
        self._grow(elements)
        self._data[:elements].view(torch.int32).amax()

    def _grow(self, elements: int) -> None:
        if len(self._data) < elements:
            self._data = torch.empty(0, dtype=torch.bfloat16, device=self._device)  # release the old one first
            self._data = torch.empty(elements, dtype=torch.bfloat16, device=self._device).uniform_(-0.05, 0.05)


class CpuDevice:
    """This host's cores as a device."""

    on_cuda = False
    copies = ("d2d",)  # host and device memory are the same

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = host.cpu_device_name()
        self.memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.architecture = "unknown"
        self.pool = OperandPool(self.torch_device, host.last_level_cache())

    def timer(self, operator: Operator, *, graph: bool = True, while_queued: Call = lambda: None) -> TimeCalls:
        """Return a function for the seconds of n calls. The rotation continues across batches; nothing is queued."""
        calls = operator.calls
        if operator.cold:
            self.pool.flush()  # evict what the previous point has left
        position = 0

        def time_calls(count: int) -> float:
            nonlocal position
            order = [calls[(position + index) % len(calls)] for index in range(count)]
            position = (position + count) % len(calls)
            start = time.perf_counter()
            for call in order:
                call()
            return time.perf_counter() - start

        return time_calls


class CudaDevice:
    """A CUDA GPU. Calls are captured in graphs, as serving engines do, and timed with events on the device."""

    on_cuda = True
    copies = ("h2d", "d2h", "d2d")

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.memory_bytes = properties.total_memory
        self.architecture = architecture_of(properties.major, properties.minor)
        self.address = _address(properties)
        l2_bytes = int(getattr(properties, "L2_cache_size", 0))
        cache = Cache(num_bytes=l2_bytes or _ASSUMED_L2, origin="as reported by the driver" if l2_bytes else "assumed")
        self.pool = OperandPool(self.torch_device, cache)

    def timer(self, operator: Operator, *, graph: bool = True, while_queued: Call = lambda: None) -> TimeCalls:
        """Return a function for the seconds of n successive calls. A batch is whole rotations, scaled to the calls
        asked for.

        Args:
            operator: its calls only queue work on the current stream.
            graph: capture them; copies from and to the host are queued individually instead, as engines do.
            while_queued: called after a batch was queued and before waiting for it; its own time does not count.
        """
        calls = operator.calls
        runs: dict[int, Call] = {}

        def time_calls(count: int) -> float:
            whole = -(-count // len(calls)) * len(calls)
            if whole not in runs:
                runs[whole] = self._captured(calls, whole) if graph else _in_a_row(calls, whole)
                runs[whole]()  # the first launch of a graph also uploads it
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Queue work first, so that the timed interval does not include the device waiting for the host to queue the
            # batch.
            if operator.cold:
                self.pool.flush()
            else:
                calls[0]()
            start.record()
            runs[whole]()
            end.record()
            while_queued()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 * count / whole

        return time_calls

    def _captured(self, calls: Sequence[Call], count: int) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation of libraries must not be captured
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(count):
                calls[index % len(calls)]()
        replay: Call = graph.replay
        return replay


Device = CpuDevice | CudaDevice


def open_device(name: str) -> Device:
    """Return the device called ``cpu``, ``cuda`` or ``cuda:1``. Raises InvalidProblemError if there is no such device
    here. The message says what there is.
    """
    if name == "cpu":
        return CpuDevice()
    kind, colon, index = name.partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdecimal())):
        raise InvalidProblemError(f"--device is {name!r}, must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        why = f"{count} CUDA device(s) here" if count else f"no CUDA device here (torch {torch.__version__})"
        raise InvalidProblemError(f"--device is {name!r}, but there is {why}; --device cpu measures the processor")
    return CudaDevice(int(index or 0))


def _address(properties: object) -> GpuAddress:
    """Return the GPU's address. torch has the UUID since 2.5 and the bus address since 2.8; either one suffices."""
    bus, slot = getattr(properties, "pci_bus_id", None), getattr(properties, "pci_device_id", None)
    domain = getattr(properties, "pci_domain_id", 0)
    return GpuAddress(
        uuid=str(getattr(properties, "uuid", "")),
        bus="" if bus is None or slot is None else f"{domain:08X}:{bus:02X}:{slot:02X}.0",
    )


def _in_a_row(calls: Sequence[Call], count: int) -> Call:
    def run() -> None:
        for index in range(count):
            calls[index % len(calls)]()

    return run
