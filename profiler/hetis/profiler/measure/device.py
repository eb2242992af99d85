"""The device under measurement: its clock, and operands that the cache does not hold. Needs torch.

Serving reads weights and KV cold, as everything else passes between two uses, so the operands of successive calls
rotate through a pool larger than the last-level cache. That is what a flush is for, without its time in the loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from hetis.profiler.measure import host
from hetis.solver.errors import InvalidProblemError

Call = Callable[[], object]
TimeCalls = Callable[[int], float]

_ROTATION = 2  # times the last-level cache
_MAX_SETS = 256
_ALIGNMENT = 128  # elements between sets


class Pool:
    """One long 16-bit tensor that operands are views of; it grows to what the largest point needs."""

    def __init__(self, device: torch.device, cache_bytes: int) -> None:
        self._device = device
        self._cache = cache_bytes
        self._data = torch.empty(0, dtype=torch.bfloat16, device=device)

    def views(self, elements: int) -> list[torch.Tensor]:
        """Non-overlapping views of ``elements`` each; together they are larger than the cache."""
        stride = -(-elements // _ALIGNMENT) * _ALIGNMENT
        sets = min(_MAX_SETS, max(2, math.ceil(_ROTATION * self._cache / (2 * stride))))
        if 2 * stride > _ROTATION * self._cache:
            sets = 1  # one pass over it empties the cache by itself
        self._grow(stride * sets)
        return [self._data[index * stride : index * stride + elements] for index in range(sets)]

    def blocks(self, elements: int) -> torch.Tensor:
        """The whole pool as rows of ``elements``; larger than the cache."""
        self._grow(_ROTATION * self._cache // 2)
        rows = len(self._data) // elements
        return self._data[: rows * elements].view(rows, elements)

    def _grow(self, elements: int) -> None:
        if len(self._data) < elements:
            self._data = torch.empty(0, dtype=torch.bfloat16, device=self._device)  # let go of the old one first
            self._data = torch.empty(elements, dtype=torch.bfloat16, device=self._device).uniform_(-0.05, 0.05)


class CpuDevice:
    """This host's cores as a device."""

    on_cuda = False
    copies = ("d2d",)  # host and device memory are the same

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = host.cpu_device_name()
        self.memory_bytes = host.memory_bytes()
        self.architecture = "unknown"
        self.pool = Pool(self.torch_device, host.last_level_cache_bytes())

    def timer(self, calls: Sequence[Call], *, graph: bool = True) -> TimeCalls:
        """Seconds of n calls in a row; the rotation goes on from batch to batch."""
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
        self.architecture = f"sm_{properties.major}{properties.minor}"
        cache = int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
        self.pool = Pool(self.torch_device, cache)

    def timer(self, calls: Sequence[Call], *, graph: bool = True) -> TimeCalls:
        """Seconds of n calls in a row; a batch is whole rotations, and counts for as many calls as were asked for."""
        runs: dict[int, Call] = {}

        def time_calls(count: int) -> float:
            whole = -(-count // len(calls)) * len(calls)
            if whole not in runs:
                runs[whole] = self._captured(calls, whole) if graph else _in_a_row(calls, whole)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            runs[whole]()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 * count / whole

        return time_calls

    def _captured(self, calls: Sequence[Call], count: int) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy set-up of libraries may not be captured
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
    """The device called ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        InvalidProblemError: there is no such device here; the message says what there is.
    """
    if name == "cpu":
        return CpuDevice()
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise InvalidProblemError(f"--device is {name!r}, must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        why = f"{count} CUDA device(s) here" if count else f"no CUDA device here (torch {torch.__version__})"
        raise InvalidProblemError(f"--device is {name!r}, but there is {why}; --device cpu measures the processor")
    return CudaDevice(int(index or 0))


def _in_a_row(calls: Sequence[Call], count: int) -> Call:
    def run() -> None:
        for index in range(count):
            calls[index % len(calls)]()

    return run
