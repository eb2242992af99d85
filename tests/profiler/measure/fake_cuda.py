"""A double of ``torch.cuda`` on a CPU: streams, events and graphs that enforce the rules of the real ones.

A violation here would be an error on a GPU, too: an event read before it was waited for, a graph captured during
another capture, a synchronisation inside a capture, timed work that was never queued. Time is that of the device: a
call takes as long as on this CPU, a replay as long as its capture did.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

LAUNCH_S = 5e-6  # time of a replay, so that no batch takes no time


class FakeStream:
    def wait_stream(self, stream: FakeStream) -> None:
        assert isinstance(stream, FakeStream)


class FakeCuda:
    """One GPU of 2 GiB with an L2 of 1 MiB."""

    def __init__(self) -> None:
        self.capturing = False
        self.device_s = 0.0  # the device's clock: the time for which it has been busy
        self.began_s: float | None = None  # start of eager work, on this CPU's clock
        self.replays = 0
        self.captured = 0
        self.queued: list[str] = []  # operations on the stream, in order
        self.main = FakeStream()
        cuda = self

        class Event:
            def __init__(self, *, enable_timing: bool = False) -> None:
                self.timing = enable_timing
                self.at_s: float | None = None
                self.waited = False

            def record(self) -> None:
                assert not cuda.capturing, "an event that is captured tells no time"
                cuda.catch_up()
                self.at_s = cuda.device_s
                cuda.queued.append("event")

            def synchronize(self) -> None:
                assert not cuda.capturing
                assert self.at_s is not None, "waits for an event that was never recorded"
                self.waited = True
                cuda.queued.append("wait")

            def elapsed_time(self, end: Event) -> float:
                assert self.timing
                assert end.timing
                assert end.waited, "reads an event that may not have happened"
                assert self.at_s is not None
                assert end.at_s is not None
                return (end.at_s - self.at_s) * 1e3

        class CUDAGraph:
            seconds: float | None = None

            def replay(self) -> None:
                assert self.seconds is not None, "replays a graph that was not captured"
                cuda.catch_up()
                cuda.device_s += self.seconds + LAUNCH_S
                cuda.replays += 1
                cuda.queued.append("replay")

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, FakeStream

    def catch_up(self) -> None:
        """Count eager work since the last event as done on the device."""
        now_s = time.perf_counter()
        if self.began_s is not None:
            self.device_s += now_s - self.began_s
        self.began_s = now_s

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        assert not self.capturing, "captures one graph inside another"
        self.capturing = True
        begin_s = time.perf_counter()
        yield
        self.capturing = False
        graph.seconds = time.perf_counter() - begin_s
        self.captured += 1

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        assert isinstance(stream, FakeStream)
        yield

    def current_stream(self) -> FakeStream:
        return self.main

    def synchronize(self, device: object = None) -> None:
        assert not self.capturing, "synchronises inside a capture"

    def set_device(self, device: object) -> None: ...

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_properties(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(
            name="Fake GPU", total_memory=2 * 2**30, major=9, minor=0, L2_cache_size=2**20,
            uuid="1234", pci_bus_id=0x3B, pci_device_id=0, pci_domain_id=0,
        )  # fmt: skip


class FakeTorch(ModuleType):
    """torch with that GPU, whose tensors stay in this machine's memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("torch")
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, kind: str, index: int | None = None) -> torch.device:
        return torch.device("cpu")

    def empty(self, *shape: Any, pin_memory: bool = False, **rest: Any) -> torch.Tensor:
        return torch.empty(*shape, **rest)
