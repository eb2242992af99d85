"""The gRPC server: addresses, limits, certificates, health, reflection, and shutdown."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from hetis.commands.endpoints import joined
from hetis.planner.service.calls import Calls
from hetis.planner.service.limits import MAX_CALLS
from hetis.planner.service.methods import HEALTH_SERVICE, OPEN_SERVICES, REFLECTION_SERVICES
from hetis.planner.service.settings import is_socket_path, split_address

Status = Any  # health_pb2 has no type stubs


class ServiceHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """gRPC health of every service, and of the whole as ``""``: either all services serve, or none does.

    The servicer in grpcio-health-checking has a bug: the watchers of one service share a condition, which the first
    watcher to leave removes, so that the others never learn that the planner drains.
    """

    def __init__(self) -> None:
        self._services = {"", *OPEN_SERVICES}
        self._is_serving = False
        self._changed = asyncio.Event()

    def add(self, services: Iterable[str]) -> None:
        self._services.update(services)

    def serve(self, is_serving: bool) -> None:
        """Set whether all services serve or none does."""
        self._is_serving = is_serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's names
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        sent: Status = None
        while True:
            changed = self._changed
            if (status := self._status(request.service)) != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _status(self, service: str) -> Status:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._is_serving:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING


MAX_MESSAGE_BYTES = 4 * 2**20
MAX_METADATA_BYTES = 4 * 2**10
MAX_PENDING = 4_000
MAX_UNREAD_BYTES = 16 * 2**10
_log = logging.getLogger("hetis.planner.server")
_STREAMS_S = 2.0  # time for streams to end by themselves, before a drain ends them

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Agents ping every 10 s and clients every 30 s (docs/api.md): pings are allowed every 8 s, even without a call.
    ("grpc.http2.min_ping_interval_without_data_ms", 8_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Detects clients that vanished silently, whose streams would otherwise stay for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    # Connections end from time to time, so that those of 10,000 agents spread again after a restart.
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    # Idle connections are closed; clients reconnect with their next call.
    ("grpc.max_connection_idle_ms", 300_000),
    # Per connection: an agent has one connection with one stream; a caller may have 100 watches, and calls beside them.
    # The calls of strangers are held until they are refused, with their metadata: these limits bound their memory.
    ("grpc.max_concurrent_streams", 128),
    # Streams that have ended but are not freed yet; by default as many as may be open, beyond which new ones are reset.
    ("grpc.http2.max_deallocating_streams", 256),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Calls that wait to be accepted: beyond 1,000, by default, gRPC cancels calls by chance, and beyond 3,000 all.
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
    # What a stream may have sent that is not read yet. Without a probe for more, that is not raised: the reports of a
    # flood wait at their agents, where newer ones replace them, rather than here, for minutes.
    ("grpc.http2.lookahead_bytes", MAX_UNREAD_BYTES),
    ("grpc.http2.bdp_probe", 0),
    # Otherwise two planners on one port would each receive half of the calls.
    ("grpc.so_reuseport", 0),
)
MAX_CONNECTIONS = "grpc.max_allowed_incoming_connections"


class AddressError(Exception):
    """The planner cannot listen on an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servicing:
    """A service of the API: its full name, its servicer, and the generated function that registers it."""

    service: str
    servicer: Any
    add: Callable[[Any, grpc.aio.Server], None]


class PlannerServer:
    """A grpc.aio server and everything around the servicers. It creates none of its parts: all are passed in."""

    def __init__(
        self,
        servicings: Sequence[Servicing],
        calls: Calls,
        *,
        credentials: Callable[[], grpc.ServerCredentials] | None = None,
        max_connections: int | None = None,
    ) -> None:
        """``credentials``: called for each address, since gRPC tells only one address of new certificates."""
        self._calls = calls
        self._credentials = credentials
        options = OPTIONS
        if max_connections is not None:
            options += ((MAX_CONNECTIONS, max_connections),)
        self._server = grpc.aio.server(interceptors=[calls], options=options, maximum_concurrent_rpcs=MAX_CALLS)
        self.health = ServiceHealth()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._servicings = list(servicings)

    def add(self, servicings: Sequence[Servicing]) -> None:
        """Add services to those passed to the constructor; must be called before the start."""
        self._servicings += servicings

    def listen(self, address: str) -> str:
        """Bind an address and return it with the port chosen for 0. Raises AddressError if it cannot be used."""
        if is_socket_path(address):
            _must_not_answer(address)
        else:
            _must_be_free(address)  # gRPC itself would log it at length
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials())
        except RuntimeError:
            raise AddressError(f"cannot listen on {address}: it is in use or not permitted") from None
        return address if is_socket_path(address) else joined(split_address(address)[0], port)

    async def start(self) -> None:
        names = [servicing.service for servicing in self._servicings]
        for servicing in self._servicings:
            servicing.add(servicing.servicer, self._server)
        self.health.add(names)
        add_reflection([*names, HEALTH_SERVICE], self._server)
        await self._server.start()
        self.health.serve(True)

    async def drain(self, timeout_s: float, say_goodbye: Callable[[], Awaitable[None]]) -> bool:
        """Shut down in an orderly way; return whether every call could finish.

        Health reports NOT_SERVING and new calls fail with DRAINING; ``say_goodbye`` ends watches, and returns once
        agents have received the goodbye. Then the remaining streams are ended, and unary calls may finish. Whatever
        remains after ``timeout_s`` is cut off.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        self.health.serve(False)
        self._calls.refuse_new()
        try:
            await asyncio.wait_for(say_goodbye(), min(_STREAMS_S, timeout_s))
        except TimeoutError:
            _log.warning("agent streams and watches did not end in time")
        except Exception:
            _log.exception("sending the goodbye to agents failed")
        await self._calls.end_streams()
        finished = await self._calls.wait_for_unary(max(0.0, end - loop.time()))
        await self._server.stop(min(1.0, max(0.0, end - loop.time())))
        return finished

    async def stop_at_once(self) -> None:
        """Cut off all calls."""
        self._calls.refuse_new()
        await self._server.stop(None)


def _must_be_free(address: str) -> None:
    """Raise AddressError if an address is in use, not of this machine, or not allowed."""
    host, port = split_address(address)
    try:
        errors = [_error_of(*found) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        errors = [error]
    wrong = [error for error in errors if error is not None]
    taken = [error for error in wrong if error.errno == errno.EADDRINUSE]
    if taken or len(wrong) == len(errors):  # a name may have one address here, and one in a family not here
        first = (taken or wrong)[0]
        raise AddressError(f"cannot listen on {address}: {(first.strerror or str(first)).lower()}")


def _must_not_answer(address: str) -> None:
    """Raise AddressError if a process listens on a Unix socket: gRPC would take over its path.

    A socket that a killed process left behind does not answer, and is replaced.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # with a full backlog, the socket counts as answering
        try:
            probe.connect(address.removeprefix("unix:"))
        except BlockingIOError:
            pass
        except OSError:
            return  # any other problem with the path is left to gRPC
    raise AddressError(f"cannot listen on {address}: address already in use")


def _error_of(
    family: socket.AddressFamily, kind: socket.SocketKind, protocol: int, _name: str, where: tuple[Any, ...]
) -> OSError | None:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return error
    return None


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Allow tools such as grpcurl to read the API of ``services`` from the server."""
    servicer: Any = reflection.aio.ReflectionServicer([*services, *REFLECTION_SERVICES])
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in REFLECTION_SERVICES:
        methods = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
