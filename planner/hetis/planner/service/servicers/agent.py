"""AgentService: the stream of an agent for the node in its credentials; the fleet does the rest."""

# ruff: noqa: N802  # gRPC's names

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.service.identity import caller
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import agent_service_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class AgentServicer(agent_service_pb2_grpc.AgentServiceServicer):
    """Passes messages to the fleet and back; the interceptor translates failures."""

    def __init__(self, fleet: LiveFleet) -> None:
        self._fleet = fleet

    async def ConnectNode(
        self, request_iterator: AsyncIterator[pb.ConnectNodeRequest], context: Context
    ) -> AsyncIterator[pb.ConnectNodeResponse]:
        async with aclosing(self._fleet.connect(caller(), request_iterator)) as responses:
            async for response in responses:
                yield response
