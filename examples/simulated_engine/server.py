"""A simulated engine in real time: `ExecutorService` on a Unix socket for its agent, reports over TCP for its peers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import ControlFile
from hetis.runtime.moves.engine import SteeredEngine
from hetis.runtime.moves.servicer import ExecutorServicer, bind, bind_socket, stop
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1 import executor_service_pb2_grpc
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.executor_service_pb2 import WatchReportsRequest
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub

T = TypeVar("T")

LONGEST_STEP_S = 0.05  # longest time between two checks of the clock
CONTROL_S = 0.5  # interval between checks of the control file
_log = logging.getLogger(__name__)
ASK_S = 2.0  # an engine that does not answer within this time counts as not reached
AGAIN_S = 0.5
_INTERVAL = Duration(nanos=200_000_000)


class SimulatedServer:
    """Runs one engine until it is closed. Implements `EngineHost`.

    The agent connects to ``socket``, which is created for this user only, and other engines read at ``peer_address``,
    where port 0 means any. ``control`` is a file that is checked while running; without it the engine is idle.
    """

    def __init__(
        self,
        engine: SimulatedEngine,
        socket: Path,
        *,
        peer_address: str = "127.0.0.1:0",
        control: ControlFile | None = None,
    ) -> None:
        self.engine = engine
        self.address = ""  # address at which other engines read, once started
        self._socket, self._peer_address, self._control = socket, peer_address, control
        self._stepped, self._peers = asyncio.Event(), PeerWatches(engine)
        self._servers: list[grpc.aio.Server] = []
        self._loop: asyncio.Task[None] | None = None
        self._warming: threading.Thread | None = None

    async def start(self) -> None:
        """Start serving and decoding. Raises OSError if the socket or the address cannot be bound."""
        self._look_at_control()
        self.engine.when_primary = self.warm_up
        servicer = ExecutorServicer(self)
        agent, peers = grpc.aio.server(), grpc.aio.server()
        executor_service_pb2_grpc.add_ExecutorServiceServicer_to_server(servicer, agent)
        _add_peer_methods(servicer, peers)
        bind_socket(agent, self._socket)
        self.address = f"{self._peer_address.rpartition(':')[0]}:{bind(peers, self._peer_address)}"
        self._servers = [agent, peers]
        for server in self._servers:
            await server.start()
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop immediately. Running requests are lost."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        await self._peers.close()
        for server in self._servers:
            await stop(server)
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()

    async def wait(self) -> None:
        """Wait until the decode loop ends, which only an error causes."""
        assert self._loop is not None
        await self._loop

    def warm_up(self) -> None:
        """Prepare admission in a thread, once, because this node is to run a primary."""

        def warm_up() -> None:
            try:
                self.engine.admission.warm_up()
            finally:
                self.engine.is_warm = True

        if self._warming is None:
            self.engine.is_warm = False
            _log.info("preparing admission: replicas are loading until then, up to a minute if kernels are compiled")
            # Not asyncio's pool, for whose threads a process that is told to stop would wait.
            self._warming = threading.Thread(target=warm_up, name="admission", daemon=True)
            self._warming.start()

    async def do(self, work: Callable[[SteeredEngine[Any], float], T]) -> T:
        return work(self.engine, time.monotonic())

    async def stepped(self) -> None:
        """Wait until the engine has checked the clock again."""
        await self._stepped.wait()

    async def read_authority(self, change_id: str) -> Iterable[ChangeStatus] | None:
        address = self.engine.authority_of(change_id)
        return None if address is None else await self._peers.changes_at(address)

    def _look_at_control(self) -> None:
        if self._control is not None:
            if self._control.look():
                _log.info("control file: %s", self._control.control)
            self.engine.control = self._control.control

    async def _run(self) -> None:
        looked_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if now_s - looked_s >= CONTROL_S:
                looked_s = now_s
                self._look_at_control()
            self.engine.catch_up(now_s)
            self.engine.step(now_s)
            self._peers.follow()
            self._stepped.set()
            self._stepped = asyncio.Event()
            await asyncio.sleep(min(max(self.engine.next_s() - time.monotonic(), 0.001), LONGEST_STEP_S))


def _add_peer_methods(servicer: ExecutorServicer, server: grpc.aio.Server) -> None:
    """Register the methods that other engines may call. All others are UNIMPLEMENTED there."""
    watch: Any = grpc.unary_stream_rpc_method_handler(
        servicer.WatchReports,
        request_deserializer=messages.WatchReportsRequest.FromString,
        response_serializer=messages.WatchReportsResponse.SerializeToString,
    )
    service = messages.DESCRIPTOR.services_by_name["ExecutorService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"WatchReports": watch}),))


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
            with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
                async with asyncio.timeout(ASK_S):
                    async for report in ExecutorServiceStub(channel).WatchReports(WatchReportsRequest()):
                        return list(report.changes)
        return None

    async def close(self) -> None:
        watches = list(self._watches.values())
        self._watches.clear()
        for watch in watches:
            watch.cancel()
        for ended in await asyncio.gather(*watches, return_exceptions=True):
            if isinstance(ended, Exception):  # a bug of ours; a CancelledError is not an Exception
                _log.error("a watch of another engine ended", exc_info=ended)

    async def _watch(self, replica: str, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    request = WatchReportsRequest(min_interval=_INTERVAL)
                    async for report in ExecutorServiceStub(channel).WatchReports(request):
                        self._engine.hear(replica, report)
                await asyncio.sleep(AGAIN_S)
