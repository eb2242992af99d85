"""Workers that engines find by address and key: they serve one engine after the other, and only those with the key."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from hetis.runtime.attention.device import LocalDevice
from hetis.runtime.attention.kv import DeviceLostError, OutOfPagesError, StaleEpochError, UnreachedDeviceError
from hetis.runtime.transport.channel import ChannelKind
from hetis.runtime.transport.keys import key_of
from hetis.runtime.worker.core import WorkerCore, WorkerLoop
from hetis.runtime.worker.main import StartError, _address_in
from hetis.runtime.worker.remote import join_at
from tests.runtime.attention.test_ranges import MIXED, Case, check
from tests.runtime.worker.listening import ListeningWorker, listening_worker

CASE = Case(**MIXED, r=3, d=16, page_tokens=16, window=19, soft_cap=30.0, dtype="float32")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ListeningWorker]:
    with listening_worker(tmp_path_factory.mktemp("worker")) as found:
        yield found


def test_engines_come_and_go_and_each_finds_the_worker_empty(worker: ListeningWorker) -> None:
    for epoch, (kind, dtype) in enumerate(
        [(ChannelKind.SHM, "float32"), (ChannelKind.TCP, "float32"), (ChannelKind.AUTO, "bfloat16")]
    ):
        case = Case(**MIXED, r=3, d=16, page_tokens=16, window=19, soft_cap=30.0, dtype=dtype)
        device = worker.join(case.shape(), epoch=10 + epoch, kind=kind)
        assert device.num_pages == (4 << 20) // case.shape().page_bytes
        assert device.ping() == (device.num_pages, 0)
        check(device, case)
        assert device.ping()[1] == len(case.tokens)
        device.close()


def test_only_the_newest_engine_with_the_key_is_obeyed(worker: ListeningWorker) -> None:
    shape = CASE.shape()
    device = worker.join(shape, epoch=50)
    with pytest.raises(DeviceLostError, match="the key is another worker's"):
        join_at("w0", worker.host, worker.port, key_of("a key that nobody has said"), shape, epoch=51)
    with pytest.raises(StaleEpochError, match="epoch 49 has ended, 50 is current"):
        worker.join(shape, epoch=49, age_s=3600.0)
    assert device.ping() == (device.num_pages, 0)
    newer = worker.join(shape, epoch=51)
    with pytest.raises(DeviceLostError):
        device.ping()
    newer.close()


def test_a_shape_that_no_memory_holds_leaves_a_worker_for_the_next_engine(worker: ListeningWorker) -> None:
    largest = replace(CASE.shape(), layers=4096, head_dim=4096, page_tokens=1 << 16, windows=(0,) * 4096)
    device = worker.join(largest, epoch=60)
    assert device.num_pages == 0
    with pytest.raises(OutOfPagesError, match="w0: 1 KV pages are needed, 0 are free"):
        check(device, CASE)
    device.close()
    with pytest.raises(DeviceLostError):  # the worker hangs up, because no engine sends that
        worker.join(replace(largest, head_dim=4097), epoch=61)
    worker.join(CASE.shape(), epoch=62).close()


@pytest.mark.parametrize("kind", [ChannelKind.SHM, ChannelKind.TCP])
def test_a_hung_worker_is_lost_and_obeys_nobody_old_when_it_wakes(worker: ListeningWorker, kind: ChannelKind) -> None:
    epoch = 70 if kind is ChannelKind.SHM else 80
    first = worker.join(CASE.shape(), epoch=epoch, kind=kind)
    check(first, CASE)  # which may compile
    first.close()
    device = worker.join(CASE.shape(), epoch=epoch + 1, kind=kind, timeout_s=3)
    worker.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DeviceLostError, match="no answer within 3 s"):
            check(device, CASE)
    finally:
        worker.process.send_signal(signal.SIGCONT)
    again = worker.join(CASE.shape(), epoch=epoch + 2, kind=kind)
    assert again.ping() == (again.num_pages, 0)
    check(again, CASE)
    again.close()


@pytest.mark.parametrize("kind", [ChannelKind.SHM, ChannelKind.TCP])
def test_a_killed_worker_is_lost_at_once_and_not_reached(tmp_path: Path, kind: ChannelKind) -> None:
    with listening_worker(tmp_path) as worker:
        device = worker.join(CASE.shape(), epoch=1, kind=kind, timeout_s=600)
        check(device, CASE)
        worker.process.kill()
        with pytest.raises(DeviceLostError):
            check(device, CASE)
        worker.process.wait(60)
        with pytest.raises(UnreachedDeviceError):
            worker.join(CASE.shape(), epoch=2)


def test_connections_that_say_nothing_hold_up_nobody(worker: ListeningWorker) -> None:
    with ExitStack() as probes:
        for _ in range(5):  # each of these used to hold a worker up for 10 s
            probes.enter_context(socket.create_connection((worker.host, worker.port), timeout=30))
        device = worker.join(CASE.shape(), epoch=90)
        assert device.ping() == (device.num_pages, 0)
        for _ in range(5):
            probes.enter_context(socket.create_connection((worker.host, worker.port), timeout=30))
        sleep(0.3)  # until the worker, which receives nothing, has checked them
        assert device.ping() == (device.num_pages, 0)
        device.close()


def test_strangers_without_the_key_hold_up_neither_a_served_engine_nor_one_that_joins(worker: ListeningWorker) -> None:
    """Each of these used to hold a served engine up for 1 s, and one that joins for 10 s."""
    with ExitStack() as strangers:

        def begin_to_greet() -> None:
            for _ in range(20):
                address = worker.host, worker.port
                strangers.enter_context(socket.create_connection(address, timeout=30)).sendall(b"HTIS")

        begin_to_greet()
        begun_s = monotonic()
        device = worker.join(CASE.shape(), epoch=95)
        begin_to_greet()
        sleep(0.3)  # until the worker, which receives nothing, has checked them
        assert device.ping() == (device.num_pages, 0)
        assert monotonic() < begun_s + 15
        device.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_real_gpu_of_another_process_computes_what_is_defined(tmp_path: Path, dtype: str) -> None:
    case = Case(**MIXED, r=4, d=64, page_tokens=16, window=19, dtype=dtype)
    with listening_worker(tmp_path, "--device", "cuda:0", kv_memory="64MiB") as remote:
        device = remote.join(case.shape(), epoch=1)
        check(device, case, on_gpu=True)
        device.close()


def test_a_signal_right_after_the_port_file_was_written_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = Path.replace

    def replaced_and_stopped(path: Path, target: Path) -> None:
        replaced(path, target)
        raise SystemExit(0)

    monkeypatch.setattr(Path, "replace", replaced_and_stopped)
    with pytest.raises(SystemExit), _address_in(tmp_path / "port", "127.0.0.1:1"):
        pytest.fail("it serves")
    assert not list(tmp_path.iterdir())


def test_a_port_file_that_cannot_be_written_is_left_to_the_worker_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "port").write_text("127.0.0.1:1\n")
    monkeypatch.setattr(Path, "replace", refuse)
    with (
        pytest.raises(StartError, match="port: No space left on device"),
        _address_in(tmp_path / "port", "127.0.0.1:2"),
    ):
        pytest.fail("it serves")
    assert [path.name for path in tmp_path.iterdir()] == ["port"]
    assert (tmp_path / "port").read_text() == "127.0.0.1:1\n"


def test_a_worker_that_is_stopped_removes_its_port_file_and_is_not_reached(tmp_path: Path) -> None:
    with listening_worker(tmp_path) as worker:
        assert (tmp_path / "port").read_text() == f"{worker.host}:{worker.port}\n"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "worker.key"]
        with pytest.raises(UnreachedDeviceError, match=f"w0: tcp:{worker.host}:{worker.port}: .*refused"):
            worker.join(CASE.shape(), epoch=1)


def test_a_newer_engine_takes_over_from_one_that_keeps_the_worker_busy(tmp_path: Path) -> None:
    shape, key = CASE.shape(), key_of("a secret of the test")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop = WorkerLoop(WorkerCore("w0", lambda shape: LocalDevice("w0", shape, 64), key=key), listener)
        host, port = listener.getsockname()
        is_over = threading.Event()

        def serve() -> None:
            while not is_over.is_set():
                loop.turn()

        def keep_busy() -> None:
            with suppress(DeviceLostError):
                while not is_over.is_set():
                    older.ping()

        threads = [threading.Thread(target=serve)]
        threads[0].start()
        try:
            older = join_at("w0", host, port, key, shape, epoch=1, kind=ChannelKind.TCP)
            threads.append(threading.Thread(target=keep_busy))
            threads[1].start()
            newer = join_at("w0", host, port, key, shape, epoch=2, kind=ChannelKind.TCP)
            assert newer.ping() == (64, 0)
            threads[1].join()  # its channel was closed
            for device in (older, newer):
                device.close()
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        loop.turn()  # reads the goodbye, if it was not read yet
