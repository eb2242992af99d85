"""Two ends agree on shared memory, or continue over their socket; an attempt leaves nothing behind."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from hetis.runtime.transport import channel, pipes
from hetis.runtime.transport.channel import Channel, ChannelKind, Handshake, connect
from hetis.runtime.transport.frames import ChannelError, Frame, FrameError, FrameKind
from hetis.runtime.transport.pipes import SharedFile, TcpPipe, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="no shared memory here")
PING = Frame(kind=FrameKind.PING, epoch=1, session=1)
Accepted = Future[tuple[Channel, Frame]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in place of /dev/shm."""
    monkeypatch.setattr(pipes, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def worker() -> Iterator[Callable[[], tuple[int, Accepted]]]:
    """Listens, and accepts one connection in a thread."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, ThreadPoolExecutor() as threads:
        listener.settimeout(10)

        def serve() -> tuple[int, Accepted]:
            return listener.getsockname()[1], threads.submit(lambda: accept(listener.accept()[0]))

        yield serve


def accept(connection: socket.socket) -> tuple[Channel, Frame]:
    """Return what a handshake gives once all of it has arrived."""
    handshake, until_s = Handshake(connection, stall_s=10), monotonic() + 10
    while (found := handshake.read()) is None:
        assert monotonic() < until_s, "no handshake arrived"
        sleep(0.001)
    return found


def refuse(path: Path) -> SharedFile:
    raise FrameError(f"{path}: Permission denied")


@contextmanager
def ends(worker: Callable[[], tuple[int, Accepted]]) -> Iterator[tuple[Channel, Channel]]:
    """Yield the channels of an engine and a worker, once the first frame has arrived."""
    port, accepted = worker()
    with closing(connect("127.0.0.1", port)) as one:
        one.send([PING])
        other, first = accepted.result(10)
        with closing(other):
            assert first.kind is FrameKind.PING
            yield one, other


def test_both_ends_take_the_memory_and_its_names_go(folder: Path, worker: Callable[[], tuple[int, Accepted]]) -> None:
    with ends(worker) as (one, other):
        assert one.name.startswith("shm over ")
        assert other.name.startswith("shm over ")
        assert list(folder.iterdir()) == []
        other.send([PING])
        assert one.receive(10) is not None


def test_where_the_worker_cannot_open_the_memory_the_socket_does(
    folder: Path,
    worker: Callable[[], tuple[int, Accepted]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(channel.SharedFile, "open", refuse)
    with ends(worker) as (one, other):
        assert one.name.startswith("tcp:")
        assert other.name.startswith("tcp:")
    assert "does not take the shared memory" in caplog.text
    assert "Permission denied" in caplog.text
    port, accepted = worker()
    with pytest.raises(ChannelError, match="Permission denied"):
        connect("127.0.0.1", port, ChannelKind.SHM)
    with pytest.raises(ChannelError):
        accepted.result(10)
    assert list(folder.iterdir()) == []


def test_an_engine_that_is_stopped_meanwhile_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Channel, timeout_s: float) -> Frame | None:
        assert len(list(folder.iterdir())) == 1
        raise SystemExit(0)

    monkeypatch.setattr(Channel, "receive", stop)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, pytest.raises(SystemExit):
        connect("127.0.0.1", silent.getsockname()[1])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("path", [b"/dev/shm/hetis-\0", b"/dev/shm/hetis-none", b"\xff", b"/etc/passwd"])
def test_a_path_that_is_none_of_ours_is_refused(worker: Callable[[], tuple[int, Accepted]], path: bytes) -> None:
    port, accepted = worker()
    with closing(Channel(TcpPipe.connect("127.0.0.1", port, timeout_s=10))) as stranger:
        words = torch.frombuffer(bytearray(path), dtype=torch.uint8)
        stranger.send([Frame(kind=FrameKind.ATTACH, epoch=0, session=0, parts=(words,))])
        answer = stranger.receive(10)
        assert answer is not None
        assert answer.kind is FrameKind.ERROR
    with pytest.raises(ChannelError):
        accepted.result(10)


def test_strangers_cannot_make_a_worker_take_memory(worker: Callable[[], tuple[int, Accepted]]) -> None:
    """Before an engine has shown its key, larger frames than a handshake end the connection, later ones do not."""
    large = PING._replace(parts=(torch.zeros(1 << 17, dtype=torch.uint8),))
    port, accepted = worker()
    with closing(connect("127.0.0.1", port, kind=ChannelKind.TCP)) as one:
        one.send([large])
        with pytest.raises(FrameError, match="a body of 131072 bytes, 65536 are the most"):
            accepted.result(10)
    with ends(worker) as (one, other):
        other.trust()
        one.send([large])
        found = other.receive(10)
        assert found is not None
        assert found.body_bytes == 1 << 17


def test_bytes_beside_the_memory_or_its_end_end_a_greeting_that_waits_for_it(
    folder: Path, worker: Callable[[], tuple[int, Accepted]]
) -> None:
    """Only the socket shows that the other end is gone: memory does not."""
    for ending in (lambda pipe: pipe.write([memoryview(b"x")], 1.0), TcpPipe.close):
        shared, (port, accepted) = SharedFile.create(), worker()
        with closing(TcpPipe.connect("127.0.0.1", port, timeout_s=10)) as pipe:
            words = torch.frombuffer(bytearray(str(shared.path).encode()), dtype=torch.uint8)
            Channel(pipe).send([Frame(kind=FrameKind.ATTACH, epoch=0, session=0, parts=(words,))])
            answer = Channel(pipe).receive(10)
            assert answer is not None
            assert answer.kind is FrameKind.WELCOME
            ending(pipe)
            with pytest.raises(ChannelError, match=r"something was said beside|the other end is gone"):
                accepted.result(10)
    assert list(folder.iterdir()) == []
