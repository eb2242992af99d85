"""The client of an engine's socket, against a simulated engine that serves one."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import Control
from examples.simulated_engine.server import SimulatedServer
from examples.simulated_engine.stage import ProportionalAdmission
from hetis.runtime.agent.executor import SocketExecutor, check_socket
from hetis.runtime.moves.refusals import RefusedError, reason_name, stale_epoch
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    FlipMovesRequest,
    ReadHeadMapsRequest,
    ReleaseMovesRequest,
    ReserveMovesRequest,
    WatchReportsRequest,
)
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub
from hetis.v1.replica_pb2 import EnginePeer
from tests.runtime.agent.builders import ABORTED, FLIPPED, REPLICA, TARGET, assignment, change
from tests.runtime.agent.recording import RecordingExecutor


async def test_refusals_cross_the_socket_with_reason_and_metadata(tmp_path: Path) -> None:
    server = SimulatedServer(SimulatedEngine("p", 1), tmp_path / "e.sock")
    await server.start()
    executor = SocketExecutor(tmp_path / "e.sock")
    await executor.call(ApplyAssignmentRequest(epoch=5, generation=1, assignment=assignment()))
    with pytest.raises(RefusedError) as refused:
        await executor.call(ApplyAssignmentRequest(epoch=4, generation=2, assignment=assignment()))
    assert refused.value.failure.metadata == stale_epoch(4, 5).metadata
    assert reason_name(refused.value.failure) == "STALE_EPOCH"
    with pytest.raises(RefusedError) as refused:
        await executor.call(ReadHeadMapsRequest(replica="x"))
    assert reason_name(refused.value.failure) == "NOT_FOUND"
    await server.close()
    with pytest.raises(RefusedError) as refused:
        await executor.call(ReleaseMovesRequest(epoch=5, change_id="x"))
    assert reason_name(refused.value.failure) == "ENGINE_UNREACHABLE"
    await executor.close()


def test_an_engine_that_prepares_its_admission_can_be_stopped(tmp_path: Path) -> None:
    """It used to stop only after its kernels had been compiled, which takes up to a minute."""
    prepared = threading.Event()

    class Slow(ProportionalAdmission):
        def warm_up(self) -> None:
            prepared.wait()

    async def story() -> None:
        server = SimulatedServer(SimulatedEngine("p", 1, admission=Slow()), tmp_path / "p.sock")
        await server.start()
        server.warm_up()
        assert not server.engine.is_warm
        await server.close()

    limit = threading.Timer(30.0, prepared.set)
    limit.start()
    try:
        asyncio.run(story())
        assert not prepared.is_set()
    finally:
        limit.cancel()
        prepared.set()


def test_calls_have_ended_when_an_engine_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An event loop that closes while they run cancels them, and gRPC logs a traceback for each."""
    request = WatchReportsRequest(min_interval=Duration(nanos=10_000_000))

    async def story() -> list[str]:
        server = SimulatedServer(SimulatedEngine("p", 1), tmp_path / "p.sock")
        await server.start()
        with grpc.insecure_channel(server.address) as channel:
            calls = [ExecutorServiceStub(channel).WatchReports(request) for _ in range(20)]  # type: ignore[no-untyped-call]
            for call in calls:
                await asyncio.to_thread(next, call)
            await server.close()
            return [str(task.get_coro()) for task in asyncio.all_tasks()]

    assert not [name for name in asyncio.run(story()) if "_schedule_rpc_coro" in name]
    assert not [record for record in caplog.records if record.name.startswith("grpc")]


async def test_an_engine_learns_the_outcome_from_the_engine_of_the_primary(tmp_path: Path) -> None:
    """The engine uses the connection to its peer: once prepared, it does not guess but follows the authority."""
    primary = SimulatedServer(SimulatedEngine("p", 1), tmp_path / "p.sock")
    worker = SimulatedServer(SimulatedEngine("w", 1), tmp_path / "w.sock")
    primary.engine.control = Control(rate_rps=50, output_tokens=5000, load_s=0, dense_step_s=0.01)
    for server in (primary, worker):
        await server.start()
    peers = [EnginePeer(node="p", address=primary.address)]
    executors = {"p": SocketExecutor(tmp_path / "p.sock"), "w": SocketExecutor(tmp_path / "w.sock")}
    for node, executor in executors.items():
        what = assignment(node, peers=peers)
        await executor.call(ApplyAssignmentRequest(epoch=1, generation=1, assignment=what))
    moved = change(timeout_s=30)
    request = ReserveMovesRequest(epoch=1, change=moved, parts=[TARGET])
    await executors["w"].call(request)
    await executors["w"].call(CopyMovesRequest(epoch=1, change_id=moved.change_id))
    expired = AbortMovesRequest(epoch=1, change_id=moved.change_id)
    expired.failure.reason = 104  # PREPARE_EXPIRED: the authority does not know of the change yet
    with pytest.raises(RefusedError, match="does not know of the change yet"):
        await executors["w"].call(expired)
    await executors["p"].call(expired)
    assert (await executors["w"].call(expired)).outcome == ABORTED
    async with asyncio.timeout(60):  # the load of its device arrives by the same connection
        while not worker.engine.report(time.monotonic()).devices[0].used_blocks:
            await asyncio.sleep(0.05)
    await primary.close()
    for executor in executors.values():
        await executor.close()
    await worker.close()


async def test_a_silent_engine_is_asked_again_and_one_that_hangs_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.agent.executor.SILENCE_S", 0.1)
    server = SimulatedServer(SimulatedEngine("p", 1), tmp_path / "e.sock")
    await server.start()
    executor = SocketExecutor(tmp_path / "e.sock")
    async with asyncio.timeout(60):
        for _ in range(3):  # an idle engine, which has nothing new to report, answers each time
            assert [report.engine_id async for report in executor.watch_reports(0.01)] == [server.engine.engine_id]

        async def hang(work: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(server, "do", hang)
        monkeypatch.setattr("hetis.runtime.agent.executor.CALL_S", 0.5)
        with pytest.raises(RefusedError, match="the engine did not report within") as refused:
            async for _ in executor.watch_reports(0.01):
                pass
    assert reason_name(refused.value.failure) == "ENGINE_UNREACHABLE"
    await executor.close()
    await server.close()


@pytest.mark.parametrize("mode", [0o666, 0o722])
def test_a_socket_that_others_may_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "e.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(mode)
        with pytest.raises(RefusedError, match=f"its mode is {mode:o}, which lets other users write to it"):
            check_socket(path)
        path.chmod(0o600)
        check_socket(path)


def test_a_socket_of_another_user_or_no_socket_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.sock"
    with pytest.raises(RefusedError, match="No such file"):
        check_socket(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(RefusedError, match="it is not a socket"):
        check_socket(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        with pytest.raises(RefusedError, match="it belongs to user"):
            check_socket(path)


async def test_the_recording_executor_remembers_what_it_was_asked() -> None:
    flip = FlipMovesRequest(epoch=1, change_id=REPLICA)
    refused = AbortMovesRequest(epoch=1, change_id="no")
    executor = RecordingExecutor(lambda request: stale_epoch(1, 2) if request == refused else None)
    assert (await executor.call(flip)).outcome == FLIPPED
    with pytest.raises(RefusedError):
        await executor.call(refused)
    assert executor.asked == [flip, refused]
