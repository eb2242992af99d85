"""DispatchService over a real connection, and its access control."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import pytest

from hetis.planner.callers import CallerRole, Identity, set_present_caller
from hetis.planner.client import AsyncClient, AsyncDispatchStream, CallError, Client, DispatchStream
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.planner.service.calls import Calls
from hetis.planner.service.credentials import NoCredentials
from hetis.planner.service.metrics import ServiceMetrics
from hetis.planner.service.server import PlannerServer, Servicing
from hetis.planner.service.servicers import dispatch_methods, servicing
from hetis.planner.service.telemetry import Telemetry
from hetis.v1 import dispatch_service_pb2 as pb2
from hetis.v1 import dispatch_service_pb2_grpc
from tests.planner.dispatching.stages import REPLICA, STATE, Replica, Replicas, empty_map, stage_model

Request = TypeVar("Request")
Answer = TypeVar("Answer")


def dispatching(states: DispatchStates, replicas: Replicas, **named: Any) -> Servicing:
    return servicing("DispatchService", dispatch_methods(states, replicas, **named))


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """Serve a planner with one replica; yield its address."""
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    states = DispatchStates(replicas)
    await states.warm_up()
    server = PlannerServer([dispatching(states, replicas)], Calls(NoCredentials(), Telemetry(ServiceMetrics("0"))))
    address = server.listen("127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop_at_once()


@asynccontextmanager
async def stub() -> AsyncIterator[dispatch_service_pb2_grpc.DispatchServiceAsyncStub]:
    async with (
        served() as address,
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield dispatch_service_pb2_grpc.DispatchServiceStub(channel)


async def test_an_engine_declares_admits_grows_finishes_and_reads_back() -> None:
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


def agent_of(node: str) -> Identity:
    return Identity(name="agent", roles=frozenset({CallerRole.AGENT}), scope=f"clusters/c/nodes/{node}")


def called_by(identity: Identity, method: Callable[[Request, Any], Awaitable[Answer]], request: Request) -> Answer:
    """Return the answer as the service computes it, with the caller set only in the call's task."""

    async def call() -> Answer:
        set_present_caller(identity)
        return await method(request, None)

    return asyncio.run(call())


@pytest.mark.parametrize("name", [STATE, "clusters/c/replicas/none/dispatchState", "nonsense"])
def test_an_agent_of_another_node_learns_nothing(name: str) -> None:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    servicer = dispatching(DispatchStates(replicas), replicas).servicer
    with pytest.raises(ServiceError) as caught:
        called_by(agent_of("elsewhere"), servicer.GetDispatchState, pb2.GetDispatchStateRequest(name=name))
    assert caught.value.reason == Reason.ERROR_REASON_WRONG_NODE


def test_the_agent_of_the_primary_and_those_with_a_role_may_read() -> None:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    servicer = dispatching(DispatchStates(replicas), replicas).servicer
    for identity in (agent_of("n"), Identity(name="viewer", roles=CallerRole.VIEWER.includes)):
        answer = called_by(identity, servicer.GetDispatchState, pb2.GetDispatchStateRequest(name=STATE))
        assert answer.dispatch_state.generation == 1


def test_a_viewer_changes_nothing() -> None:
    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    servicer = dispatching(DispatchStates(replicas), replicas).servicer
    viewer = Identity(name="viewer", roles=CallerRole.VIEWER.includes)
    with pytest.raises(ServiceError):
        called_by(viewer, servicer.FinishRequests, pb2.FinishRequestsRequest(parent=REPLICA, requests=["a"]))


# --- streams


def new(name: str, context_tokens: int = 10) -> pb2.NewRequest:
    return pb2.NewRequest(id=name, context_tokens=context_tokens, growth_tokens=5)


def declaration() -> pb2.UpdateDispatchStateRequest:
    return pb2.UpdateDispatchStateRequest(
        dispatch_state=pb2.DispatchState(name=STATE, generation=1, head_maps=[empty_map(stage_model(2))])
    )


def placed(answer: pb2.DispatchRequestsResponse) -> list[str]:
    return [placement.request for placement in answer.placements]


async def test_a_step_finishes_grows_and_admits_and_a_wrong_one_changes_nothing() -> None:
    async with served() as address, AsyncClient(address) as client:
        state_id = (await client.dispatch.UpdateDispatchState(declaration())).state_id
        async with client.dispatch_stream(REPLICA, state_id) as stream:
            assert placed(await stream.step(new=[new("a"), new("b")])) == ["a", "b"]
            with pytest.raises(CallError) as caught:
                await stream.step(finished=["a"], new=[new("b", 11)])
            assert (caught.value.reason, caught.value.code) == ("REQUEST_RUNNING", grpc.StatusCode.ALREADY_EXISTS)
            with pytest.raises(CallError) as caught:
                await stream.step(finished=["a"], new=[new("c", 0)], grown=[pb2.Growth(id="")])
            assert [violation.field for violation in caught.value.violations] == [
                *("grown[0].id", "grown[0].context_tokens", "new_requests[0].context_tokens")
            ]
            assert placed(await stream.step(new=[new("a")])) == ["a"]  # the request was still running
            answer = await stream.step(
                finished=["a"], grown=[pb2.Growth(id="b", context_tokens=14)], new=[new("a", 12)]
            )
            assert placed(answer) == ["a"]
        read = await client.dispatch.GetDispatchState(pb2.GetDispatchStateRequest(name=STATE))
        running = {one.id: one.context_tokens for one in read.dispatch_state.head_maps[0].requests}
        assert running == {"a": 12, "b": 14}


async def test_steps_of_many_tasks_travel_together_and_one_that_fails_fails_alone() -> None:
    async with served() as address, AsyncClient(address) as client:
        state_id = (await client.dispatch.UpdateDispatchState(declaration())).state_id
        async with client.dispatch_stream(REPLICA, state_id) as stream:
            await stream.step(new=[new("r0")])
            answers = await asyncio.gather(
                *(stream.step(new=[new(f"r{n}", 11 if n == 0 else 10)]) for n in range(16)), return_exceptions=True
            )
            assert isinstance(answers[0], CallError)
            assert answers[0].reason == "REQUEST_RUNNING"
            others = [answer for answer in answers if isinstance(answer, pb2.DispatchRequestsResponse)]
            assert [placed(answer) for answer in others] == [[f"r{n}"] for n in range(1, 16)]
            together = await asyncio.gather(*(stream.step(new=[new(f"s{n}")]) for n in range(16)))
            assert len({answer.sequence for answer in together}) <= 2  # the first alone, the others together


class HeldCall:
    """A gRPC stream whose answers come when the test decides; `written`: the requests of each message."""

    def __init__(self) -> None:
        self.written = list[list[str]]()
        self.answers = asyncio.Queue[pb2.DispatchRequestsResponse]()
        self.read = self.answers.get
        self.was_cancelled = False

    def cancel(self) -> None:
        self.was_cancelled = True

    async def write(self, message: pb2.DispatchRequestsRequest) -> None:
        self.written.append([one.id for one in message.new_requests])

    async def is_sent(
        self, step: Coroutine[Any, Any, pb2.DispatchRequestsResponse]
    ) -> asyncio.Task[pb2.DispatchRequestsResponse]:
        """Begin a step and return its task."""
        before, task = len(self.written), asyncio.create_task(step)
        while len(self.written) == before:
            await asyncio.sleep(0)
        return task


async def test_a_step_that_nobody_waits_for_any_more_is_not_sent() -> None:
    call = HeldCall()
    stream = AsyncDispatchStream(call, REPLICA, "state")
    under_way = await call.is_sent(stream.step(new=[new("a")]))
    with pytest.raises(CallError) as caught:
        await stream.step(new=[new("b")], timeout=0)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    behind = asyncio.create_task(stream.step(new=[new("c")]))
    for task in (under_way, behind):
        call.answers.put_nowait(pb2.DispatchRequestsResponse())
        await task
    assert call.written == [["a"], ["c"]]
    under_way = await call.is_sent(stream.step(new=[new("d")]))
    with pytest.raises(CallError):
        await stream.step(new=[new("e")], timeout=0)
    for name in ("d", "f"):  # nothing stays queued behind the first: the stream continues
        call.answers.put_nowait(pb2.DispatchRequestsResponse())
        await (under_way if name == "d" else stream.step(new=[new("f")]))
    assert call.written[2:] == [["d"], ["f"]]


@pytest.mark.parametrize("part", ["read", "write"])
async def test_a_stream_that_breaks_in_a_way_that_nobody_foresaw_ends_with_all_its_steps(
    caplog: pytest.LogCaptureFixture, part: str
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    call = HeldCall()
    stream = AsyncDispatchStream(call, REPLICA, "state")
    under_way = await call.is_sent(stream.step(new=[new("a")]))
    behind = [asyncio.create_task(stream.step(new=[new(name)])) for name in ("b", "b")]  # one after another
    await asyncio.sleep(0)
    setattr(call, part, fail)
    call.answers.put_nowait(pb2.DispatchRequestsResponse())
    await under_way
    for step in behind:
        with pytest.raises(CallError, match="the dispatch stream has ended") as caught:
            await step
        assert str(caught.value.__cause__) == "unforeseen"
    assert call.was_cancelled
    assert [record.message for record in caplog.records] == ["a dispatch stream failed, and is ended"]


def test_a_stream_for_code_without_an_event_loop() -> None:
    async def session() -> None:
        async with served() as address:
            await asyncio.to_thread(steps, address)

    def steps(address: str) -> None:
        with Client(address) as client:
            state_id = client.dispatch.UpdateDispatchState(declaration()).state_id
            with client.dispatch_stream(REPLICA, state_id) as stream:
                assert placed(stream.step(new=[new("a")])) == ["a"]
                with pytest.raises(CallError) as caught:
                    stream.step(new=[new("a", 11)])
                assert caught.value.reason == "REQUEST_RUNNING"
                assert placed(stream.step(finished=["a"], new=[new("b")])) == ["b"]
            with pytest.raises(CallError):
                stream.step(new=[new("c")])

    asyncio.run(session())


def test_a_thread_waits_for_the_steps_of_others_no_longer_than_its_timeout_and_sends_nothing_then() -> None:
    sent, is_sent, may_answer = list[str](), threading.Event(), threading.Event()

    def held(messages: Iterator[pb2.DispatchRequestsRequest]) -> Iterator[pb2.DispatchRequestsResponse]:
        for message in messages:
            sent.extend(one.id for one in message.new_requests)
            is_sent.set()
            may_answer.wait()
            yield pb2.DispatchRequestsResponse(sequence=message.sequence)

    stream = DispatchStream(held, REPLICA, "state")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(stream.step, new=[new("a")])
        is_sent.wait()
        with pytest.raises(CallError, match=r"no answer within 0.01 s") as caught:
            threads.submit(stream.step, new=[new("b")], timeout=0.01).result(timeout=5)
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        may_answer.set()
        first.result()
        stream.step(new=[new("c")])
    assert sent == ["a", "c"]


def answers_to(service: Servicing, identity: Identity) -> pb2.DispatchRequestsResponse:
    """Return the answer to one message of a stream."""

    async def call() -> pb2.DispatchRequestsResponse:
        async def requests() -> AsyncIterator[pb2.DispatchRequestsRequest]:
            yield pb2.DispatchRequestsRequest(sequence=7, parent=REPLICA)

        set_present_caller(identity)
        context: Any = None
        return await anext(aiter(service.servicer.DispatchRequests(requests(), context)))

    return asyncio.run(call())


def test_every_message_of_a_stream_is_of_the_primarys_agent_and_of_a_planner_that_may_decide() -> None:
    def undecided() -> None:
        raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, "the lease is about to end")

    replicas = Replicas({REPLICA: Replica([stage_model(2)])})
    states = DispatchStates(replicas)
    answer = answers_to(dispatching(states, replicas), agent_of("elsewhere"))
    assert (answer.sequence, answer.failure.reason) == (7, Reason.ERROR_REASON_WRONG_NODE)
    answer = answers_to(dispatching(states, replicas, require_lease=undecided), agent_of("n"))
    assert answer.failure.reason == Reason.ERROR_REASON_STORE_UNAVAILABLE
