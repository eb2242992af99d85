"""Measures the cost of attention on each device of an idle stage, for a few numbers of heads and context lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, Pending, Ready
from hetis.runtime.kv.shape import SequenceKey
from hetis.runtime.measured.coefficients import Coefficients
from hetis.runtime.measured.fitting import TimedCall, fit_calls
from hetis.runtime.measured.timed import Clock, Taken, TimedDevice, token_bytes

_OWN = 2**62  # id of the artificial request used to measure
LONGEST_CONTEXT = 512  # positions read: enough to see the cost of reading KV, and quickly filled
_CONTEXTS = (16, 128, LONGEST_CONTEXT)
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
_POINT_S = 0.3  # a point gets no further rounds after this time: a large model on a slow device is slow enough
_PAUSES = 3.0  # multiple of a call's time after which its answer is surely there


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The calibration of one device.

    Attributes:
        coefficients: of its attention and its exchange. Only their sum was measured; the time of copies out of the
            device determines how it divides between the two.
        copy_byte_s: seconds per byte of KV copied out of it.
        read_s: seconds to read an answer that is already there.
    """

    coefficients: Coefficients
    copy_byte_s: float
    read_s: float


def calibrate(
    devices: Sequence[AttentionDevice],
    *,
    groups: int,
    exchange_bytes_per_head: float,
    primaries: int = 1,
    clock: Clock = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> Mapping[str, Calibration]:
    """Return calibrations by name. A device with too few pages to be measured is left out.

    The devices must be idle, and are again afterwards.

    Args:
        devices: of one stage.
        groups: KV heads of the model.
        exchange_bytes_per_head: between the primary and another device, per query head.
        primaries: number of leading devices that are the primary's ranks, which exchange nothing with themselves.
        clock: returns seconds.
        pause: sleeps for a number of seconds.

    Raises:
        DeviceLostError: a device failed.
    """
    found = {}
    for number, device in enumerate(devices):
        one = _Measuring(device, groups, clock, pause).calibration(
            exchange_bytes_per_head, is_primary=number < primaries
        )
        if one is not None:
            found[device.name] = one
    return found


def with_exchange(whole: Coefficients, bytes_per_head: float, *, byte_s: float, copy_s: float) -> Coefficients:
    """Return the total cost of calls divided into attention and an exchange as fast as copies are. The sum stays the
    same.

    Args:
        whole: of one piece, without an exchange.
        bytes_per_head: that a query head exchanges.
        byte_s: seconds per byte copied.
        copy_s: seconds per copy.
    """
    ((head_s, kv_byte_s, call_s),) = whole.pieces
    # Bound the subtrahend rather than its quotient, which multiplied again may exceed the whole by a rounding error.
    exchange_s, transfer_s = min(byte_s * bytes_per_head, head_s), min(copy_s, call_s)
    return Coefficients(
        pieces=((head_s - exchange_s, kv_byte_s, call_s - transfer_s),),
        transfer_byte_s=exchange_s / bytes_per_head,
        transfer_s=transfer_s,
    )


def _at_once(pending: Pending) -> None:
    pending.wait()


class _Measuring:
    """One device and timed calls to it."""

    def __init__(self, device: AttentionDevice, groups: int, clock: Clock, pause: Callable[[float], None]) -> None:
        self._device, self._groups, self._clock, self._pause = device, groups, clock, pause

    def calibration(self, exchange_bytes_per_head: float, *, is_primary: bool) -> Calibration | None:
        calls: list[TimedCall] = []
        read_s, copy = 0.0, (0.0, 0.0)
        points = self._points()
        for sequences, context in points:
            try:
                calls.append(self._measured(sequences, context))
                if (sequences, context) == points[-1]:
                    read_s, copy = self._read_s(sequences, context, calls[-1].seconds), self._copy(sequences, context)
            finally:
                self._device.drop([SequenceKey(_OWN, 0, head) for head in range(sequences)])
        if not calls:
            return None
        coefficients = Coefficients(pieces=(fit_calls(calls),))
        if not is_primary:
            coefficients = with_exchange(coefficients, exchange_bytes_per_head, byte_s=copy[0], copy_s=copy[1])
        return Calibration(
            coefficients=coefficients,
            copy_byte_s=copy[0],
            read_s=read_s,
        )

    def _points(self) -> list[tuple[int, int]]:
        """Return the numbers of sequences and positions to measure, within the device's pages."""
        device = self._device
        wanted = [(count, context) for count in (1, self._groups, 4 * self._groups) for context in _CONTEXTS]
        return [(n, context) for n, context in wanted if n * device.shape.pages(context) <= device.num_pages]

    def _measured(self, sequences: int, context: int) -> TimedCall:
        """Fill the sequences and measure steps over them."""
        shape = self._device.shape
        kv = torch.zeros(sequences, shape.layers, context - 1, shape.head_dim, dtype=shape.torch_dtype)
        self._device.adopt(_OWN, 0, list(range(sequences)), 0, kv, kv)
        taken: list[Taken] = []
        timed = TimedDevice(self._device, heard=taken.append, clock=self._clock, is_waited_for=True)
        begun_s = self._clock()
        self._step(timed, sequences, context)  # pays for what is compiled or allocated once
        while len(taken) < 1 + _MOST_ROUNDS and (len(taken) < 1 + _LEAST_ROUNDS or self._clock() - begun_s < _POINT_S):
            self._step(timed, sequences, context)
        seconds = median(one.most_s for one in taken[1:])
        return TimedCall(heads=taken[0].heads, kv_bytes=taken[0].kv_bytes, seconds=seconds)

    def _read_s(self, sequences: int, context: int, call_s: float) -> float:
        """Return the seconds to read an answer that was there before it was asked for."""
        seconds: list[float] = []

        def wait(pending: Pending) -> None:
            if not isinstance(pending, Ready):
                self._pause(_PAUSES * call_s)
            asked_s = self._clock()
            pending.wait()
            seconds.append(self._clock() - asked_s)

        while len(seconds) < _LEAST_ROUNDS:
            self._step(self._device, sequences, context, wait=wait)
        return median(seconds)

    def _copy(self, sequences: int, context: int) -> tuple[float, float]:
        """Return the seconds per byte, and per copy, of KV that leaves the device."""
        heads, shape = list(range(sequences)), self._device.shape
        seconds, sizes = [], []
        for last in (1, context - 1):
            times = []
            for _ in range(_LEAST_ROUNDS):
                begun_s = self._clock()
                k, _ = self._device.export(_OWN, 0, heads, 0, last)
                if k.is_cuda:  # it may not be there yet when the call returns
                    torch.cuda.synchronize(k.device)
                times.append(self._clock() - begun_s)
            seconds.append(median(times))
            sizes.append(sequences * shape.layers * last * token_bytes(shape))
        byte_s = max(seconds[1] - seconds[0], 0.0) / (sizes[1] - sizes[0])
        return byte_s, max(seconds[0] - byte_s * sizes[0], 0.0)

    def _step(
        self,
        device: AttentionDevice,
        sequences: int,
        context: int,
        *,
        wait: Callable[[Pending], None] = _at_once,
    ) -> None:
        shape = device.shape
        step = DeviceStep(
            epoch=0,
            number=0,
            requests=np.full(sequences, _OWN, np.int64),
            incarnations=np.zeros(sequences, np.int64),
            heads=np.arange(sequences, dtype=np.int64),
            positions=np.full(sequences, context - 1, np.int64),
        )
        qkv = torch.zeros(sequences, shape.queries_per_group + 2, shape.head_dim, dtype=shape.torch_dtype)
        with torch.inference_mode():
            device.begin(step)
            for layer in range(shape.layers):
                wait(device.attend(layer, qkv))
            device.finish(0)
