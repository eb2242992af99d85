"""A lost worker that is reached again delays no step of the engine, whatever it does."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from hetis.runtime.engine.generate import engine_from_folder
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.launch.returning import Returning
from hetis.runtime.launch.workers import Workers
from hetis.runtime.transport.connecting import Endpoint, publish
from hetis.runtime.transport.tcp import TcpPipe
from tests.runtime.checkpoints import random_model
from tests.runtime.worker.inproc import InprocWorker, with_workers


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline_s, "it never held"
        time.sleep(0.02)


def test_a_worker_that_takes_a_connection_and_says_nothing_delays_no_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    workers = Workers("127.0.0.1:0", ["w"], epoch=2, timeout_s=120, start_s=1)
    engine = engine_from_folder(random_model().folder, with_workers([InprocWorker("w", 40)]))
    engine.lose_device(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        here = Endpoint(host="127.0.0.1", port=silent.getsockname()[1], key=b"new" * 5)
        workers.meetings._met["w"] = replace(here, key=b"old" * 5)  # as it was met before it was lost
        publish(workers._store, "w", here)
        workers.bring_back(engine)
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1)  # it was greeted, and its answer is waited for
            engine.add([5, 6, 7], SamplingParams(max_tokens=12))
            while engine.has_work:
                workers.bring_back(engine)
                engine.step()
            assert engine.num_steps == 12
            assert workers.meetings.returning.under_way == ("w",)
    wait_for(lambda: not workers.meetings.returning.under_way)
    workers.bring_back(engine)
    assert "w is not back: w: " in caplog.text
    workers.close(engine)


def test_a_worker_that_this_machine_cannot_reach_is_tried_again_and_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("hetis.runtime.launch.meetings._AGAIN_S", 0.01)
    workers = Workers("127.0.0.1:0", ["w"], epoch=2, timeout_s=120, start_s=1)
    engine = engine_from_folder(random_model().folder, with_workers([InprocWorker("w", 40)]))
    engine.lose_device(1)
    tries = list[str]()

    def is_local(pipe: TcpPipe) -> bool:
        tries.append(pipe.name)
        raise OSError(errno.ENOTCONN, "not connected")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        here = Endpoint(host="127.0.0.1", port=silent.getsockname()[1], key=b"new" * 5)
        workers.meetings._met["w"] = replace(here, key=b"old" * 5)
        publish(workers._store, "w", here)
        with monkeypatch.context() as patched:
            patched.setattr(TcpPipe, "is_local", property(is_local))

            def was_tried_again() -> bool:
                workers.bring_back(engine)
                return len(tries) >= 4

            wait_for(was_tried_again)
            wait_for(lambda: not workers.meetings.returning.under_way)
        for _ in tries:
            silent.accept()[0].close()
        workers.bring_back(engine)  # the last attempt's failure, and another attempt
        workers.bring_back(engine)
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1)  # it is greeted
    assert caplog.text.count("w is not back") == 1
    assert "w is not back: w: [Errno 107] not connected" in caplog.text
    workers.close(engine)


def test_attempts_are_made_one_at_a_time_and_told_once() -> None:
    returning, tries = Returning(), list[str]()
    shape = engine_from_folder(random_model().folder, with_workers([])).stage.shape
    found = InprocWorker("w", 4).join(shape)

    def fail() -> None:
        tries.append("fail")
        raise DeviceLostError("w", "it is not there")

    assert returning.ask("w", fail) is None
    wait_for(lambda: not returning.under_way)
    with pytest.raises(DeviceLostError, match="it is not there"):
        returning.ask("w", fail)
    assert returning.ask("w", lambda: found) is None
    wait_for(lambda: not returning.under_way)
    assert returning.ask("w", fail) is found
    assert tries == ["fail"]
    returning.ask("w", lambda: found)
    returning.close()
    wait_for(lambda: found.is_lost)
