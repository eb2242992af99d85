"""DispatchService: an agent may call it for replicas whose primary is on its node; `DispatchStates` does the rest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.planner.fleet.running import RunningReplicas
from hetis.planner.service.identity import CallerRole, Identity, caller
from hetis.v1 import dispatch_service_pb2 as pb2
from hetis.v1 import dispatch_service_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class DispatchServicer(dispatch_service_pb2_grpc.DispatchServiceServicer):
    """Passes messages to the states and back; the interceptor translates failures."""

    def __init__(
        self, states: DispatchStates, replicas: RunningReplicas, *, require_lease: Callable[[], None] = lambda: None
    ) -> None:
        """``require_lease`` raises STORE_UNAVAILABLE if nothing may be decided; the interceptor checks unary calls."""
        self._states, self._replicas, self._require_lease = states, replicas, require_lease

    async def DispatchRequests(  # noqa: N802
        self, request_iterator: AsyncIterator[pb2.DispatchRequestsRequest], context: _Context
    ) -> AsyncIterator[pb2.DispatchRequestsResponse]:
        async for request in request_iterator:
            try:
                self._require_lease()
                self._require_primary(request.parent, CallerRole.ORCHESTRATOR)
                response = await self._states.step(request)
            except ServiceError as error:
                response = pb2.DispatchRequestsResponse(sequence=request.sequence, failure=error.to_proto())
            yield response

    async def AdmitRequests(  # noqa: N802  # gRPC's names
        self, request: pb2.AdmitRequestsRequest, context: _Context
    ) -> pb2.AdmitRequestsResponse:
        self._require_primary(request.parent, CallerRole.ORCHESTRATOR)
        return await self._states.admit(request)

    async def FinishRequests(  # noqa: N802
        self, request: pb2.FinishRequestsRequest, context: _Context
    ) -> pb2.FinishRequestsResponse:
        self._require_primary(request.parent, CallerRole.ORCHESTRATOR)
        return self._states.finish(request)

    async def GrowRequests(  # noqa: N802
        self, request: pb2.GrowRequestsRequest, context: _Context
    ) -> pb2.GrowRequestsResponse:
        self._require_primary(request.parent, CallerRole.ORCHESTRATOR)
        return self._states.grow(request)

    async def GetDispatchState(  # noqa: N802
        self, request: pb2.GetDispatchStateRequest, context: _Context
    ) -> pb2.GetDispatchStateResponse:
        self._require_primary(_replica_of(request.name), CallerRole.VIEWER)
        return self._states.get(request)

    async def UpdateDispatchState(  # noqa: N802
        self, request: pb2.UpdateDispatchStateRequest, context: _Context
    ) -> pb2.UpdateDispatchStateResponse:
        self._require_primary(_replica_of(request.dispatch_state.name), CallerRole.ORCHESTRATOR)
        return await self._states.update(request)

    def _require_primary(self, replica: str, role: CallerRole) -> None:
        """Check that an agent without ``role`` belongs to the node of the replica's primary.

        Raises:
            ServiceError: WRONG_NODE. Only callers that may know the cluster learn that a replica does not exist.
        """
        identity: Identity = caller()
        if role in identity.roles:
            return
        view = self._replicas.replica_view(replica)
        cluster, _, _ = replica.partition("/replicas/")
        identity.require_node(f"{cluster}/nodes/{view.primary_node if view else ''}")


def _replica_of(state: str) -> str:
    return state.removesuffix("/dispatchState")
