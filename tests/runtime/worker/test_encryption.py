"""KV that is encrypted on its way: who listens reads nothing, and whoever changes anything is noticed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.attention.kv import DeviceLostError
from hetis.runtime.transport.channel import Channel, ChannelKind
from hetis.runtime.transport.encryption import LENGTH_BYTES, RECORD_BYTES, TAG_BYTES, ConnectionKey, Pipe
from hetis.runtime.transport.frames import ChannelStalledError, Frame, FrameError, FrameKind
from hetis.runtime.transport.keys import key_of
from hetis.runtime.worker.remote import RemoteDevice, join_at
from tests.runtime.attention.test_ranges import MIXED, Case, check
from tests.runtime.transport.inproc import InprocPipe
from tests.runtime.worker.listening import SECRET, ListeningWorker, listening_worker

KEY = key_of(SECRET)
CASE = Case(**MIXED, r=3, d=16, page_tokens=16, window=19, soft_cap=30.0, dtype="float32")
TEXT = torch.arange(1, 1 + 2 * 4 * 16, dtype=torch.float32).view(2, 4, 16) / 7  # K of 2 layers, 4 positions


class Listener:
    """A proxy before a worker, which keeps what passes and may change it."""

    def __init__(self, worker: ListeningWorker) -> None:
        self.heard = bytearray()
        self.change: Callable[[bytes], bytes] = bytes
        self._worker, self._ends = worker, ExitStack()
        self._listener = self._ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port: int = self._listener.getsockname()[1]
        self._ends.callback(self._listener.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._ends.close()

    def join(self, *, epoch: int, encrypts: bool, kind: ChannelKind = ChannelKind.TCP) -> RemoteDevice:
        return join_at("w0", "127.0.0.1", self.port, KEY, CASE.shape(), epoch=epoch, kind=kind, encrypts=encrypts)

    def _run(self) -> None:
        while True:
            try:
                engine, _ = self._listener.accept()
            except OSError:
                return
            worker = socket.create_connection((self._worker.host, self._worker.port))
            for source, target in ((engine, worker), (worker, engine)):
                self._ends.callback(source.close)
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.heard += data
                target.sendall(self.change(data))
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ListeningWorker]:
    with listening_worker(tmp_path_factory.mktemp("worker")) as found:
        yield found


def move_text(device: RemoteDevice) -> None:
    """Have a worker take KV, and give it back."""
    assert CASE.shape().layers == len(TEXT)
    device.adopt(7, 0, [0], 0, TEXT[None], -TEXT[None])
    k, v = device.export(7, 0, [0], 0, TEXT.shape[1])
    assert torch.equal(k[0], TEXT)
    assert torch.equal(v[0], -TEXT)


@pytest.mark.parametrize(("encrypts", "times"), [(False, 2), (True, 0)])
def test_who_listens_reads_kv_only_where_it_is_not_encrypted(
    worker: ListeningWorker, encrypts: bool, times: int
) -> None:
    """The proxy sees K go out and come back, and with encryption nothing of it."""
    with closing(Listener(worker)) as between:
        device = between.join(epoch=1 + encrypts, encrypts=encrypts)
        assert device._channel.name.startswith("encrypted tcp:" if encrypts else "tcp:")
        check(device, CASE)
        move_text(device)
        device.close()
        assert bytes(between.heard).count(TEXT[0].numpy().tobytes()) == times
        assert SECRET.encode() not in between.heard


def test_shared_memory_of_one_host_is_not_encrypted(worker: ListeningWorker) -> None:
    device = join_at("w0", worker.host, worker.port, KEY, CASE.shape(), epoch=10, encrypts=True)
    assert device._channel.name.startswith("shm over ")
    move_text(device)
    device.close()


def test_two_connections_with_one_key_have_no_bytes_in_common(worker: ListeningWorker) -> None:
    said = []
    for epoch in (20, 21):
        with closing(Listener(worker)) as between:
            device = between.join(epoch=epoch, encrypts=True)
            before = len(between.heard)
            move_text(device)
            said.append(bytes(between.heard[before:]))
            device.close()
    parts = {said[0][begin : begin + 16] for begin in range(len(said[0]) - 16)}
    assert not any(said[1][begin : begin + 16] in parts for begin in range(len(said[1]) - 16))


def test_a_changed_byte_loses_the_worker_and_the_next_connection_is_well(worker: ListeningWorker) -> None:
    with closing(Listener(worker)) as between:
        device = between.join(epoch=30, encrypts=True)
        between.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(DeviceLostError):
            move_text(device)
        between.change = bytes
        again = between.join(epoch=31, encrypts=True)
        move_text(again)
        again.close()


def test_nobody_between_can_turn_encryption_off(worker: ListeningWorker) -> None:
    """The request is part of what the engine proves: it is the byte before nonce and proof."""

    def turn_off(data: bytes) -> bytes:
        at = len(data) - 65
        is_hello = len(data) > 130 and data[at] == 1
        return data[:at] + b"\0" + data[at + 1 :] if is_hello else data

    with closing(Listener(worker)) as between:
        between.change = turn_off
        with pytest.raises(DeviceLostError, match="the key is another worker's, or an old one"):
            between.join(epoch=40, encrypts=True)


def test_a_worker_that_dies_is_lost_at_once_also_with_encryption(tmp_path: Path) -> None:
    with listening_worker(tmp_path) as one, closing(Listener(one)) as between:
        device = between.join(epoch=1, encrypts=True)
        check(device, CASE)
        one.process.kill()
        with pytest.raises(DeviceLostError):
            check(device, CASE)


def ends(key: bytes = KEY, other_key: bytes = KEY) -> tuple[InprocPipe, Pipe, InprocPipe, Pipe]:
    """Return the raw and the encrypted pipe of an engine and of a worker."""
    ours, theirs = InprocPipe.pair()
    engine, worker = ConnectionKey(), ConnectionKey()
    one = engine.encrypted(ours, "engine", worker.nonce, key)
    return ours, one, theirs, worker.encrypted(theirs, "worker", engine.nonce, other_key)


def read(pipe: Pipe, num: int) -> bytes:
    """Read ``num`` bytes, or those that there are."""
    found, buffer = b"", bytearray(num)
    while len(found) < num and (came := pipe.read_into(memoryview(buffer)[: num - len(found)], 0.0)):
        found += buffer[:came]
    return found


@given(st.lists(st.binary(max_size=90), max_size=6), st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_what_is_read_is_what_was_written_in_whatever_pieces_it_arrives(parts: list[bytes], cuts: list[int]) -> None:
    ours, one, theirs, other = ends()
    whole = b"".join(parts)
    for part in parts:
        one.write([memoryview(part)], 0.0)
    raw, found = bytes(theirs._arrived), b""
    theirs._arrived.clear()
    for cut in [*cuts, len(raw)]:
        piece, raw = raw[:cut], raw[cut:]
        theirs._arrived += piece
        found += read(other, len(whole) + 1)
    assert found == whole
    other.write([memoryview(whole + b"!")], 0.0)
    assert read(one, len(whole) + 1) == whole + b"!"
    assert ours.is_closed is theirs.is_closed is False


def test_long_writes_are_several_records() -> None:
    _, one, theirs, other = ends()
    data = bytes(range(256)) * (RECORD_BYTES // 128)
    one.write([memoryview(data[:100]), memoryview(data[100:])], 0.0)
    assert len(theirs._arrived) == len(data) + 2 * (LENGTH_BYTES + TAG_BYTES)
    assert read(other, len(data)) == data


@pytest.mark.parametrize("what", ["change", "repeat", "leave out", "reorder", "reflect", "cut", "long", "empty"])
def test_a_record_that_is_not_the_next_of_the_other_end_is_refused(what: str) -> None:
    ours, one, theirs, other = ends()
    one.write([memoryview(b"first")], 0.0)
    first = bytes(theirs._arrived)
    one.write([memoryview(b"second")], 0.0)
    second = bytes(theirs._arrived)[len(first) :]
    came = {
        "change": first[:6] + bytes([first[6] ^ 128]) + first[7:],
        "repeat": first + first,
        "leave out": second,
        "reorder": second + first,
        "reflect": first,
        "cut": (len(first) - 5).to_bytes(4, "little") + first[4:-1],
        "long": (RECORD_BYTES + TAG_BYTES + 1).to_bytes(4, "little"),
        "empty": TAG_BYTES.to_bytes(4, "little") + bytes(TAG_BYTES),
    }[what]
    theirs._arrived[:] = b"" if what == "reflect" else came
    if what == "reflect":
        ours._arrived[:] = came
    if what == "repeat":
        assert read(other, 5) == b"first"
    with pytest.raises(FrameError, match=r"a record (is not from the other end|of \d+ bytes)"):
        read(one if what == "reflect" else other, 5)


@pytest.mark.parametrize("arrives", [2, 40])
def test_a_frame_whose_record_stops_is_noticed_and_silence_between_two_is_not(arrives: int) -> None:
    ours, theirs = InprocPipe.pair()
    one, other, engine, worker = Channel(ours), Channel(theirs, stall_s=0.02), ConnectionKey(), ConnectionKey()
    one.encrypt(engine, "engine", worker.nonce, KEY)
    other.encrypt(worker, "worker", engine.nonce, KEY)
    ping = Frame(kind=FrameKind.PING, epoch=1, session=2)
    one.send([ping])
    assert other.receive(0.0) is not None
    time.sleep(0.03)
    assert other.receive(0.0) is None
    one.send([ping])
    del theirs._arrived[arrives:]
    assert other.receive(0.0) is None
    time.sleep(0.03)
    with pytest.raises(ChannelStalledError, match="a record stopped before its end"):
        other.receive(0.0)


@pytest.mark.parametrize("end", ["engine", "worker"])
def test_ends_with_different_keys_understand_nothing_and_a_weak_nonce_is_refused(
    end: Literal["engine", "worker"],
) -> None:
    _, one, _, other = ends(other_key=key_of("another key than that one"))
    one.write([memoryview(b"text")], 0.0)
    with pytest.raises(FrameError):
        read(other, 4)
    with pytest.raises(FrameError, match="no key of X25519"):
        ConnectionKey().encrypted(InprocPipe("p"), end, bytes(32), KEY)
