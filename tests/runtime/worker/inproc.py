"""Workers in the tests' process: a core behind a channel, run while the engine waits, with faults on demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from hetis.runtime.attention.device import LocalDevice
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.transport.channel import Channel
from hetis.runtime.transport.frames import ChannelError, Frame, FrameKind, Hello, bytes_of, header_of
from hetis.runtime.worker.core import WorkerCore
from hetis.runtime.worker.remote import RemoteDevice
from tests.runtime.transport.inproc import InprocPipe

KEY, CHALLENGE = bytes(range(32)), bytes(range(32, 64))


def hello(shape: KvShape, *, epoch: int, session: int) -> Frame:
    """Return a HELLO as it arrives at a worker that has sent `CHALLENGE`."""
    frame = Hello(shape=shape, nonce=bytes(32)).frame(epoch=epoch, session=session, key=KEY, challenge=CHALLENGE)
    body = b"".join(bytes(bytes_of(part)) for part in frame.parts)
    return frame._replace(parts=(np.frombuffer(bytearray(body), np.uint8),))


class Fault(StrEnum):
    """A fault of a worker in place of one frame."""

    KILL = "kill"  # dies before it handles the frame
    KILL_AFTER = "kill_after"  # dies after it has handled the frame, before the answer
    STOP = "stop"  # answers no more
    RESET = "reset"  # loses the connection, but lives on
    HALF = "half"  # sends half of an answer, and the rest never
    ZOMBIE = "zombie"  # stops, and resumes after the engine has given it up


@dataclass(slots=True, eq=False)
class InprocWorker:
    """One worker. It handles frames while its engine waits, until ``fault`` happens at frame ``fault_at``."""

    name: str
    pages: int
    fault: Fault | None = None
    fault_at: int = -1
    handled: list[FrameKind] = field(default_factory=list)
    has_failed: bool = False
    now_s: float = 1000.0  # the worker's clock
    is_running: bool = True
    core: WorkerCore = field(init=False)
    _pipe: InprocPipe | None = None
    _channel: Channel | None = None

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start a new process, which holds nothing."""
        self.is_running = True
        self.core = WorkerCore(
            self.name, lambda shape: LocalDevice(self.name, shape, self.pages), key=KEY, clock=lambda: self.now_s
        )

    def join(self, shape: KvShape, *, epoch: int = 1, age_s: float = 0.0) -> RemoteDevice:
        ours, theirs = InprocPipe.pair(self.name)
        if self._channel is not None:
            self._channel.close()
        self._pipe, self._channel = theirs, Channel(theirs)
        channel = self._channel
        ours.idle = lambda: self.run(channel, theirs)
        return RemoteDevice(self.name, shape, Channel(ours), epoch=epoch, key=KEY, age_s=age_s)

    def run(self, channel: Channel, pipe: InprocPipe) -> None:
        """Handle every frame that has arrived."""
        while self.is_running and not pipe.is_closed:
            try:
                frame = channel.receive(0)
                if frame is None:
                    return
                if frame.kind is FrameKind.CHALLENGE:
                    nonce = np.frombuffer(CHALLENGE, np.uint8)
                    channel.send([frame.answered(FrameKind.NONCE, parts=(nonce,))])
                    continue
                self.handled.append(frame.kind)
                if len(self.handled) - 1 == self.fault_at and self.fault is not None:
                    self._fail(self.fault, frame, channel, pipe)
                    return
                self._handle(frame, channel)
            except ChannelError:
                self._leave(channel)

    def wake(self) -> None:
        """Resume a zombie: it handles the frames that it had been sent, and finds its connection closed."""
        assert self._channel is not None
        assert self._pipe is not None
        self.is_running = True
        self.run(self._channel, self._pipe)

    def _handle(self, frame: Frame, channel: Channel) -> None:
        if frame.kind is FrameKind.BYE:
            self._leave(channel)
            return
        answer = self.core.handle(frame, challenge=CHALLENGE)
        if answer is not None:
            channel.send([answer])

    def _fail(self, fault: Fault, frame: Frame, channel: Channel, pipe: InprocPipe) -> None:
        self.has_failed = True
        match fault:
            case Fault.KILL | Fault.KILL_AFTER:
                if fault is Fault.KILL_AFTER:
                    self.core.handle(frame, challenge=CHALLENGE)
                self.is_running = False
                channel.close()
            case Fault.RESET:
                self._leave(channel)
            case Fault.STOP | Fault.ZOMBIE:
                self.is_running = False
            case Fault.HALF:
                answer = self.core.handle(frame, challenge=CHALLENGE)
                self.is_running = False
                if answer is None:
                    channel.close()
                    return
                raw = header_of(answer) + b"".join(bytes(bytes_of(part)) for part in answer.parts)
                pipe.write([memoryview(raw[: len(raw) // 2])], 0)

    def _leave(self, channel: Channel) -> None:
        channel.close()
        self.core.leave()
