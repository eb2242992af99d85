"""An engine that computes prompts for this one, as this one sees it: a connection that is made again and again."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hetis.runtime.handover.messages import Piece, pack_tokens
from hetis.runtime.handover.talking import Outbox, talk
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.channel import Channel, PipeChannel
from hetis.runtime.transport.errors import ChannelError, ChannelStalledError, FrameError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.messages import Hello, read_error, read_welcome
from hetis.runtime.transport.tcp import TcpPipe

_AGAIN_S = 1.0  # between two attempts to connect
_CONNECT_S = 10.0
_END_S = 2.0  # for the thread, which may be connecting
_MOST_JOBS = 256  # that one peer is asked for at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """News of a job: some KV, or, with ``piece`` None, why there will be none.

    ``is_final``: not even if the same peer were asked again; another may do it.
    """

    job: int
    piece: Piece | None = None
    why: str = ""
    is_final: bool = False


@dataclass(slots=True, kw_only=True)
class _Wanted:
    """KV of the first ``tokens`` positions of a prompt, of which ``came`` have come."""

    tokens: int
    came: int = 0

    def takes(self, piece: Piece) -> bool:
        """Whether that was the last of it. Raises FrameError: it is not what comes next, or more than was asked for."""
        if piece.first != self.came or piece.last > self.tokens:
            raise FrameError(
                f"KV of positions {piece.first} to {piece.last - 1}, {self.came} of {self.tokens} have come"
            )
        self.came = piece.last
        return self.came == self.tokens


class Arrivals:
    """What has come from all peers; their threads fill it, and the engine's empties it."""

    def __init__(self, *, most_bytes: int = 256 << 20) -> None:
        """From ``most_bytes`` on peers have to wait, so that a busy engine does not pile up KV."""
        self._waiting: deque[Arrival] = deque()
        self._lock, self._came = threading.Lock(), threading.Event()
        self._num_bytes, self._most_bytes = 0, most_bytes

    @property
    def is_full(self) -> bool:
        return self._num_bytes >= self._most_bytes

    def put(self, arrival: Arrival) -> None:
        with self._lock:
            self._waiting.append(arrival)
            self._num_bytes += arrival.piece.num_bytes if arrival.piece else 0
            self._came.set()

    def take(self) -> Arrival | None:
        """The oldest; None: there is none."""
        with self._lock:
            if not self._waiting:
                self._came.clear()
                return None
            arrival = self._waiting.popleft()
            self._num_bytes -= arrival.piece.num_bytes if arrival.piece else 0
            return arrival

    def wait(self, timeout_s: float) -> None:
        """Until something is there, or for so long."""
        self._came.wait(timeout_s)


class PrefillPeer:
    """One engine that computes prompts. While it is not reached it is looked for once a second.

    Attributes:
        name: its address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        arrivals: Arrivals,
        *,
        shape: KvShape,
        heads: int,
        key: bytes,
        epoch: int,
        silent_s: float = 30.0,
    ) -> None:
        """``shape`` and ``heads``: of the KV that comes. A peer that says nothing for ``silent_s`` is lost."""
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._where, self._arrivals = (host, port), arrivals
        self._shape, self._heads, self._key, self._epoch = shape, heads, key, epoch
        self._silent_s = silent_s
        self._outbox, self._session = Outbox(), 0
        self._lock = threading.Lock()
        self._jobs: dict[int, _Wanted] = {}
        self._most_tokens: int | None = None  # of a prompt; None: it is not reached
        self._told = ""
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"prompts at {self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Has the connection and the thread end soon."""
        self._ends.set()

    def close(self, timeout_s: float = _END_S) -> None:
        """Ends the connection and the thread, for which it waits so long."""
        self.end()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_up(self) -> bool:
        return self._most_tokens is not None

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def ask(self, job: int, tokens: Sequence[int]) -> bool:
        """Has the KV of these tokens computed; False: it is not reached, or cannot take more, or none so long."""
        with self._lock:
            most = self._most_tokens
            if most is None or len(tokens) > most or len(self._jobs) >= _MOST_JOBS:
                return False
            self._jobs[job] = _Wanted(tokens=len(tokens))
            self._outbox.put(self._frame(Kind.PREFILL, job, (len(tokens), 0, 0), tokens))
            return True

    def cancel(self, job: int) -> None:
        """Nobody wants it any more; what has ended is no error."""
        with self._lock:
            if self._jobs.pop(job, None) is not None:
                self._outbox.put(self._frame(Kind.CANCEL, job))

    # --- in its thread

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                self._meet()
            except ChannelError as error:
                self._lose(str(error))
            except Exception as error:  # nobody must wait for ever for what this thread was to bring
                _log.exception("prompts at %s", self.name)
                self._lose(type(error).__name__)
            self._ends.wait(_AGAIN_S)
        self._lose("this engine is ending")

    def _meet(self) -> None:
        # Both ends may have more to say than buffers take: this one reads on while it waits to be read.
        pipe = TcpPipe.connect(*self._where, timeout_s=_CONNECT_S, reads_ahead=True)
        channel = PipeChannel(pipe, stall_s=self._silent_s)
        try:
            self._session = secrets.randbits(63)
            most = self._greet(channel)
            with self._lock:
                self._most_tokens = most
            self._told = ""
            _log.info("prompts are computed at %s", self.name)
            talk(
                channel,
                self._outbox,
                self._hear,
                is_busy=lambda: bool(self._jobs),
                is_full=lambda: self._arrivals.is_full,
                has_ended=self._ends.is_set,
                ping=lambda: self._frame(Kind.PING, 0),
                silent_s=self._silent_s,
            )
        finally:
            with contextlib.suppress(ChannelError):  # it is gone already, which is as good
                channel.send([self._frame(Kind.BYE, 0)])
            channel.close()

    def _greet(self, channel: Channel) -> int:
        """Says what we are; returns how many tokens a prompt may have there."""
        channel.send([Hello(shape=self._shape, key=self._key).frame(epoch=self._epoch, session=self._session)])
        answer = channel.receive(self._silent_s)
        if answer is None:
            raise ChannelStalledError(f"{self.name}: no answer to a greeting within {self._silent_s:g} s")
        if answer.kind is Kind.ERROR:
            raise FrameError(f"{self.name}: {read_error(answer)[2]}")
        most, _ = read_welcome(answer)
        return most

    def _hear(self, frame: Frame) -> None:
        if (frame.epoch, frame.session) != (self._epoch, self._session):
            raise FrameError(f"{self.name}: a frame of epoch {frame.epoch}, which is not of this connection")
        job = frame.serial
        match frame.kind:
            case Kind.PONG:
                return
            case Kind.ERROR:
                with self._lock:
                    known = self._jobs.pop(job, None) is not None
                if known:
                    self._arrivals.put(Arrival(job=job, why=read_error(frame)[2], is_final=True))
            case Kind.KV:
                piece = Piece.read(frame, self._shape, heads=self._heads)
                with self._lock:
                    wanted = self._jobs.get(job)
                    if wanted is not None and wanted.takes(piece):
                        del self._jobs[job]
                if wanted is not None:
                    self._arrivals.put(Arrival(job=job, piece=piece))
            case _:
                raise FrameError(f"{self.name}: {frame.kind.name} is not for an engine that decodes")

    def _lose(self, why: str) -> None:
        with self._lock:
            lost, self._jobs, self._most_tokens = list(self._jobs), {}, None
            self._outbox.clear()
        for job in lost:
            self._arrivals.put(Arrival(job=job, why=why))
        if why != self._told and not self._ends.is_set():
            _log.warning("no prompts are computed at %s: %s", self.name, why)
        self._told = why

    def _frame(
        self, kind: Kind, job: int, counts: tuple[int, int, int] = (0, 0, 0), tokens: Sequence[int] = ()
    ) -> Frame:
        parts = (pack_tokens(tokens),) if tokens else ()
        return Frame(kind=kind, epoch=self._epoch, session=self._session, serial=job, counts=counts, parts=parts)
