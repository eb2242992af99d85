"""Measures the cost of attention on each device of an idle stage, for a few numbers of heads and context lengths.

A device in another process computes while the engine does something else, and its answer may have been there for long
when the engine asks for it. Then only an upper bound is known: it took no longer than until that moment. `Taken` is
therefore an interval. Coefficients are fitted to measured calls by least squares, under which more work never takes
less time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, IntArray, Pending, Ready
from hetis.runtime.attention.kv import KvShape, SequenceKey
from hetis.solver.dispatch.problem import Stage

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


FloatArray = npt.NDArray[np.float64]
Piece = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The coefficients of one device for one layer; see `hetis.solver.dispatch.problem`.

    Attributes:
        pieces: seconds per query head, per KV byte read and per call; the largest piece counts.
        transfer_byte_s: seconds per byte exchanged with the primary.
        transfer_s: seconds per exchange.
    """

    pieces: tuple[Piece, ...]
    transfer_byte_s: float = 0.0
    transfer_s: float = 0.0


def with_coefficients(stage: Stage, known: Mapping[str, Coefficients]) -> Stage:
    """Return ``stage`` with the costs of the ``known`` devices, by name. All others keep theirs."""
    pieces = [
        known[name].pieces if name in known else tuple(map(tuple, _rows(stage, i)))
        for i, name in enumerate(stage.devices)
    ]
    most = max(map(len, pieces))
    # A device with fewer pieces repeats one.
    costs = np.array([[*own, *[own[0]] * (most - len(own))] for own in pieces])
    transfer = [
        (known[name].transfer_byte_s, known[name].transfer_s)
        if name in known
        else (stage.transfer_byte_s[i], stage.transfer_s[i])
        for i, name in enumerate(stage.devices)
    ]
    return replace(
        stage,
        head_s=costs[:, :, 0],
        kv_byte_s=costs[:, :, 1],
        call_s=costs[:, :, 2],
        transfer_byte_s=np.array([each[0] for each in transfer]),
        transfer_s=np.array([each[1] for each in transfer]),
    )


def scaled(stage: Stage, scales: FloatArray) -> Stage:
    """Return the stage with every device slower by its factor in ``scales``, shape [D], in attention and exchange
    alike.
    """
    return replace(
        stage,
        head_s=stage.head_s * scales[:, None],
        kv_byte_s=stage.kv_byte_s * scales[:, None],
        call_s=stage.call_s * scales[:, None],
        transfer_byte_s=stage.transfer_byte_s * scales,
        transfer_s=stage.transfer_s * scales,
    )


def device_seconds(stage: Stage, heads: FloatArray, kv_bytes: FloatArray) -> FloatArray:
    """Return the seconds per layer of every device for its query heads and the KV bytes they read, all of shape [D].

    A device without heads takes 0. The primary exchanges nothing with itself; if it has several GPUs, its heads and
    bytes are those of one GPU.
    """
    pieces = stage.head_s * heads[:, None] + stage.kv_byte_s * kv_bytes[:, None] + stage.call_s
    away = np.ones(len(heads))
    if stage.primary is not None:
        away[stage.primary.device] = 0.0
    exchange = stage.transfer_byte_s * stage.heads.exchange_bytes_per_head * heads + stage.transfer_s
    seconds: FloatArray = np.where(heads > 0, pieces.max(axis=1) + away * exchange, 0.0)
    return seconds


def _rows(stage: Stage, device: int) -> list[tuple[float, float, float]]:
    columns = (stage.head_s[device], stage.kv_byte_s[device], stage.call_s[device])
    return [(float(a), float(b), float(c)) for a, b, c in zip(*columns, strict=True)]


_LEAST_S = 1e-9  # a clock's tick: shorter times count as this


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedCall:
    """One layer's attention as measured: query heads, KV bytes that they read, seconds."""

    heads: float
    kv_bytes: float
    seconds: float


def fit_calls(calls: Sequence[TimedCall]) -> Piece:
    """Fit ``a heads + b kv_bytes + c`` with a, b, c >= 0 (Hetis, SC'25). All are 0 if nothing was measured.

    Errors are relative to the measurement, so short calls count as much as long ones.
    """
    if not calls:
        return 0.0, 0.0, 0.0
    matrix = np.array([[call.heads, call.kv_bytes, 1.0] for call in calls])
    seconds = np.maximum([call.seconds for call in calls], _LEAST_S)
    scale = matrix.max(axis=0)
    a, b, c = nonnegative_fit(matrix / scale / seconds[:, None], np.ones(len(calls))) / scale
    return float(a), float(b), float(c)


def nonnegative_fit(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """Return the least squares coefficients >= 0, by trying every subset of the columns, of which there are three.

    Args:
        matrix: shape [samples, columns].
        values: shape [samples].
    """
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(values @ values)
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            found = np.linalg.lstsq(matrix[:, chosen], values, rcond=None)[0]
            error = float(np.square(matrix[:, chosen] @ found - values).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(columns), error
                best[chosen] = found
    return best


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
