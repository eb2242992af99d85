"""Engines that the agent starts, from the assignment to the last process, with a stand-in for vLLM."""

from __future__ import annotations

import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hetis.runtime.agent.launched.executor import Front, num_at_work
from hetis.runtime.agent.launched.processes import OLD_LOGS
from hetis.runtime.agent.pressure import EngineNews, EngineReading, ScrapeState
from hetis.runtime.moves.refusals import RefusedError
from hetis.v1.change_pb2 import Change, ChangeOutcome
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    FlipMovesRequest,
    ReadHeadMapsRequest,
    ReserveMovesRequest,
)
from hetis.v1.failure_pb2 import ErrorReason
from tests.runtime.agent.launched.assigning import (
    LOAD,
    REPLICA,
    SERVE,
    applying,
    assigned,
    control,
    lives,
    removing,
    replica_on,
)
from tests.runtime.agent.launched.executing import OTHER, node_in


@pytest.mark.parametrize(
    ("read", "counts", "at_work"),
    [
        (True, [(2, 1), (0, 4)], 7),
        (True, [(0, 0)], 0),
        (True, [(0, None)], None),
        (True, [(2, 1), (None, 0)], None),
        (True, [], None),
        (False, [(2, 1)], None),
    ],
)
def test_requests_at_work_are_known_only_if_an_engine_tells_of_all(
    read: bool, counts: list[tuple[int | None, int | None]], at_work: int | None
) -> None:
    """An engine that is drained is stopped when it has none."""
    readings = {
        f"m{i}": EngineReading(model=f"m{i}", num_running=running, num_waiting=waiting)
        for i, (running, waiting) in enumerate(counts)
    }
    state = ScrapeState.READ if read else ScrapeState.UNREACHABLE
    assert num_at_work(EngineNews(state=state, readings=readings)) == at_work


@pytest.mark.parametrize(
    ("status", "body", "serves"),
    [
        (200, b'{"data": [{"id": "tiny"}]}', True),
        (200, b'{"data": []}', False),
        (200, b"{}", False),
        (200, b"<html>", False),
        (401, b"", True),
        (403, b"", True),
        (503, b'{"data": [{"id": "tiny"}]}', False),
    ],
)
def test_an_engine_serves_if_it_lists_a_model_or_asks_for_a_key(status: int, body: bytes, serves: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert Front(f"127.0.0.1:{server.server_port}").serves_a_model() is serves
        thread.join()


async def test_an_assignment_is_loading_until_the_engine_is_well_and_serves_only_when_it_is_to(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        control(tmp_path, loading=True)
        assert await node.apply(applying(assigned(goal=LOAD))) == "LOADING"
        await node.until_lives("started")
        assert (await node.until_state("LOADING")).HasField("failure") is False
        control(tmp_path, running=3)
        loaded = await node.until_state("LOADED")
        assert (loaded.is_primary, loaded.endpoint) == (True, f"127.0.0.1:{node.settings.port}")
        assert await node.apply(applying(assigned(goal=SERVE), 2)) == "SERVING"
        served = await node.until(lambda report: report.replicas[0].num_running == 3)
        assert (served.replicas[0].generation, served.newest_epoch) == (2, 1)
        assert [(one.index, one.total_blocks, one.used_blocks) for one in served.devices] == [(0, 400, 100)]
        assert lives(tmp_path) == ["started"], "another goal starts nothing"
        control(tmp_path)


async def test_an_engine_that_is_killed_is_loading_with_its_log_and_comes_back(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        await node.apply(applying(assigned()))
        await node.until_state("SERVING")
        (first,) = node.sessions()
        os.kill(first, signal.SIGKILL)
        down = await node.until_state("LOADING")
        assert down.failure.reason == ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE
        assert "vllm was ended by signal 9; the end of " in down.failure.message
        assert "fake: has child" in down.failure.message, "the last lines of its log"
        back = await node.until_state("SERVING")
        assert not back.HasField("failure")
        (second,) = node.sessions()
        assert first != second
        assert lives(tmp_path) == ["started", "started"]


async def test_an_engine_that_falls_silent_is_killed_and_started_again(tmp_path: Path) -> None:
    async with node_in(tmp_path, silence_timeout="5s") as node:
        await node.apply(applying(assigned()))
        await node.until_state("SERVING")
        control(tmp_path, silent=True)
        down = await node.until_state("LOADING")
        assert f"has not answered http://127.0.0.1:{node.settings.port}/health for 5 s" in down.failure.message
        control(tmp_path)
        await node.until_state("SERVING")
        assert lives(tmp_path) == ["started", "started"]


async def test_an_engine_that_does_not_come_is_given_up_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.launch.processes.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("hetis.runtime.launch.processes.LONGEST_WAIT_S", 0.02)
    async with node_in(tmp_path) as node:
        control(tmp_path, fails="CUDA out of memory")
        assert await node.apply(applying(assigned())) == "LOADING"
        failed = await node.until_state("FAILED")
        assert failed.failure.message.startswith("vllm ended with 1; the end of ")
        assert failed.failure.message.endswith("CUDA out of memory")
        logs = sorted(file.name for file in (tmp_path / "engines" / "replicas" / "p-0").glob("*.log*"))
        assert logs == ["vllm.log", *(f"vllm.log.{number}" for number in range(1, OLD_LOGS + 1))]
        assert node.sessions() == []
        assert await node.apply(removing()) == "STOPPED"
        control(tmp_path)
        assert await node.apply(applying(assigned(), 10)) == "LOADING", "a new assignment is tried anew"
        await node.until_state("SERVING")


async def test_an_engine_that_is_never_ready_is_killed_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with node_in(tmp_path, ready_timeout="3s") as node:
        control(tmp_path, loading=True)
        await node.apply(applying(assigned()))
        await node.until_lives("started", "started")
        assert f"p-0: vllm did not answer http://127.0.0.1:{node.settings.port}/health for 3 s" in caplog.text
        control(tmp_path)
        await node.until_state("SERVING")


async def test_a_program_that_is_not_there_is_a_failure_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.launch.processes.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("hetis.runtime.launch.processes.LONGEST_WAIT_S", 0.02)
    async with node_in(tmp_path, program="no-such-vllm serve") as node:
        await node.apply(applying(assigned()))
        assert (await node.until_state("FAILED")).failure.message == "no-such-vllm: No such file or directory"


async def test_a_replica_that_changes_is_started_anew_once_the_old_one_is_gone(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        await node.apply(applying(assigned(replica_on("a/0"))))
        await node.until_state("SERVING")
        await node.apply(applying(assigned(replica_on("a/0", micro_batch=8)), 2))
        assert (await node.until_state("LOADING")).generation == 2
        await node.until_state("SERVING")
        assert lives(tmp_path) == ["started", "told 0", "started"]


async def test_replicas_on_other_gpus_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        await node.apply(applying(assigned(replica_on("a/0"))))
        await node.until_state("SERVING")
        control(tmp_path, running=1)
        await node.apply(removing())
        await node.apply(applying(assigned(replica_on("a/1"), name=OTHER)))
        found = await node.until_state("SERVING", OTHER)
        assert found.endpoint == f"127.0.0.1:{node.settings.port + 1}"
        assert lives(tmp_path) == ["started", "started"], "the first still drains"


async def test_old_planners_and_old_generations_are_refused(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        await node.apply(applying(assigned(), 5, epoch=3))
        for request, reason in (
            (applying(assigned(), 6, epoch=2), ErrorReason.ERROR_REASON_STALE_EPOCH),
            (removing(epoch=2), ErrorReason.ERROR_REASON_STALE_EPOCH),
            (applying(assigned(), 4, epoch=3), ErrorReason.ERROR_REASON_GENERATION_MISMATCH),
        ):
            with pytest.raises(RefusedError) as caught:
                await node.apply(request)
            assert caught.value.failure.reason == reason
        assert (await node.report()).replicas[0].generation == 5


async def test_heads_do_not_move_in_a_replica_without_attention_workers(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        await node.apply(applying(assigned(), epoch=1))
        calls = (
            node.executor.call(ReserveMovesRequest(epoch=1, change=Change(change_id="c", replica=REPLICA))),
            node.executor.call(FlipMovesRequest(epoch=1, change_id="c")),
            node.executor.call(ReadHeadMapsRequest(replica=REPLICA)),
        )
        for call in calls:
            with pytest.raises(RefusedError, match="has no attention workers, so its heads cannot move"):
                await call
        with pytest.raises(RefusedError, match="change d is not known"):
            await node.executor.call(FlipMovesRequest(epoch=1, change_id="d"))
        with pytest.raises(RefusedError, match="another is not here"):
            await node.executor.call(ReadHeadMapsRequest(replica="another"))
        aborted = await node.executor.call(AbortMovesRequest(epoch=1, change_id="c"))
        assert aborted.outcome == ChangeOutcome.CHANGE_OUTCOME_ABORTED
