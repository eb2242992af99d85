"""The gRPC server: addresses, limits, certificates, health, reflection, and how it goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from hetis.planner.service import reflection
from hetis.planner.service.addresses import is_socket_path, join_address, split_address
from hetis.planner.service.calls import Calls
from hetis.planner.service.health import SERVICE as HEALTH
from hetis.planner.service.health import Health

MAX_MESSAGE_BYTES = 4 * 2**20
_log = logging.getLogger("hetis.planner.server")
_STREAMS_S = 2.0  # how long streams have to end by themselves before a drain ends them

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 30 s (docs/api.md): allowed, also without a call, down to one in 20 s.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Finds clients that vanished without a word; their streams would stay for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Connections end now and then, so that those of 10,000 agents spread after a restart.
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    # Two planners on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
)


class AddressError(Exception):
    """An address cannot be listened on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servicing:
    """A service of the contract: its full name, what answers it, and the generated function that puts both together."""

    service: str
    servicer: Any
    add: Callable[[Any, grpc.aio.Server], None]


class PlannerServer:
    """A grpc.aio server with everything around the servicers. Makes nothing of its own up: all parts are given."""

    def __init__(
        self, servicings: Sequence[Servicing], calls: Calls, *, credentials: grpc.ServerCredentials | None = None
    ) -> None:
        self._calls = calls
        self._credentials = credentials
        self._server = grpc.aio.server(interceptors=[calls], options=OPTIONS)
        names = [servicing.service for servicing in servicings]
        for servicing in servicings:
            servicing.add(servicing.servicer, self._server)
        self.health = Health(names)
        self.health.add_to(self._server)
        reflection.add_reflection([*names, HEALTH], self._server)

    def listen(self, address: str) -> str:
        """Binds an address before the start, and returns it with the port that was chosen for 0.

        Raises:
            AddressError: in use, not of this machine, or not allowed.
        """
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            raise AddressError(f"cannot listen on {address}: it is in use, or not of this machine") from None
        return address if is_socket_path(address) else join_address(split_address(address)[0], port)

    async def start(self) -> None:
        """Begins to answer."""
        await self._server.start()
        self.health.serve(True)

    async def drain(self, timeout_s: float, say_goodbye: Callable[[], Awaitable[None]]) -> bool:
        """Goes away in order; whether every call could finish.

        Health says NOT_SERVING and new calls fail with DRAINING; ``say_goodbye`` lets agents and watches end; streams
        that stay are ended; unary calls finish; what is left after ``timeout_s`` is cut off.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        self.health.serve(False)
        self._calls.refuse_new()
        try:
            await asyncio.wait_for(say_goodbye(), min(_STREAMS_S, timeout_s))
        except TimeoutError:
            _log.warning("agents and watches did not end by themselves")
        except Exception:
            _log.exception("saying goodbye failed")
        await self._calls.end_streams()
        finished = await self._calls.wait_for_unary(max(0.0, end - loop.time()))
        await self._server.stop(min(1.0, max(0.0, end - loop.time())))
        return finished

    async def stop_at_once(self) -> None:
        """Cuts everything off."""
        self._calls.refuse_new()
        await self._server.stop(None)
