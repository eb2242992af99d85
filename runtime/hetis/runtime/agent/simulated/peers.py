"""Reports that a simulated engine receives from the engines of its replicas' primaries."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from google.protobuf.duration_pb2 import Duration

from hetis.runtime.agent.simulated.engine import SimulatedEngine
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.executor_service_pb2 import WatchReportsRequest
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub

ASK_S = 2.0  # an engine that does not answer within this time counts as not reached
AGAIN_S = 0.5
_INTERVAL = Duration(nanos=200_000_000)


class PeerWatches:
    """One watch per replica whose primary is on another node. `follow` keeps them in line with the assignments."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self._watches: dict[tuple[str, str], asyncio.Task[None]] = {}

    def follow(self) -> None:
        """Start and end watches as the assignments require."""
        wanted = set(self._engine.peers().items())
        for key in self._watches.keys() - wanted:
            self._watches.pop(key).cancel()
        for key in wanted - self._watches.keys():
            self._watches[key] = asyncio.create_task(self._watch(*key))

    async def changes_at(self, address: str) -> list[ChangeStatus] | None:
        """Return the present changes of the engine at ``address``, or None if it was not reached."""
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                async with asyncio.timeout(ASK_S):
                    async for report in ExecutorServiceStub(channel).WatchReports(WatchReportsRequest()):
                        return list(report.changes)
            except (grpc.aio.AioRpcError, TimeoutError):
                pass
        return None

    async def close(self) -> None:
        watches = list(self._watches.values())
        self._watches.clear()
        for watch in watches:
            watch.cancel()
        for watch in watches:
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _watch(self, replica: str, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    request = WatchReportsRequest(min_interval=_INTERVAL)
                    async for report in ExecutorServiceStub(channel).WatchReports(request):
                        self._engine.hear(replica, report)
                await asyncio.sleep(AGAIN_S)
