"""What attention costs on the devices of one stage: coefficients, and their measurement when a device joins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, Pending
from hetis.runtime.attention.kv import KvShape, SequenceKey
from hetis.solver.dispatch.dispatch_problem import FloatArray, HeadShape, Stage

Piece = tuple[float, float, float]

_LEAST_S = 1e-9  # one tick of a clock: shorter times count as this
_OWN = 2**62  # id of the artificial request used to measure
LONGEST_CONTEXT = 512  # positions read: enough to see the cost of reading KV, and quickly filled
CONTEXTS = (16, 128, LONGEST_CONTEXT)
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
_POINT_S = 0.3  # a point gets no further rounds after this time: a large model on a slow device is slow enough
_PAUSES = 3.0  # multiple of a call's time after which its answer is surely there


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The coefficients of one device for one layer; see `hetis.solver.dispatch.dispatch_problem`."""

    pieces: tuple[Piece, ...]  # seconds per query head, per KV byte read and per call; the largest piece counts
    transfer_byte_s: float = 0.0  # seconds per byte exchanged with the primary
    transfer_s: float = 0.0  # seconds per exchange


def with_coefficients(stage: Stage, known: Mapping[str, Coefficients]) -> Stage:
    """Return ``stage`` with the costs of the ``known`` devices, by name. All others keep theirs."""
    every = [known.get(name) or _coefficients_of(stage, device) for device, name in enumerate(stage.devices)]
    most = max(len(one.pieces) for one in every)
    # A device with fewer pieces repeats one.
    costs = np.array([[*one.pieces, *[one.pieces[0]] * (most - len(one.pieces))] for one in every])
    return replace(
        stage,
        head_s=costs[:, :, 0],
        kv_byte_s=costs[:, :, 1],
        call_s=costs[:, :, 2],
        transfer_byte_s=np.array([one.transfer_byte_s for one in every]),
        transfer_s=np.array([one.transfer_s for one in every]),
    )


def scaled(stage: Stage, scales: FloatArray) -> Stage:
    """Return the stage with every device slower by its factor in ``scales``, shape [D], in attention and exchange."""
    pieces = {name: getattr(stage, name) * scales[:, None] for name in ("head_s", "kv_byte_s", "call_s")}
    exchange = {name: getattr(stage, name) * scales for name in ("transfer_byte_s", "transfer_s")}
    return replace(stage, **pieces, **exchange)


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


def _coefficients_of(stage: Stage, device: int) -> Coefficients:
    columns = (column[device].tolist() for column in (stage.head_s, stage.kv_byte_s, stage.call_s))
    return Coefficients(
        pieces=tuple(zip(*columns, strict=True)),
        transfer_byte_s=float(stage.transfer_byte_s[device]),
        transfer_s=float(stage.transfer_s[device]),
    )


def head_shape(*, groups: int, queries: int, head_dim: int, item_bytes: int, block_tokens: int) -> HeadShape:
    """Return the heads of a layer on one rank: ``groups`` of ``queries`` query heads."""
    return HeadShape(
        head_groups=groups,
        queries_per_group=queries,
        kv_bytes_per_token=2 * head_dim * item_bytes,
        # Each query head sends a query and receives an output; its group's key and value are sent once.
        exchange_bytes_per_head=(2 + 2 / queries) * head_dim * item_bytes,
        block_tokens=block_tokens,
    )


# --- measurement


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
    ``matrix``: shape [samples, columns]; ``values``: shape [samples].
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The calibration of one device."""

    # Coefficients of its attention and its exchange. Only their sum was measured; the time of copies out of the device
    # how it divides between the two.
    coefficients: Coefficients
    copy_byte_s: float  # seconds per byte of KV copied out of it
    read_s: float  # seconds to read an answer that is already there

    def weighted(self, share: float) -> Calibration:
        """Return the calibration for a stage with this share of the layers, and of the bytes of every copy."""
        own = self.coefficients
        return replace(
            self,
            coefficients=Coefficients(
                pieces=tuple((share * a, share * b, share * c) for a, b, c in own.pieces),
                transfer_byte_s=share * own.transfer_byte_s,
                transfer_s=share * own.transfer_s,
            ),
            copy_byte_s=share * self.copy_byte_s,
        )


def calibrate(
    device: AttentionDevice,
    *,
    groups: int,
    exchange_bytes_per_head: float,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> Calibration | None:
    """Return the calibration of a worker, or None if it has too few pages to be measured.

    It must be idle, and is again afterwards. Raises DeviceLostError if the device failed.

    Args:
        groups: KV heads of the model.
        exchange_bytes_per_head: bytes exchanged between the primary and the worker, per query head.
        clock: returns seconds.
        pause: sleeps for a number of seconds.
    """
    measuring = _Measuring(device, clock, pause)
    wanted = [(count, context) for count in (1, groups, 4 * groups) for context in CONTEXTS]
    points = [(n, context) for n, context in wanted if n * device.shape.pages(context) <= device.num_pages]
    calls: list[TimedCall] = []
    read_s = copy_byte_s = copy_s = 0.0
    for sequences, context in points:
        try:
            calls.append(measuring.call(sequences, context))
            if len(calls) == len(points):
                read_s = measuring.read_s(sequences, context, calls[-1].seconds)
                copy_byte_s, copy_s = measuring.copy(sequences, context)
        finally:
            device.drop([SequenceKey(_OWN, 0, head) for head in range(sequences)])
    if not calls:
        return None
    whole = Coefficients(pieces=(fit_calls(calls),))
    own = with_exchange(whole, exchange_bytes_per_head, byte_s=copy_byte_s, copy_s=copy_s)
    return Calibration(coefficients=own, copy_byte_s=copy_byte_s, read_s=read_s)


def with_exchange(whole: Coefficients, bytes_per_head: float, *, byte_s: float, copy_s: float) -> Coefficients:
    """Return the total cost of calls, divided into attention and an exchange as fast as copies are.

    Args:
        whole: coefficients of one piece, without an exchange.
        bytes_per_head: bytes that a query head exchanges.
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


class _Measuring:
    """One device and timed calls to it."""

    def __init__(self, device: AttentionDevice, clock: Callable[[], float], pause: Callable[[float], None]) -> None:
        self._device, self._clock, self._pause = device, clock, pause

    def call(self, sequences: int, context: int) -> TimedCall:
        """Fill the sequences and measure steps over them."""
        shape = self._device.shape
        kv = torch.zeros(sequences, shape.layers, context - 1, shape.head_dim, dtype=shape.torch_dtype)
        self._device.adopt(_OWN, 0, list(range(sequences)), 0, kv, kv)
        begun_s = self._clock()
        self._step(sequences, context)  # pays for what is compiled or allocated once
        seconds: list[float] = []
        while len(seconds) < _LEAST_ROUNDS or (len(seconds) < _MOST_ROUNDS and self._clock() - begun_s < _POINT_S):
            seconds.append(self._step(sequences, context))
        return TimedCall(
            heads=sequences * shape.queries_per_group,
            kv_bytes=float(sequences * context) * token_bytes(shape),
            seconds=median(seconds),
        )

    def read_s(self, sequences: int, context: int, call_s: float) -> float:
        """Return the seconds to read an answer that was there before it was requested."""
        seconds: list[float] = []

        def wait(pending: Pending) -> None:
            self._pause(_PAUSES * call_s)
            requested_s = self._clock()
            pending.wait()
            seconds.append(self._clock() - requested_s)

        while len(seconds) < _LEAST_ROUNDS:
            self._step(sequences, context, wait=wait)
        return median(seconds)

    def copy(self, sequences: int, context: int) -> tuple[float, float]:
        """Return the seconds per byte, and per copy, of KV that leaves the device."""
        heads, shape = list(range(sequences)), self._device.shape
        seconds, sizes = [], []
        for last in (1, context - 1):
            times = []
            for _ in range(_LEAST_ROUNDS):
                begun_s = self._clock()
                self._device.export(_OWN, 0, heads, 0, last)
                times.append(self._clock() - begun_s)
            seconds.append(median(times))
            sizes.append(sequences * shape.layers * last * token_bytes(shape))
        byte_s = max(seconds[1] - seconds[0], 0.0) / (sizes[1] - sizes[0])
        return byte_s, max(seconds[0] - byte_s * sizes[0], 0.0)

    def _step(
        self, sequences: int, context: int, *, wait: Callable[[Pending], object] = lambda pending: pending.wait()
    ) -> float:
        """Make a step and return the seconds of a layer."""
        shape = self._device.shape
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
            begun_s = self._clock()
            self._device.begin(step)
            for layer in range(shape.layers):
                wait(self._device.attend(layer, qkv))
            taken_s = self._clock() - begun_s
            self._device.finish(0)
        return taken_s / shape.layers


def token_bytes(shape: KvShape) -> int:
    """Return the bytes of K and V of one position of a virtual sequence in one layer."""
    return 2 * shape.head_dim * shape.item_bytes
