"""An attention worker: frames in and out without sockets, and the loop around it that serves one engine at a time.

It obeys one engine at a time, the one that started last. Engines say their age, by which a worker knows when each
started, on the clock of its host's uptime: neither a jump of the wall clock nor sleep makes a new engine look old. An
engine that another has followed is over, whatever age it claims (a virtual machine that was paused does not know how
old it is).

A HELLO that is accepted starts empty: the KV of an earlier connection is void. Frames of another connection, or of a
step other than the one begun, are refused. So is KV of a request's earlier incarnation if a later one is here.

The failure of a frame without an answer (BEGIN, ADOPT, DROP) is reported in the next answer, before which nothing
counts anyway.

The loop listens, and lets a newer engine take over. Until it has shown the key, a connection may be anybody's: it must
hold up neither the engine that is served nor one that joins. Its handshake is read as it arrives, without waiting.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import time
from collections.abc import Callable, Sequence

import torch

from hetis.runtime.attention.device import LocalDevice
from hetis.runtime.attention.kv import KvShape, OutOfPagesError, UnknownSequenceError
from hetis.runtime.transport.channel import Channel, Handshake
from hetis.runtime.transport.frames import (
    ChannelError,
    ErrorCode,
    Frame,
    FrameError,
    FrameKind,
    Hello,
    error_answer,
    pack_welcome,
    read_adopted,
    read_keys,
    read_part,
    read_queries,
    read_step,
    stale_answer,
    uptime_s,
)

MakeDevice = Callable[[KvShape], LocalDevice]
_ANSWERED = frozenset({FrameKind.HELLO, FrameKind.ATTEND, FrameKind.EXPORT, FrameKind.PING})
MOST = 64  # maximum number of connections whose handshake is incomplete; the oldest makes room
AGAIN_S = 0.01  # wait after a connection that could not be accepted
LOOK_S = 0.1  # interval between checks for another engine, whether or not this one is busy
IDLE_S = 1.0  # interval between checks while there is none
MEMORY_S = 0.005  # the same while a handshake comes through shared memory, which no poll shows
_log = logging.getLogger(__name__)


class WorkerCore:
    """The state of one worker."""

    def __init__(
        self, name: str, make_device: MakeDevice, *, key: bytes, clock: Callable[[], float] = uptime_s
    ) -> None:
        self.name = name
        self.epoch = 0  # the engine that it obeys, or obeyed last
        self.device: LocalDevice | None = None  # pages of the engine's shape. None before the first HELLO.
        self._make_device, self._key, self._clock = make_device, key, clock
        self._started_s = -math.inf  # when that engine started
        self._over: set[int] = set()  # engines that another has followed
        self._session = 0
        self._step: tuple[int, int] | None = None  # number and rows of the step that was begun
        self._incarnations: dict[int, int] = {}
        self._failed: Exception | None = None  # failure of a frame without an answer

    def handle(self, frame: Frame, *, challenge: bytes = b"") -> Frame | None:
        """Carry out one frame, and return the answer if its kind has one. Raises FrameError if the frame is not valid
        here; then the connection must be closed, and its KV is void. ``challenge``: what a HELLO must answer.
        """
        if frame.kind is FrameKind.HELLO:
            return self._hello(frame, challenge)
        if (frame.epoch, frame.session) != (self.epoch, self._session):
            return self._stale(frame) if frame.kind in _ANSWERED else None
        assert self.device is not None, "a session has a device"
        try:
            return self._obey(frame, self.device)
        except FrameError:
            raise
        except Exception as error:
            if not isinstance(error, OutOfPagesError | UnknownSequenceError):
                _log.exception("%s: %s failed", self.name, frame.kind.name)
            if frame.kind in _ANSWERED:
                return self._refusal(frame, error)
            self._failed = self._failed or error
            return None

    def encrypt(self, channel: Channel, frame: Frame) -> None:
        """Encrypt the channel if the HELLO that was accepted over it requests so. Raises FrameError."""
        hello = Hello.read(frame)
        if hello.is_encrypted:
            assert channel.own is not None, "a HELLO without a challenge is refused"
            channel.encrypt(channel.own, "worker", hello.nonce, self._key)

    def leave(self) -> None:
        """Drop the KV of a connection that ended."""
        self._session = 0
        self._forget()

    def _hello(self, frame: Frame, challenge: bytes) -> Frame:
        hello = Hello.read(frame)
        if not challenge or not Hello.is_proved(frame, key=self._key, challenge=challenge):
            return error_answer(frame, ErrorCode.REFUSED, f"{self.name}: the key is another worker's, or an old one")
        started_s = self._clock() - hello.age_s
        if frame.epoch != self.epoch and (frame.epoch in self._over or started_s < self._started_s):
            return self._stale(frame)
        if self.device is None or self.device.shape != hello.shape:
            self.device, self._session = None, 0  # free before allocating
            try:
                self.device = self._make_device(hello.shape)
            except (RuntimeError, MemoryError, ValueError) as error:  # ValueError: numpy's, if the size is too large
                why = f"no memory for its KV: {str(error).splitlines()[0]}"
                _log.error("%s: %s", self.name, why)
                return error_answer(frame, ErrorCode.FAILED, why)
        self._forget()
        if frame.epoch != self.epoch:
            self._over.add(self.epoch)
            self.epoch, self._started_s = frame.epoch, started_s
        self._started_s = min(self._started_s, started_s)  # a HELLO that takes its time makes an engine look younger
        self._session = frame.session
        welcome = pack_welcome(self.device.num_pages, self.name, key=self._key, nonce=hello.nonce)
        return frame.answered(FrameKind.WELCOME, parts=welcome)

    def _forget(self) -> None:
        self._step, self._failed = None, None
        self._incarnations.clear()
        if self.device is not None:
            self.device.drop(self.device.pool.sequences)

    def _obey(self, frame: Frame, device: LocalDevice) -> Frame | None:
        match frame.kind:
            case FrameKind.ATTEND:
                return self._attend(frame, device)
            case FrameKind.BEGIN:
                self._step = None
                step = read_step(frame)
                device.begin(step)
                self._step = step.number, step.num_rows
            case FrameKind.FINISH | FrameKind.ABORT:
                self._step = None
                if frame.kind is FrameKind.ABORT:
                    self._failed = None  # the engine knows, and repeats the step
                device.abort(frame.step)
            case FrameKind.DROP:
                device.drop(keys := read_keys(frame))
                for request in {key.request for key in keys} - {key.request for key in device.pool.sequences}:
                    self._incarnations.pop(request, None)
            case FrameKind.ADOPT:
                self._adopt(frame, device)
            case FrameKind.EXPORT:
                self._raise_failed()
                part = read_part(frame)
                k, v = device.export(part.request, part.incarnation, part.heads, part.first, part.last)
                counts = len(part.heads), part.last - part.first, 0
                return frame.answered(FrameKind.KV, counts=counts, dtype=device.shape.dtype, parts=(k, v))
            case FrameKind.PING:
                numbers = torch.tensor([device.pool.free_pages, len(device.pool)], dtype=torch.int64)
                return frame.answered(FrameKind.PONG, parts=(numbers,))
            case _:
                raise FrameError(f"{frame.kind.name} is not for a worker")
        return None

    def _attend(self, frame: Frame, device: LocalDevice) -> Frame:
        self._raise_failed()
        if self._step is None or self._step[0] != frame.step:
            raise UnknownSequenceError(self.name, f"step {frame.step} was not begun")
        out = device.attend_received(frame.layer, read_queries(frame, device.shape, self._step[1]))
        return frame.answered(FrameKind.OUT, counts=(len(out), 0, 0), dtype=device.shape.dtype, parts=(out,))

    def _adopt(self, frame: Frame, device: LocalDevice) -> None:
        part, k, v = read_adopted(frame, device.shape)
        newest = self._incarnations.get(part.request, part.incarnation)
        if part.incarnation < newest:
            why = f"request {part.request} is at incarnation {newest}, {part.incarnation} is void"
            raise UnknownSequenceError(self.name, why)
        if part.incarnation > newest:
            device.drop([key for key in device.pool.sequences if key.request == part.request])
        self._incarnations[part.request] = part.incarnation
        device.adopt(part.request, part.incarnation, part.heads, part.first, k, v)

    def _raise_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _refusal(self, frame: Frame, error: Exception) -> Frame:
        if isinstance(error, OutOfPagesError):
            return error_answer(frame, ErrorCode.OUT_OF_PAGES, str(error), needed=error.needed, free=error.free)
        code = ErrorCode.UNKNOWN_SEQUENCE if isinstance(error, UnknownSequenceError) else ErrorCode.FAILED
        return error_answer(frame, code, f"{type(error).__name__}: {error}")

    def _stale(self, frame: Frame) -> Frame:
        return stale_answer(frame, self.name, current=self.epoch)


class PendingConnections:
    """Accepts connections, and returns those whose handshake is complete. It waits for none of them in particular."""

    def __init__(self, listener: socket.socket, *, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Initialise. A connection whose handshake takes longer than ``stall_s`` in all is closed."""
        listener.setblocking(False)
        self._listener, self._stall_s, self._clock = listener, stall_s, clock
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._pending: dict[int, tuple[Handshake, float]] = {}  # with its deadline, by file descriptor; oldest first
        self._said = ""  # last logged reason why no connection is accepted

    def __len__(self) -> int:
        """Return the number of connections whose handshake is incomplete."""
        return len(self._pending)

    def close(self) -> None:
        """Close all of them."""
        for number in list(self._pending):
            self._take(number).close()

    def completed(self, timeout_s: float) -> list[tuple[Channel, Frame]]:
        """Return the channels whose handshake is complete, oldest first, and its frames. Wait at most ``timeout_s`` for
        anything to arrive.
        """
        if any(handshake.is_attached for handshake, _ in self._pending.values()):
            timeout_s = min(timeout_s, MEMORY_S)
        ready = {number for number, _ in self._poll.poll(timeout_s * 1000)}
        # First, because one whose handshake has become complete must not make room for newcomers.
        found = self._read(list(self._pending))
        if self._listener.fileno() in ready:
            found += self._let_in()
        now_s = self._clock()
        for late in [number for number, (_, until_s) in self._pending.items() if until_s <= now_s]:
            handshake = self._take(late)
            _log.warning("a connection came to nothing: %s: no handshake within %g s", handshake.name, self._stall_s)
            handshake.close()
        return found

    def _read(self, numbers: Sequence[int]) -> list[tuple[Channel, Frame]]:
        found = []
        for number in numbers:
            handshake, _ = self._pending[number]
            try:
                came = handshake.read()
            except ChannelError as error:
                _log.warning("a connection came to nothing: %s", error)
                self._take(number)
                continue
            if came is not None:
                self._take(number)
                found.append(came)
        return found

    def _let_in(self) -> list[tuple[Channel, Frame]]:
        found = []
        for _ in range(MOST):  # the others wait, and so do not hold up the engine that is served
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError as error:  # no free file descriptor, for example: there may be one later
                if str(error) != self._said:  # log once while the reason stays the same: the attempt is repeated often
                    self._said = str(error)
                    _log.warning("no connection is taken: %s", error.strerror or error)
                time.sleep(AGAIN_S)
                break
            self._said = ""
            try:
                handshake = Handshake(connection, stall_s=self._stall_s)
            except ChannelError as error:
                _log.warning("a connection came to nothing: %s", error)
                continue
            if len(self._pending) == MOST:
                self._make_room()
            number = connection.fileno()
            self._pending[number] = handshake, self._clock() + self._stall_s
            self._poll.register(number, select.POLLIN)
            found += self._read([number])
        return found

    def _make_room(self) -> None:
        """Close the oldest connection, and those over shared memory last: only this user's processes have them."""
        self._take(min(self._pending, key=lambda number: self._pending[number][0].is_attached)).close()

    def _take(self, number: int) -> Handshake:
        handshake, _ = self._pending.pop(number)
        self._poll.unregister(number)
        return handshake


class WorkerLoop:
    """Runs a core over the connections that arrive at ``listener``. Each begins with a HELLO."""

    def __init__(
        self,
        core: WorkerCore,
        listener: socket.socket,
        *,
        stall_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self._pending = PendingConnections(listener, stall_s=stall_s)
        self._channel: Channel | None = None
        self._clock = clock
        self._looked_s = -math.inf  # when it last checked for another engine

    def run(self) -> None:
        """Serve until the process is ended."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Handle one frame or some connections, or wait briefly."""
        if self._channel is None:
            self._take_newcomers(IDLE_S)
            return
        try:
            frame = self._channel.receive(LOOK_S)
            if frame is not None and frame.kind is FrameKind.BYE:
                self._leave("it said goodbye")
            elif frame is not None and (answer := self.core.handle(frame)) is not None:
                self._channel.send([answer])
        except ChannelError as error:
            self._leave(str(error))
        if self._clock() - self._looked_s >= LOOK_S:
            self._take_newcomers(0.0)

    def _take_newcomers(self, wait_s: float) -> None:
        """Check for another engine, which is obeyed if it has the right key and started later than this one."""
        self._looked_s = self._clock()
        for channel, hello in self._pending.completed(wait_s):
            self._take_newcomer(channel, hello)

    def _take_newcomer(self, channel: Channel, hello: Frame) -> None:
        try:
            is_hello = hello.kind is FrameKind.HELLO
            challenge = b"" if channel.own is None else channel.own.nonce
            answer = self.core.handle(hello, challenge=challenge) if is_hello else None
            if answer is not None:
                channel.send([answer])
                if answer.kind is not FrameKind.ERROR:
                    self.core.encrypt(channel, hello)
        except ChannelError as error:
            _log.warning("%s: a connection came to nothing: %s", self.core.name, error)
            channel.close()
            return
        if answer is None or answer.kind is FrameKind.ERROR:
            if answer is not None:
                _log.warning("%s: refused an engine: %s", self.core.name, ErrorCode(answer.counts[0]).name)
            channel.close()
            return
        if self._channel is not None:
            self._channel.close()
        channel.trust()
        self._channel = channel
        _log.info("%s: serves %s, epoch %d", self.core.name, channel.name, self.core.epoch)

    def _leave(self, why: str) -> None:
        assert self._channel is not None, "there was a connection"
        _log.info("%s: %s ended: %s", self.core.name, self._channel.name, why)
        self._channel.close()
        self._channel = None
        self.core.leave()
