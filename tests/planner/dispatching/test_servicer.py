"""DispatchService over a real connection, and who may call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import pytest

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.planner.service.calls import Calls
from hetis.planner.service.credentials import NoCredentials
from hetis.planner.service.identity import Identity, Role, set_caller
from hetis.planner.service.metrics import Metrics
from hetis.planner.service.server import PlannerServer, Servicing
from hetis.planner.service.servicers.dispatch import DispatchServicer
from hetis.planner.service.telemetry import Telemetry
from hetis.planner.service.traces import NoTraces
from hetis.v1 import dispatch_service_pb2 as pb2
from hetis.v1 import dispatch_service_pb2_grpc
from tests.planner.dispatching.stages import REPLICA, STATE, Replica, Replicas, empty_map, stage_model

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@asynccontextmanager
async def stub() -> AsyncIterator[dispatch_service_pb2_grpc.DispatchServiceAsyncStub]:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    states = DispatchStates(replicas)
    await states.warm_up()
    servicing = Servicing(
        service="hetis.v1.DispatchService",
        servicer=DispatchServicer(states, replicas),
        add=dispatch_service_pb2_grpc.add_DispatchServiceServicer_to_server,
    )
    server = PlannerServer([servicing], Calls(NoCredentials(), Telemetry(Metrics("0"), NoTraces())))
    address = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield dispatch_service_pb2_grpc.DispatchServiceStub(channel)
    finally:
        await server.stop_at_once()


def test_an_engine_declares_admits_grows_finishes_and_reads_back() -> None:
    async def session() -> None:
        async with stub() as service:
            state = pb2.DispatchState(name=STATE, generation=1, head_maps=[empty_map(stage_model(2))])
            update = pb2.UpdateDispatchStateRequest(dispatch_state=state)
            state_id = (await service.UpdateDispatchState(update, timeout=5)).state_id
            known: dict[str, Any] = {"parent": REPLICA, "state_id": state_id}
            new = pb2.NewRequest(id="a", context_tokens=10, growth_tokens=5)
            admitted = await service.AdmitRequests(pb2.AdmitRequestsRequest(requests=[new], **known), timeout=5)
            assert [placement.request for placement in admitted.placements] == ["a"]
            growth = pb2.Growth(id="a", context_tokens=12)
            await service.GrowRequests(pb2.GrowRequestsRequest(requests=[growth], **known), timeout=5)
            read = await service.GetDispatchState(pb2.GetDispatchStateRequest(name=STATE), timeout=5)
            assert read.dispatch_state.state_id == state_id
            (request,) = read.dispatch_state.head_maps[0].requests
            assert (request.context_tokens, request.remaining_tokens) == (12, 3)
            await service.FinishRequests(pb2.FinishRequestsRequest(requests=["a"], **known), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.FinishRequests(pb2.FinishRequestsRequest(parent=REPLICA, requests=["a"]), timeout=5)
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION

    asyncio.run(session())


def agent_of(node: str) -> Identity:
    return Identity(name="agent", roles=frozenset({Role.AGENT}), scope=f"clusters/c/nodes/{node}")


def called_by(identity: Identity, method: Callable[[Request, Any], Awaitable[Answer]], request: Request) -> Answer:
    """Answer as the service does it: the caller is known in the call's task and nowhere else."""

    async def call() -> Answer:
        set_caller(identity)
        return await method(request, None)

    return asyncio.run(call())


@pytest.mark.parametrize("name", [STATE, "clusters/c/replicas/none/dispatchState", "nonsense"])
def test_an_agent_of_another_node_learns_nothing(name: str) -> None:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    servicer = DispatchServicer(DispatchStates(replicas), replicas)
    with pytest.raises(ServiceError) as caught:
        called_by(agent_of("elsewhere"), servicer.GetDispatchState, pb2.GetDispatchStateRequest(name=name))
    assert caught.value.reason == Reason.ERROR_REASON_WRONG_NODE


def test_the_agent_of_the_primary_and_those_with_a_role_may_read() -> None:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    servicer = DispatchServicer(DispatchStates(replicas), replicas)
    for identity in (agent_of("n"), Identity(name="viewer", roles=Role.VIEWER.includes)):
        answer = called_by(identity, servicer.GetDispatchState, pb2.GetDispatchStateRequest(name=STATE))
        assert answer.dispatch_state.generation == 1


def test_a_viewer_changes_nothing() -> None:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    servicer = DispatchServicer(DispatchStates(replicas), replicas)
    viewer = Identity(name="viewer", roles=Role.VIEWER.includes)
    with pytest.raises(ServiceError):
        called_by(viewer, servicer.FinishRequests, pb2.FinishRequestsRequest(parent=REPLICA, requests=["a"]))
