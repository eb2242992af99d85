"""Times a device's part of a step where the engine waits for it.

A device in another process computes while the engine does something else, and its answer may have been there for long
when the engine asks for it. Then only an upper bound is known: it took no longer than until that moment. `Taken` is
therefore an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, IntArray, Pending, Ready
from hetis.runtime.kv.shape import KvShape, SequenceKey

Clock = Callable[[], float]
OVER_READING = 2.0  # waiting longer than this multiple of the time to read an answer was real waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The time that one layer of one step took on one device: ``least_s`` to ``most_s`` seconds, equal if it is known,
    for this many query heads and the KV bytes that they read.
    """

    heads: int
    kv_bytes: float
    least_s: float
    most_s: float

    @property
    def is_known(self) -> bool:
        return self.least_s == self.most_s


class TimedDevice:
    """A device whose steps are timed. Unfinished steps are not reported."""

    def __init__(
        self,
        device: AttentionDevice,
        *,
        heard: Callable[[Taken], None],
        clock: Clock,
        read_s: float = 0.0,
        is_waited_for: bool = False,
    ) -> None:
        """Initialise with ``read_s``, the seconds to read an answer that is already there.

        Calls to a CUDA device of this process return before it is done: unless each of them ``is_waited_for``, its time
        is unknown.
        """
        self.name, self.shape, self.num_pages = device.name, device.shape, device.num_pages
        self._device, self._heard, self._clock, self._read_s = device, heard, clock, read_s
        self._is_waited_for = is_waited_for
        self._step: DeviceStep | None = None
        self._layers, self._least_s, self._most_s = 0, 0.0, 0.0

    # --- a step

    def begin(self, step: DeviceStep) -> None:
        begun_s = self._clock()
        self._device.begin(step)
        self._step, self._layers = step, 0
        self._least_s = self._most_s = self._clock() - begun_s

    def attend(self, layer: int, qkv: torch.Tensor) -> Pending:
        begun_s = self._clock()
        pending = self._device.attend(layer, qkv)
        if self._is_waited_for and isinstance(pending, Ready) and pending.output.is_cuda:
            torch.cuda.synchronize(pending.output.device)
        sent_s = self._clock()
        self._layers += 1
        if isinstance(pending, Ready):
            known = self._is_waited_for or not pending.output.is_cuda
            self._add(sent_s - begun_s if known else 0.0, sent_s - begun_s if known else float("inf"))
            return pending
        return _Awaited(self, pending, begun_s, sent_s)

    def finish(self, number: int) -> None:
        self._device.finish(number)
        step, self._step = self._step, None
        if step is not None and self._layers:
            self._heard(
                Taken(
                    heads=len(step) * self.shape.queries_per_group,
                    kv_bytes=float((step.positions + 1).sum()) * token_bytes(self.shape),
                    least_s=self._least_s / self._layers,
                    most_s=self._most_s / self._layers,
                )
            )

    def abort(self, number: int) -> None:
        self._step = None
        self._device.abort(number)

    # --- everything else is the device's

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        self._device.drop(keys)

    def export(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._device.export(request, incarnation, heads, first, last)

    def adopt(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._device.adopt(request, incarnation, heads, first, k, v)

    def digest(self, request: int, incarnation: int, heads: Sequence[int], last: int) -> IntArray:
        return self._device.digest(request, incarnation, heads, last)

    # --- inside

    def _waited(self, begun_s: float, sent_s: float, asked_s: float) -> None:
        got_s = self._clock()
        most_s = got_s - begun_s
        was_late = got_s - asked_s > OVER_READING * self._read_s
        self._add(most_s if was_late else most_s - (asked_s - sent_s), most_s)

    def _add(self, least_s: float, most_s: float) -> None:
        self._least_s += least_s
        self._most_s += most_s


class _Awaited(NamedTuple):
    """Outputs of one layer that are computed elsewhere."""

    device: TimedDevice
    pending: Pending
    begun_s: float
    sent_s: float

    def wait(self) -> torch.Tensor:
        asked_s = self.device._clock()
        output = self.pending.wait()
        self.device._waited(self.begun_s, self.sent_s, asked_s)
        return output


def token_bytes(shape: KvShape) -> int:
    """Return the bytes of K and V of one position of a virtual sequence in one layer."""
    return 2 * shape.head_dim * shape.item_bytes
