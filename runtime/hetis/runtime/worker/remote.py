"""Attention workers as the engine sees them: each an `AttentionDevice` behind a channel.

`join_at` is all that an engine needs of this package:

    device = join_at("w0", "10.0.0.2", 7070, key, shape, epoch=secrets.randbits(63), age_s=0.0)
    device.num_pages                                      # each of shape.page_bytes, for one virtual sequence
    device.begin(DeviceStep(epoch=e, number=n, requests=[...], incarnations=[...], heads=[...],
                            positions=first, counts=counts))    # [N]; counts None: one position each
    pending = device.attend(layer, qkv)                   # [T, r + 2, d], rows in the step's order; returns at once
    out = pending.wait()                                  # [T, r, d]; wait for one layer before requesting the next
    device.finish(n)                                      # or abort(n): the same positions may begin again
    device.drop([SequenceKey(request, incarnation, head)])    # frees pages; `adopt` and `export` move KV
    device.ping()                                         # between steps: free pages, sequences
    device.close()

A worker serves one connection, that of the engine which started last. An engine is known by its epoch, drawn at random
when it starts. It may connect again, and takes over from older engines; it finds the worker empty each time. Engines
that are older than the last one, or were followed by another, are refused. `begin` has no answer: `wait` raises
OutOfPagesError for too few pages and UnknownSequenceError for an unknown sequence, after which `abort` restores the
device but for the pages already allocated. Every other failure is a DeviceLostError, and everything on the device is
gone: join again. Nothing here is thread-safe.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from hetis.runtime.attention.device import DeviceStep
from hetis.runtime.attention.kv import (
    DeviceLostError,
    KvShape,
    OutOfPagesError,
    SequenceKey,
    StaleEpochError,
    UnknownSequenceError,
    UnreachedDeviceError,
)
from hetis.runtime.transport.channel import Channel, ChannelKind, connect
from hetis.runtime.transport.encryption import ConnectionKey
from hetis.runtime.transport.frames import (
    ChannelError,
    ErrorCode,
    Frame,
    FrameError,
    FrameKind,
    Hello,
    KvRange,
    Numbers,
    pack_keys,
    pack_step,
    read_error,
    read_kv,
    read_nonce,
    read_outputs,
    read_pong,
    read_welcome,
)

T = TypeVar("T")


class RemoteDevice:
    """One worker, for the lifetime of one channel. Frames without an answer wait for the next frame that has one.

    Attributes:
        num_pages: number of pages that the worker has memory for.
    """

    def __init__(
        self,
        name: str,
        shape: KvShape,
        channel: Channel,
        *,
        epoch: int,
        key: bytes,
        age_s: float = 0.0,
        timeout_s: float = 10.0,
        encrypts: bool = False,
    ) -> None:
        """Greet the worker, and encrypt what follows if ``encrypts``, but for shared memory. A worker that owes an
        answer for ``timeout_s`` is lost. Raises DeviceLostError if it does not answer, or refuses the key, and
        StaleEpochError if it obeys a later engine.
        """
        self.name, self.shape = name, shape
        # The channel failed. Every call then raises `DeviceLostError`, except `abort` and `drop`, which have nothing
        # left to do.
        self.is_lost = False
        self._channel, self._timeout_s = channel, timeout_s
        self._epoch, self._session = epoch, secrets.randbits(63)  # drawn at random to be unique
        self._serial = 0  # serial of the last frame
        self._queued: list[Frame] = []
        self._owed = 0  # serial of the last request whose answer has not been read; 0: none
        self._step: DeviceStep | None = None
        challenge = self._read(self._answer(self._ask(self._frame(FrameKind.CHALLENGE))), read_nonce)
        own, is_encrypted = ConnectionKey(), encrypts and not channel.is_shared
        hello = Hello(shape=shape, nonce=own.nonce, age_s=age_s, is_encrypted=is_encrypted)
        frame = hello.frame(epoch=epoch, session=self._session, key=key, challenge=challenge)
        answer = self._answer(self._ask(frame))
        self.num_pages = self._read(answer, lambda frame: read_welcome(frame, key=key, nonce=hello.nonce))
        if is_encrypted:
            channel.encrypt(own, "engine", challenge, key)

    # --- a step

    def begin(self, step: DeviceStep) -> None:
        self._check_here()
        self._step, counts = step, (len(step), step.num_rows, 0)
        self._queued.append(self._frame(FrameKind.BEGIN, step=step.number, counts=counts, parts=pack_step(step)))

    def attend(self, layer: int, qkv: torch.Tensor) -> _Outputs:
        assert self._step is not None, "a step was begun"
        number, counts, dtype = self._step.number, (len(qkv), 0, 0), self.shape.dtype
        frame = self._frame(FrameKind.ATTEND, step=number, layer=layer, counts=counts, dtype=dtype, parts=(qkv,))
        return _Outputs(self, self._ask(frame), counts[0])

    def finish(self, number: int) -> None:
        self._step = None
        self._queued.append(self._frame(FrameKind.FINISH, step=number))

    def abort(self, number: int) -> None:
        self._step = None
        if self.is_lost:
            return
        self._queued.append(self._frame(FrameKind.ABORT, step=number))
        # Read what is still in flight: a worker that cannot deliver its answers accepts no more frames.
        if self._owed:
            self._answer(self._owed)

    # --- KV

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        if self.is_lost or not keys:
            return
        self._send(self._frame(FrameKind.DROP, counts=(len(keys), 0, 0), parts=(pack_keys(keys),)))

    def export(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = KvRange(request, incarnation, first, last, tuple(heads))
        wanted = self._frame(FrameKind.EXPORT, counts=(len(heads), 0, 0), parts=(part.numbers(),))
        return self._read(self._answer(self._ask(wanted)), lambda frame: read_kv(frame, self.shape, part))

    def adopt(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._check_here()
        positions, dtype = k.shape[2], self.shape.torch_dtype
        part = KvRange(request, incarnation, first, first + positions, tuple(heads))
        parts = (part.numbers(), k.to(dtype), v.to(dtype))
        self._send(self._frame(FrameKind.ADOPT, counts=(len(heads), positions, 0), dtype=self.shape.dtype, parts=parts))

    # --- connection

    def ping(self) -> tuple[int, int]:
        """Return, between two steps, the worker's free pages and number of sequences. Raises DeviceLostError."""
        return self._read(self._answer(self._ask(self._frame(FrameKind.PING))), read_pong)

    def close(self) -> None:
        """Say goodbye. The worker forgets what it holds and waits for the next engine."""
        if not self.is_lost:
            self.is_lost = True
            with contextlib.suppress(ChannelError):  # it is gone already, which is as good
                self._channel.send([*self._queued, self._frame(FrameKind.BYE)])
            self._channel.close()

    def _frame(
        self,
        kind: FrameKind,
        *,
        step: int = 0,
        layer: int = 0,
        counts: tuple[int, int, int] = (0, 0, 0),
        dtype: str = "",
        parts: tuple[Numbers, ...] = (),
    ) -> Frame:
        """Return a frame of this connection with a serial of its own. See `Frame` for the arguments."""
        self._serial += 1
        return Frame(kind, self._epoch, self._session, self._serial, step, layer, counts, dtype, parts)

    def _ask(self, frame: Frame) -> int:
        """Send a frame that has an answer, and return the serial of that answer."""
        self._check_here()
        self._owed = frame.serial
        self._send(frame)
        return frame.serial

    def _send(self, frame: Frame) -> None:
        frames, self._queued = [*self._queued, frame], []
        try:
            self._channel.send(frames)
        except ChannelError as error:
            raise self._lose(error) from error

    def _answer(self, serial: int) -> Frame:
        """Return the answer to one request. Answers to earlier requests, which are no longer wanted, are skipped."""
        self._check_here()
        while True:
            try:
                frame = self._channel.receive(self._timeout_s)
                if frame is None:
                    raise self._lose(f"no answer within {self._timeout_s:g} s")
                if (frame.epoch, frame.session) != (self._epoch, self._session) or frame.serial > serial:
                    raise FrameError(f"an answer of epoch {frame.epoch}, which is not of this connection")
            except ChannelError as error:
                raise self._lose(error) from error
            if frame.serial == serial:
                break
        if self._owed == serial:
            self._owed = 0
        if frame.kind is FrameKind.ERROR:
            raise self._error(frame)
        return frame

    def _read(self, frame: Frame, read: Callable[[Frame], T]) -> T:
        try:
            return read(frame)
        except FrameError as error:
            raise self._lose(error) from error

    def _error(self, frame: Frame) -> Exception:
        needed, free, text = self._read(frame, read_error)
        match frame.counts[0]:
            case ErrorCode.OUT_OF_PAGES:
                return OutOfPagesError(self.name, needed=needed, free=free)
            case ErrorCode.UNKNOWN_SEQUENCE:
                return UnknownSequenceError(self.name, text)
            case ErrorCode.STALE_EPOCH:
                self._lose(text)
                return StaleEpochError(self.name, epoch=needed, current=free)
        return self._lose(text)

    def _lose(self, why: object) -> DeviceLostError:
        self.is_lost = True
        self._channel.close()
        return DeviceLostError(self.name, str(why))

    def _check_here(self) -> None:
        if self.is_lost:
            raise DeviceLostError(self.name, "it was lost")


class _Outputs(NamedTuple):
    """Outputs of one layer that a worker is computing."""

    device: RemoteDevice
    serial: int
    rows: int

    def wait(self) -> torch.Tensor:
        device, rows = self.device, self.rows
        return device._read(device._answer(self.serial), lambda frame: read_outputs(frame, device.shape, rows))


def join_at(
    name: str,
    host: str,
    port: int,
    key: bytes,
    shape: KvShape,
    *,
    epoch: int,
    age_s: float = 0.0,
    kind: ChannelKind = ChannelKind.AUTO,
    timeout_s: float = 10.0,
    encrypts: bool = False,
) -> RemoteDevice:
    """Return the worker that listens at ``host``, ``port`` as an empty device. What it held for others is gone.

    Args:
        host, port: as passed to `hetis-worker --listen`, or in its port file.
        key: the worker's key, from `hetis.runtime.transport.keys.read_key`.
        shape: that of the virtual sequences; the worker reallocates its pages if it differs from the previous one.
        epoch: this engine, by a number that it drew when it started.
        age_s: time since then.
        kind: the kind of channel; ``AUTO`` is shared memory on one host and TCP between hosts.
        timeout_s: a worker that owes an answer for this long is lost.
        encrypts: whether KV that leaves this host is encrypted.

    Raises:
        UnreachedDeviceError: there is no connection, or this process has no free file descriptors for one.
        DeviceLostError: it does not answer, has no memory for this KV, or has another key.
        StaleEpochError: it obeys a later engine.
    """
    try:
        channel = connect(host, port, kind, stall_s=timeout_s)
    except (ChannelError, OSError) as error:
        is_ours = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        raise (UnreachedDeviceError if is_ours else DeviceLostError)(name, str(error)) from error
    return RemoteDevice(name, shape, channel, epoch=epoch, key=key, age_s=age_s, timeout_s=timeout_s, encrypts=encrypts)
