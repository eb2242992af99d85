"""gRPC health of every service, and of the whole as ``""``.

The servicer in grpcio-health-checking has a bug: the watchers of one service share a condition, which the first one
to leave removes, so that the others are never told that the planner drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "grpc.health.v1.Health"
Status = Any  # health_pb2 has no types


class ServiceHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health of all services: either all serve, or none."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = {"", SERVICE, *services}
        self._is_serving = False
        self._changed = asyncio.Event()

    def add(self, services: Iterable[str]) -> None:
        """Add services to those given before."""
        self._services.update(services)

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def serve(self, is_serving: bool) -> None:
        """Set whether all services serve, or none."""
        self._is_serving = is_serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's names
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        told: Status = None
        while True:
            changed = self._changed
            if (status := self._status(request.service)) != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _status(self, service: str) -> Status:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._is_serving:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING
