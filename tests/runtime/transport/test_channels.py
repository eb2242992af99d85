"""Channels carry whole frames, in order, of any size; truncated, late or foreign data end them with a clear error."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.runtime.transport import frames, pipes
from hetis.runtime.transport.channel import Channel, ChannelKind, connect
from hetis.runtime.transport.frames import (
    HEADER_BYTES,
    MOST_BODY_BYTES,
    ChannelClosedError,
    ChannelError,
    ChannelStalledError,
    Frame,
    FrameError,
    FrameKind,
    bytes_of,
    header_of,
    read_header,
)
from hetis.runtime.transport.pipes import SharedFile, ShmPipe, TcpPipe, is_supported
from tests.runtime.transport.inproc import InprocPipe

Ends = tuple[Channel, Channel]


def frame(size: int, *, serial: int = 0, kind: FrameKind = FrameKind.ATTEND) -> Frame:
    body = (torch.arange(size) % 251).to(torch.uint8)
    return Frame(kind=kind, epoch=3, session=2**63 - 1, serial=serial, step=5, layer=7, counts=(1, 2, 3), parts=(body,))


def tcp_pipes() -> tuple[TcpPipe, TcpPipe]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        one = TcpPipe.connect("127.0.0.1", listener.getsockname()[1], timeout_s=5)
        return one, TcpPipe(listener.accept()[0], "other")


def inproc_ends(stall_s: float) -> Ends:
    one, other = InprocPipe.pair()
    return Channel(one, stall_s=stall_s), Channel(other, stall_s=stall_s)


def tcp_ends(stall_s: float) -> Ends:
    one, other = tcp_pipes()
    return Channel(one, stall_s=stall_s), Channel(other, stall_s=stall_s)


def shm_ends(stall_s: float, ring_bytes: int = 1 << 16) -> Ends:
    one, other = tcp_pipes()
    made = SharedFile.create(ring_bytes)
    found = SharedFile.open(made.path)
    made.unlink()
    assert not made.path.exists()
    pipes = ShmPipe(made, one, first=True), ShmPipe(found, other, first=False)
    return Channel(pipes[0], stall_s=stall_s), Channel(pipes[1], stall_s=stall_s)


KINDS: dict[str, Callable[[float], Ends]] = {"inproc": inproc_ends, "tcp": tcp_ends}
if is_supported():
    KINDS["shm"] = shm_ends


@pytest.fixture(params=KINDS)
def make_ends(request: pytest.FixtureRequest) -> Iterator[Callable[..., Ends]]:
    made: list[Channel] = []

    def make(stall_s: float = 5.0) -> Ends:
        ends = KINDS[request.param](stall_s)
        made.extend(ends)
        return ends

    yield make
    for end in made:
        end.close()


def same(one: Frame, other: Frame) -> bool:
    bodies = [[bytes(bytes_of(part)) for part in frame.parts] for frame in (one, other)]
    return header_of(one) == header_of(other) and bodies[0] == bodies[1]


def test_frames_arrive_whole_and_in_order(make_ends: Callable[..., Ends]) -> None:
    one, other = make_ends()
    sent = [frame(size, serial=i) for i, size in enumerate([0, 1, 63, 64, 65, 4096, 30_000])]
    one.send(sent[:3])
    one.send(sent[3:])
    for expected in sent:
        came = other.receive(5)
        assert came is not None
        assert same(came, expected)
    assert other.receive(0) is None
    other.send([frame(10)])
    came = one.receive(5)
    assert came is not None
    assert same(came, frame(10))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "inproc"])
def test_frames_larger_than_any_buffer_pass_while_the_other_end_reads(kind: str) -> None:
    one, other = KINDS[kind](20.0)
    big = [frame(12_000_000, serial=1), frame(3, serial=2)]
    sender = threading.Thread(target=one.send, args=(big,))
    sender.start()
    for expected in big:
        came = other.receive(20)
        assert came is not None
        assert same(came, expected)
    sender.join()
    one.close()
    other.close()


def test_a_wait_ends_when_its_time_is_up_and_the_next_has_its_own(make_ends: Callable[..., Ends]) -> None:
    one, other = make_ends()
    for timeout_s in (0.0, 1e-9, 0.01, 0.1):
        begun_s = time.monotonic()
        assert one.receive(timeout_s) is None
        assert time.monotonic() - begun_s >= timeout_s or isinstance(one._pipe, InprocPipe)
    if not isinstance(one._pipe, InprocPipe):  # an in-process pipe does not wait
        later = threading.Timer(0.3, other.send, [[frame(5)]])
        later.start()
        assert one.receive(1e20) is not None
        later.join()
    begun_s = time.monotonic()
    assert one.receive(0.1) is None
    assert time.monotonic() - begun_s < 10


@pytest.mark.skipif(not is_supported(), reason="no shared memory here")
def test_who_sleeps_is_woken_and_sleeps_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, call = list[int](), pipes._syscall
    monkeypatch.setattr(pipes, "LOOK_S", 0.0)
    monkeypatch.setattr(pipes, "_NAP", ctypes.byref(pipes._Timespec(3, 0)))
    monkeypatch.setattr(pipes, "_syscall", lambda *of: calls.append(of[2]) or call(*of))  # type: ignore[func-returns-value]
    one, other = shm_ends(30.0)
    with closing(one), closing(other), ThreadPoolExecutor() as threads:
        begun_s = time.monotonic()
        for size in (3, 200_000):  # the second is more than fits: the writer sleeps, too
            for _ in range(10):
                asked = threads.submit(other.receive, 30)
                time.sleep(0.01)  # the receiver sleeps by now
                one.send([frame(size)])
                came = asked.result()
                assert came is not None
                assert same(came, frame(size))
    assert time.monotonic() - begun_s < 20  # sleeping until the naps end would take a minute
    assert len(calls) < 2000  # a polling reader would make thousands of calls


@pytest.mark.skipif(not is_supported(), reason="no shared memory here")
def test_what_is_said_beside_the_memory_ends_the_channel() -> None:
    one, other = shm_ends(5.0)
    with closing(one), closing(other):
        other._pipe._connection.write([memoryview(b"x")], 1.0)  # type: ignore[attr-defined]
        with pytest.raises(FrameError, match="beside the shared memory"):
            one.receive(5)


def test_where_futexes_are_refused_there_is_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "_syscall", lambda *_: -1)
    assert not is_supported()


def test_numbers_of_any_form_have_their_bytes() -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for some in (numbers, numbers[:, ::2], numbers[:0], numbers[0, 0, 0]):
        assert bytes(bytes_of(np.asarray(some))) == some.tobytes()
        assert bytes(bytes_of(torch.from_numpy(np.array(some)))) == some.tobytes()


def test_an_end_that_closes_is_noticed_by_the_other(make_ends: Callable[..., Ends]) -> None:
    one, other = make_ends()
    one.send([frame(5)])
    one.close()
    came = other.receive(5)  # earlier frames still arrive
    assert came is not None
    with pytest.raises(ChannelClosedError):
        other.receive(5)
    with pytest.raises(ChannelClosedError):
        one.send([frame(5)])


@pytest.mark.parametrize("cut", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 99])
def test_a_half_written_frame_ends_the_channel(make_ends: Callable[..., Ends], cut: int) -> None:
    one, other = make_ends(0.05)
    raw = header_of(frame(100)) + bytes(100)
    one._pipe.write([memoryview(raw[:cut])], 1.0)
    with pytest.raises(ChannelStalledError, match="stopped"):
        other.receive(1.0)


def test_what_is_no_frame_ends_the_channel(make_ends: Callable[..., Ends]) -> None:
    one, other = make_ends()
    one._pipe.write([memoryview(b"GET / HTTP/1.1\r\n" * 4)], 1.0)
    with pytest.raises(FrameError, match="no frame begins with"):
        other.receive(1.0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "inproc"])
def test_an_end_that_reads_nothing_stalls_the_writer(kind: str) -> None:
    one, other = KINDS[kind](0.1)
    with pytest.raises(ChannelStalledError, match="took nothing"):
        one.send([frame(40_000_000)])
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (4, 9, "a frame of version 9, this is version 6"),
        (6, 99, "kind 99 and dtype 0"),
        (7, 77, "kind 2 and dtype 77"),
        (63, 1, f"{MOST_BODY_BYTES} are the most"),
    ],
)
def test_a_wrong_header_says_what_is_wrong(place: int, value: int, says: str) -> None:
    header = bytearray(header_of(frame(0, kind=FrameKind.ATTEND)))
    header[6] = FrameKind.ATTEND
    header[place] = value
    with pytest.raises(FrameError, match=says.replace("kind 2 ", "kind . ")):
        read_header(header)


def test_a_body_for_which_there_is_no_memory_ends_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> None:
        raise MemoryError

    header = header_of(frame(0, kind=FrameKind.ATTEND))
    monkeypatch.setattr(frames.np, "empty", empty)
    with pytest.raises(FrameError, match="there is no memory for a body of"):
        read_header(header)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(FrameKind),
    st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 5),
    st.sampled_from(["", "float32", "float64", "bfloat16", "float16"]),
    st.integers(0, 300),
)
def test_a_header_says_what_the_frame_said(
    kind: FrameKind, long: tuple[int, int, int], short: tuple[int, int, int, int, int], dtype: str, size: int
) -> None:
    (epoch, session, serial), (step, layer, *counts) = long, short
    written = Frame(
        kind=kind,
        epoch=epoch,
        session=session,
        serial=serial,
        step=step,
        layer=layer,
        counts=(counts[0], counts[1], counts[2]),
        dtype=dtype,
        parts=(torch.zeros(size, dtype=torch.uint8),),
    )
    read, into = read_header(header_of(written))
    assert read.raw is into
    assert len(into) == size
    assert read._replace(parts=()) == written._replace(parts=())


@pytest.mark.skipif(not is_supported(), reason="no shared memory here")
def test_only_shared_memory_of_ours_is_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "hetis-x", Path("/dev/shm/other"), Path("/dev/shm/hetis-not-there")):
        with pytest.raises(FrameError):
            SharedFile.open(path)


def test_nobody_there_is_a_channel_error() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ChannelError, match=f"tcp:127.0.0.1:{port}"):
        TcpPipe.connect("127.0.0.1", port, timeout_s=1)


def test_a_channel_is_what_the_engine_expects() -> None:
    one, _ = inproc_ends(1.0)
    channel: Channel = one
    assert channel.name == "inproc:a"


@pytest.mark.skipif(not is_supported(), reason="no shared memory here")
def test_where_shared_memory_has_no_room_the_socket_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, offset: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipes, "FOLDER", tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        where = listener.getsockname()
        with closing(connect(*where)) as channel:
            assert channel.name.startswith("tcp:")
        assert "no shared memory: No space left on device" in caplog.text
        with pytest.raises(OSError, match="No space left"):
            connect(*where, ChannelKind.SHM)
    assert list(tmp_path.iterdir()) == []
