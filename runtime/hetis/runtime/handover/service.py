"""Computes prompts for engines that decode: they connect, ask, and get KV as fast as it is there.

The engine's thread computes, chunk by chunk, and exports each chunk's KV when its step is through; a thread for each
connection sends it while the next chunk is computed. A request of another engine is one of ours with a single token of
output, which nobody reads.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.request import Request, RequestError, SamplingParams
from hetis.runtime.handover.kv import read_kv, whole_shape
from hetis.runtime.handover.messages import read_tokens
from hetis.runtime.handover.talking import Outbox, talk
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.transport.channel import Channel, PipeChannel
from hetis.runtime.transport.errors import ChannelError, FrameError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.messages import ErrorCode, Hello, error_answer, pack_welcome
from hetis.runtime.transport.tcp import TcpPipe

_MOST_CALLERS = 64
_MOST_QUEUED = 1024  # jobs of one caller
_FRAME_BYTES = 16 << 20
_UNSENT_BYTES = 1 << 30  # of one caller's jobs that were begun, computed or not; one job may be larger
_MOST_STRANGERS = 16  # that have not greeted yet: another one takes the place of the first
_GREETING_BYTES = 8 * 4096 + 24
_GREETING_S, _LOOK_S = 10.0, 0.1
_AGAIN_S = 1.0  # between two attempts to take a connection, where there is no room for it
_END_S = 2.0  # for threads that may be sending, all of them
_log = logging.getLogger(__name__)
Do = Callable[[Callable[[], None]], None]


@dataclass(slots=True, kw_only=True)
class _Job:
    """KV of ``request``'s prompt, of which ``sent`` positions are on their way to its caller."""

    caller: _Caller
    serial: int
    request: Request
    sent: int = 0


class PromptService:
    """Computes prompts on ``engine``; all its methods but `listen` and `close` are called by the engine's thread."""

    def __init__(self, engine: Engine, *, key: bytes, do: Do, silent_s: float = 30.0) -> None:
        """``do`` has the engine's thread do something between two steps; it may be called from any thread."""
        self.num_prompts, self.sent_bytes = 0, 0
        self._engine, self._key, self._do, self._silent_s = engine, key, do, silent_s
        self._shape = whole_shape(engine)
        self._most_tokens = engine.longest() - 1
        self._prompt_bytes = 8 * max(self._most_tokens, 1)
        item = self._shape.item_bytes
        self._token_bytes = 2 * engine.config.kv_heads * self._shape.layers * self._shape.head_dim * item
        self._frame_tokens = max(1, _FRAME_BYTES // self._token_bytes)
        self._jobs: dict[int, _Job] = {}
        self._callers: list[_Caller] = []
        self._lock, self._strangers = threading.Lock(), deque[socket.socket]()
        self._ends = threading.Event()
        self._threads: list[threading.Thread] = []
        engine.on_prefilled = self._prefilled
        engine.between_steps.append(self._advance)

    # --- connections

    def listen(self, listener: socket.socket) -> None:
        """Takes connections of engines that decode, until `close`."""
        self._start(lambda: self._accept(listener), "prompts")

    def close(self) -> None:
        """Ends all connections."""
        self._ends.set()
        deadline_s = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0.0))

    def _start(self, work: Callable[[], None], name: str) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(_LOOK_S)
        with listener:
            while not self._ends.is_set():
                try:
                    connection, _ = listener.accept()
                except (TimeoutError, ConnectionAbortedError):
                    continue
                except OSError as error:  # no descriptor is left, say: later there may be one
                    _log.warning("prompts: no connection is taken: %s", error.strerror or error)
                    self._ends.wait(_AGAIN_S)
                    continue
                if sum(thread.is_alive() for thread in self._threads) > _MOST_CALLERS + _MOST_STRANGERS:
                    connection.close()
                    continue
                self._note_stranger(connection)
                self._start(lambda connection=connection: self._serve(connection), "prompts of a caller")  # type: ignore[misc]

    def _note_stranger(self, connection: socket.socket) -> None:
        with self._lock:
            self._strangers.append(connection)
            if len(self._strangers) > _MOST_STRANGERS:
                with contextlib.suppress(OSError):  # it is gone already
                    self._strangers.popleft().shutdown(socket.SHUT_RDWR)

    def _forget_stranger(self, connection: socket.socket) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._strangers.remove(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            host, port = connection.getpeername()[:2]
            pipe = TcpPipe(connection, f"tcp:{host}:{port}")
        except OSError:
            self._forget_stranger(connection)
            connection.close()
            return
        channel = PipeChannel(pipe, stall_s=self._silent_s, most_body_bytes=self._prompt_bytes)
        caller: _Caller | None = None
        try:
            try:
                caller = self._greet(PipeChannel(pipe, stall_s=_GREETING_S, most_body_bytes=_GREETING_BYTES))
            finally:
                self._forget_stranger(connection)
            if caller is None:
                return
            _log.info("computes prompts for %s", channel.name)
            own = caller
            talk(
                channel,
                own.outbox,
                lambda frame: self._hear(own, frame),
                is_busy=lambda: own.is_busy,
                has_ended=self._ends.is_set,
                silent_s=self._silent_s,
            )
        except ChannelError as error:
            _log.info("%s ended: %s", channel.name, error)
        finally:
            channel.close()
            if caller is not None:
                gone = caller
                self._do(lambda: self._forget(gone))

    def _greet(self, channel: Channel) -> _Caller | None:
        frame = channel.receive(_GREETING_S)
        if frame is None:
            return None
        hello = Hello.read(frame)
        why = ""
        if not hmac.compare_digest(hello.key, self._key):
            why = "another model, or another key: both ends need the same folder and HETIS_API_KEY"
        elif hello.shape != self._shape:
            why = f"KV there is of {hello.shape.dtype}, here of {self._shape.dtype}: both ends need the same --dtype"
        caller = _Caller(frame)
        if why:
            _log.warning("%s was refused: %s", channel.name, why)
            channel.send([caller.error(0, why, code=ErrorCode.REFUSED)])
            return None
        # The engine's thread says it: one that hangs is not to be met, however well its other threads are.
        welcome = caller.answer(Kind.WELCOME, parts=pack_welcome(self._most_tokens, "prompts"))
        self._do(lambda: caller.outbox.put(welcome))
        return caller

    def _hear(self, caller: _Caller, frame: Frame) -> None:
        """In the caller's thread: hands it on."""
        if (frame.epoch, frame.session) != (caller.epoch, caller.session):
            raise FrameError(f"a frame of epoch {frame.epoch}, which is not of this connection")
        serial = frame.serial
        match frame.kind:
            case Kind.PREFILL:
                tokens = read_tokens(frame)
                caller.is_busy = True
                self._do(lambda: self._take(caller, serial, tokens))
            case Kind.CANCEL:
                self._do(lambda: self._cancel(caller, serial))
            case Kind.PING:  # the engine's thread answers, so that one that hangs is seen to
                self._do(lambda: self._pong(caller))
            case Kind.BYE:
                raise ChannelError("it said goodbye")
            case _:
                raise FrameError(f"{frame.kind.name} is not for an engine that computes prompts")

    # --- in the engine's thread

    def _take(self, caller: _Caller, serial: int, tokens: tuple[int, ...]) -> None:
        if len(caller.queue) >= _MOST_QUEUED:
            caller.outbox.put(caller.error(serial, f"{_MOST_QUEUED} prompts wait already"))
            return
        if caller not in self._callers:
            self._callers.append(caller)
        caller.queue.append((serial, tokens))
        self._advance()

    def _cancel(self, caller: _Caller, serial: int) -> None:
        caller.queue = deque(queued for queued in caller.queue if queued[0] != serial)
        for number, job in list(self._jobs.items()):
            if job.caller is caller and job.serial == serial:
                del self._jobs[number]
                self._engine.cancel(number)
        self._advance()

    def _pong(self, caller: _Caller) -> None:
        caller.outbox.put(caller.answer(Kind.PONG, parts=(torch.zeros(2, dtype=torch.int64),)))
        self._advance()

    def _forget(self, caller: _Caller) -> None:
        """The connection has ended: nobody wants what it asked for."""
        caller.queue.clear()
        if caller in self._callers:
            self._callers.remove(caller)
        for number, job in list(self._jobs.items()):
            if job.caller is caller:
                del self._jobs[number]
                self._engine.cancel(number)

    def _advance(self) -> None:
        """Between two steps: begins jobs that wait, tells of those that failed."""
        for number, job in list(self._jobs.items()):
            if job.request.finish_reason is None:
                continue
            del self._jobs[number]
            if job.sent < len(job.request.prompt):
                why = job.request.error or "it was cancelled"
                job.caller.outbox.put(job.caller.error(job.serial, why))
        for caller in self._callers:
            while caller.queue and self._may_begin(caller):
                self._begin(caller, *caller.queue.popleft())
            caller.is_busy = bool(caller.queue) or any(job.caller is caller for job in self._jobs.values())

    def _may_begin(self, caller: _Caller) -> bool:
        begun = [job for job in self._jobs.values() if job.caller is caller]
        if not begun:
            return caller.outbox.num_bytes < _UNSENT_BYTES
        tokens = sum(len(job.request.prompt) - job.sent for job in begun) + len(caller.queue[0][1])
        unsent = caller.outbox.num_bytes + tokens * self._token_bytes
        return len(begun) < self._engine.options.most_running and unsent <= _UNSENT_BYTES

    def _begin(self, caller: _Caller, serial: int, tokens: tuple[int, ...]) -> None:
        try:
            number = self._engine.add(tokens, SamplingParams(max_tokens=1, ignore_eos=True))
        except RequestError as error:
            caller.outbox.put(caller.error(serial, str(error)))
            return
        self._jobs[number] = _Job(caller=caller, serial=serial, request=self._engine.waiting[-1])

    def _prefilled(self, request: Request, first: int) -> None:
        """A chunk is through: what of it was not sent before the request had to begin anew is sent."""
        job = self._jobs.get(request.number)
        if job is None:
            return
        begin, last = max(first, job.sent), request.computed
        while begin < last:
            end = min(begin + self._frame_tokens, last)
            try:
                k, v = read_kv(self._engine, request, begin, end)
            except DeviceLostError:
                return  # the engine hears of it at the next step, and begins anew
            frame = job.caller.kv(job.serial, begin, k, v, dtype=self._shape.dtype)
            job.caller.outbox.put(frame)
            self.sent_bytes += frame.body_bytes
            job.sent = begin = end
        self.num_prompts += last == len(request.prompt)


class _Caller:
    """An engine that decodes.

    Attributes:
        epoch, session: of its connection.
        queue: jobs that were not begun, by its serials.
        outbox: what is to be sent to it.
        is_busy: something may be to be sent soon.
    """

    def __init__(self, hello: Frame) -> None:
        self.epoch, self.session = hello.epoch, hello.session
        self.queue: deque[tuple[int, tuple[int, ...]]] = deque()
        self.outbox = Outbox()
        self.is_busy = False

    def answer(
        self,
        kind: Kind,
        *,
        serial: int = 0,
        step: int = 0,
        counts: tuple[int, int, int] = (0, 0, 0),
        dtype: str = "",
        parts: tuple[torch.Tensor, ...] = (),
    ) -> Frame:
        return Frame(
            kind=kind,
            epoch=self.epoch,
            session=self.session,
            serial=serial,
            step=step,
            counts=counts,
            dtype=dtype,
            parts=parts,
        )

    def error(self, serial: int, why: str, *, code: ErrorCode = ErrorCode.FAILED) -> Frame:
        asked = Frame(kind=Kind.PREFILL, epoch=self.epoch, session=self.session, serial=serial)
        return error_answer(asked, code, why)

    def kv(self, serial: int, first: int, k: torch.Tensor, v: torch.Tensor, *, dtype: str) -> Frame:
        counts = k.shape[0], k.shape[2], 0
        return self.answer(Kind.KV, serial=serial, step=first, counts=counts, dtype=dtype, parts=(k, v))
