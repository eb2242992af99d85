"""Devices whose times a test sets, on the test's own clock, so that no test sleeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, LocalDevice, Pending
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.vllm.calibration import token_bytes

SHAPE = KvShape(layers=3, head_dim=8, queries_per_group=2, page_tokens=16, dtype="float32", scale=1.0, windows=(0,) * 3)


@dataclass(slots=True)
class FakeClock:
    """A clock that advances only on request."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass(slots=True, kw_only=True)
class Pace:
    """The seconds of a layer, ``slow * (head_s * heads + kv_byte_s * bytes + call_s)``, and of reading the answer."""

    head_s: float = 1e-6
    kv_byte_s: float = 1e-9
    call_s: float = 1e-5
    read_s: float = 0.0
    slow: float = 1.0

    def seconds(self, heads: int, kv_bytes: float) -> float:
        return self.slow * (self.head_s * heads + self.kv_byte_s * kv_bytes + self.call_s)


class PacedDevice(LocalDevice):
    """A device in this process, whose work blocks the caller. With ``is_away`` it works meanwhile, like a worker."""

    def __init__(
        self, name: str, shape: KvShape, pages: int, *, pace: Pace, clock: FakeClock, is_away: bool = False
    ) -> None:
        super().__init__(name, shape, pages)
        self.pace, self._time, self._is_away = pace, clock, is_away
        self._layer_s = 0.0

    def begin(self, step: DeviceStep) -> None:
        super().begin(step)
        kv_bytes = float((step.positions + 1).sum()) * token_bytes(self.shape)
        self._layer_s = self.pace.seconds(len(step) * self.shape.queries_per_group, kv_bytes)

    def attend(self, layer: int, qkv: torch.Tensor) -> Pending:  # type: ignore[override]
        ready = super().attend(layer, qkv)
        if self._is_away:
            return _Away(self._time, self._time.now_s + self._layer_s, self.pace.read_s, ready.output)
        self._time.pause(self._layer_s)
        return ready


class _Away(NamedTuple):
    clock: FakeClock
    there_s: float
    read_s: float
    output: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.clock.now_s = max(self.clock.now_s, self.there_s) + self.read_s
        return self.output


def paced_devices(
    paces: Sequence[Pace], clock: FakeClock, *, pages: int = 400
) -> Callable[[KvShape], Sequence[AttentionDevice]]:
    """Devices of an engine; the first is the primary, the others compute at the same time."""

    def make(shape: KvShape) -> Sequence[AttentionDevice]:
        return [
            PacedDevice(f"d{i}", shape, pages, pace=pace, clock=clock, is_away=i > 0) for i, pace in enumerate(paces)
        ]

    return make
