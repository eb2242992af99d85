"""Attention workers in processes of their own: what is killed or hangs is lost in time, and computes again."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import sleep

import pytest
import torch

from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.transport.connecting import ChannelKind
from tests.runtime.attention.test_ranges import MIXED, Case, check, step
from tests.runtime.worker.listening import ListeningWorker, listening_worker

CASE = Case(**MIXED, r=3, d=16, page_tokens=16, dtype="float32")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ListeningWorker]:
    with listening_worker(tmp_path_factory.mktemp("worker")) as found:
        yield found


@pytest.mark.parametrize("kind", [ChannelKind.SHM, ChannelKind.TCP])
def test_a_hung_process_is_lost_after_the_time_out_and_serves_the_next_engine_when_it_wakes(
    worker: ListeningWorker, kind: ChannelKind
) -> None:
    epoch = 10 if kind is ChannelKind.SHM else 20
    device = worker.join(CASE.shape(), epoch=epoch, kind=kind, timeout_s=5.0)
    begin_and_attend(device)
    worker.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DeviceLostError):
            device.attend(1, ROWS).wait()
        assert device.is_lost
    finally:
        worker.process.send_signal(signal.SIGCONT)
    again = worker.join(CASE.shape(), epoch=epoch + 1, kind=kind)
    assert again.ping() == (again.num_pages, 0), "of the engine before nothing is left"
    check(again, CASE)
    again.close()


@pytest.mark.parametrize("kind", [ChannelKind.SHM, ChannelKind.TCP])
def test_a_killed_process_is_lost_at_once_however_long_the_time_out(tmp_path: Path, kind: ChannelKind) -> None:
    with listening_worker(tmp_path) as doomed:
        device = doomed.join(CASE.shape(), epoch=1, kind=kind, timeout_s=600)
        begin_and_attend(device)
        doomed.process.kill()
        with pytest.raises(DeviceLostError):
            device.attend(1, ROWS).wait()


ROWS = torch.zeros(4, CASE.r + 2, CASE.d)


def begin_and_attend(device) -> None:  # type: ignore[no-untyped-def]
    """Is in the middle of a step of one sequence."""
    device.begin(step([0], [0], [4]))
    device.attend(0, ROWS).wait()


def test_connections_that_say_nothing_hold_up_nobody(worker: ListeningWorker) -> None:
    with ExitStack() as probes:
        for _ in range(5):  # each of them once held a worker up for 10 s
            probes.enter_context(socket.create_connection((worker.host, worker.port), timeout=30))
        device = worker.join(CASE.shape(), epoch=30, timeout_s=30)
        assert device.ping() == (device.num_pages, 0)
        for _ in range(5):
            probes.enter_context(socket.create_connection((worker.host, worker.port), timeout=30))
        sleep(0.3)  # until the worker, which hears nothing, has looked at them
        assert device.ping() == (device.num_pages, 0)
        device.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_real_gpu_of_another_process_computes_what_is_defined(tmp_path: Path, dtype: str) -> None:
    case = Case(**MIXED, r=4, d=64, page_tokens=16, window=19, dtype=dtype)
    with listening_worker(tmp_path, "--device", "cuda:0", kv_memory="64MiB") as remote:
        device = remote.join(case.shape(), epoch=1)
        check(device, case)
        device.close()
