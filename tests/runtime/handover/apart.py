"""Engines that decode and engines that compute their prompts, each in a thread, over the loopback."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from hetis.runtime.engine.engine import Engine
from hetis.runtime.handover.kv import whole_shape
from hetis.runtime.handover.peer import Arrivals, PrefillPeer
from hetis.runtime.handover.prompts import RemotePrompts
from hetis.runtime.handover.service import PromptService
from hetis.runtime.transport.channel import PipeChannel
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.messages import pack_welcome
from hetis.runtime.transport.tcp import TcpPipe, listen

KEY = bytes(range(16))


@dataclass(eq=False)
class Prefilling:
    """An engine in a thread that computes prompts: with ``halt`` it makes no step, with ``hang`` it does nothing."""

    engine: Engine
    service: PromptService
    port: int
    halt: threading.Event = field(default_factory=threading.Event)
    hang: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def prefilling(engine: Engine, *, key: bytes = KEY, silent_s: float = 600.0) -> Iterator[Prefilling]:
    commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    service = PromptService(engine, key=key, do=commands.put, silent_s=silent_s)
    listener = listen("127.0.0.1")
    one = Prefilling(engine, service, listener.getsockname()[1])

    def work() -> None:
        while True:
            while engine.has_work and commands.empty() and not one.halt.is_set() and not one.hang.is_set():
                engine.step()
            act = commands.get()
            wait_until(lambda: not one.hang.is_set())
            if act is None:
                return
            act()

    thread = threading.Thread(target=work, name="prefilling")
    thread.start()
    service.listen(listener)
    try:
        yield one
    finally:
        service.close()
        commands.put(None)
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def decoding(
    engine: Engine, *ports: int, key: bytes = KEY, silent_s: float = 600.0, bytes_per_step: int = 1 << 20
) -> Iterator[RemotePrompts]:
    """The engine, its prompts computed at these ports, once all of them are reached."""
    arrivals, shape = Arrivals(), whole_shape(engine)
    peers = [
        PrefillPeer(
            "127.0.0.1",
            port,
            arrivals,
            shape=shape,
            heads=engine.config.kv_heads,
            key=key,
            epoch=engine.epoch,
            silent_s=silent_s,
        )
        for port in ports
    ]
    prompts = RemotePrompts(engine, peers, arrivals, bytes_per_step=bytes_per_step)
    for peer in peers:
        peer.start()
    try:
        yield prompts
    finally:
        for peer in peers:
            peer.close()


@contextlib.contextmanager
def answering(answer: Callable[[Frame], Frame]) -> Iterator[int]:
    """A port where one who decodes is met once; to what it has computed, ``answer`` is said."""
    ends = threading.Event()
    listener = listen("127.0.0.1")

    def work() -> None:
        with listener:
            connection = listener.accept()[0]
        channel = PipeChannel(TcpPipe(connection, "answering"), stall_s=60)
        with contextlib.suppress(ChannelError):  # it went, as it may
            while not ends.is_set():
                frame = channel.receive(0.01)
                if frame is not None and frame.kind is Kind.HELLO:
                    most = pack_welcome(1000, "prompts")
                    channel.send([Frame(kind=Kind.WELCOME, epoch=frame.epoch, session=frame.session, parts=most)])
                elif frame is not None and frame.kind is Kind.PREFILL:
                    channel.send([answer(frame)])
        channel.close()

    thread = threading.Thread(target=work, name="answering")
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ends.set()
        thread.join(60)


def wait_until(holds: Callable[[], bool], *, limit_s: float = 300) -> None:
    waiting = threading.Event()
    for _ in range(int(limit_s / 0.01)):
        if holds():
            return
        waiting.wait(0.01)
    raise AssertionError("it never held")
