"""One caller's streams and calls take no room of others, and end with what its credentials allow."""

from __future__ import annotations

import asyncio
import traceback
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hetis.planner.callers import CallerRole, Identity
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.service import calls, limits
from hetis.planner.service.identity.credentials import Credentials, Grant, Tokens, digest
from hetis.planner.service.limits import MOST_OF_A_CALLER, MOST_OF_A_HOST, MOST_READS, CallLimits
from hetis.v1 import agent_service_pb2 as agents
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.planner.service.serving import Served, channel_to, failure_of, reason_of, served
from tests.planner.service.test_calls import get, watch


async def test_a_caller_may_have_a_hundred_watches_open() -> None:
    async with served() as planner:
        watches = [watch(planner, f"plans/{n}") for n in range(MOST_OF_A_CALLER)]
        for each in watches:
            await each.read()
        error = await failure_of(watch(planner, "plans/p"))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert (await get(planner, "plans/p")).plan.name == "plans/p"
        watches[0].cancel()
        for _ in range(100):  # until the planner has received it
            again = watch(planner, "plans/p")
            if await _read_or_none(again) is not None:
                break
        else:
            raise AssertionError("an ended watch still counts")
        for each in [*watches, again]:
            each.cancel()


async def _read_or_none(call: Any) -> Any:
    try:
        return await call.read() or None
    except grpc.aio.AioRpcError:
        await asyncio.sleep(0.02)
        return None


async def test_strangers_may_have_a_hundred_streams_open() -> None:
    async with served() as planner:
        stub = health_pb2_grpc.HealthStub(planner.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(MOST_OF_A_HOST)]
        for each in watches:
            await each.read()
        error = await failure_of(stub.Watch(health_pb2.HealthCheckRequest()))
        assert reason_of(error) == "TOO_MANY_STREAMS"
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        for each in watches:
            each.cancel()


def silent_calls(channel: grpc.aio.Channel, method: str, num: int) -> list[Any]:
    """Begin calls that never send their message."""
    return [channel.stream_stream(method)() for _ in range(num)]


async def until_open(planner: Served, num: int) -> None:
    async with asyncio.timeout(30):
        while sum(planner.calls._limits._open.values()) < num:
            await asyncio.sleep(0.01)


async def test_strangers_whose_messages_never_come_take_no_room_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the past 31,000 such calls to Health/Check from one host kept out everybody, until their connections ended."""
    monkeypatch.setattr(calls, "_OPEN_MESSAGE_S", 3.0)  # a busy machine opens as many calls in time
    async with served() as planner, channel_to(planner.address) as stranger:
        method = "/grpc.health.v1.Health/Check"
        silent = silent_calls(stranger, method, MOST_OF_A_HOST)
        await until_open(planner, 2 * MOST_OF_A_HOST)  # counted by host, and with those of all hosts
        check = health_pb2_grpc.HealthStub(planner.channel).Check
        refused = await failure_of(check(health_pb2.HealthCheckRequest(), timeout=5))
        assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert (await get(planner, "plans/p")).plan.name == "plans/p"  # of a caller who is identified
        ended = await asyncio.gather(*(failure_of(call) for call in silent))
        assert {error.details() for error in ended} == {"no message was received within 3 s"}
        await check(health_pb2.HealthCheckRequest(), timeout=5)
        assert 'hetis_planner_failures_total{reason="QUOTA_EXCEEDED"} 1.0' in planner.metrics.text().decode()


async def test_a_call_without_credentials_is_refused_before_its_message_comes() -> None:
    method = "/hetis.v1.PlanService/GetPlan"
    for reads_certificates in (False, True):
        domain = "hetis" if reads_certificates else None
        credentials = Credentials(tokens=lambda: Tokens({}), trust_domain=domain, clock=lambda: 0.0)
        async with served(authenticator=credentials) as planner:
            [call] = silent_calls(planner.channel, method, 1)
            assert reason_of(await failure_of(call)) == "CREDENTIALS"
            assert not planner.calls._limits._open
            assert 'hetis_planner_failures_total{reason="CREDENTIALS"} 1.0' in planner.metrics.text().decode()


async def test_the_reads_of_a_caller_are_answered_some_at_a_time_and_others_do_not_wait_for_them() -> None:
    """A viewer that took no answers to 450 reads of 2.6 MB made 3 GB of an idle planner, which answered nobody else."""
    async with served() as planner, channel_to(planner.address) as greedy:
        request = plans.GetPlanRequest(name="plans/slow")
        reads = [asyncio.ensure_future(PlanServiceStub(greedy).GetPlan(request, timeout=60)) for _ in range(100)]
        await until_open(planner, 2 * 100)
        async with asyncio.timeout(30):
            while planner.calls._limits._reads._num.total() < 100:
                await asyncio.sleep(0.01)
        assert planner.planner.plans.num_slow == MOST_READS
        assert (await get(planner, "plans/p")).plan.name == "plans/p"
        reads.pop().cancel()
        planner.planner.plans.release.set()
        assert {answer.plan.name for answer in await asyncio.gather(*reads)} == {"plans/slow"}
        async with asyncio.timeout(30):
            while planner.calls._limits._open:  # an answer arrives before its call has ended
                await asyncio.sleep(0.01)
        assert not planner.calls._limits._reads._turns


async def test_without_credentials_a_caller_with_too_many_calls_takes_no_room_of_another_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 100  # one connection has no room for as many as a caller with credentials may have
    monkeypatch.setattr(limits, "MOST_AT_ONCE", most)
    async with served() as planner, channel_to(planner.address) as greedy:
        method = "/hetis.v1.PlanService/GetPlan"
        silent = [greedy.stream_stream(method)(timeout=30) for _ in range(most)]
        await until_open(planner, 2 * most)
        refused = await failure_of(PlanServiceStub(greedy).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=20))
        assert reason_of(refused) == "QUOTA_EXCEEDED"
        assert (await get(planner, "plans/p")).plan.name == "plans/p"
        for call in silent:
            call.cancel()


def test_agents_admins_and_callers_with_few_calls_have_room_when_others_have_taken_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MOST_OF_OTHERS", 4)
    monkeypatch.setattr(limits, "FEW", 1)
    counted, method = CallLimits(), "/hetis.v1.PlanService/GetPlan"
    viewers = [Identity(name=name, roles=CallerRole.VIEWER.includes) for name in ("many", "few", "fewer", "late")]

    def call(caller: Identity) -> None:
        stack.enter_context(counted.opened(method, caller, peer="ipv4:127.0.0.1:1", is_stream=False))

    with ExitStack() as stack:
        for _ in range(4):
            call(viewers[0])
        with pytest.raises(ServiceError, match="4 calls are being answered already"):
            call(viewers[0])
        for viewer in viewers[1:3]:
            call(viewer)
        with pytest.raises(ServiceError, match="6 calls are being answered already"):
            call(viewers[3])
        for role in (CallerRole.ADMIN, CallerRole.AGENT):
            call(Identity(name=role, roles=role.includes))
    assert not counted._open


async def test_streams_that_end_with_one_error_do_not_gather_each_others_frames() -> None:
    error, num_frames = ServiceError(Reason.ERROR_REASON_NOT_LEADER, "the term is over"), set[int]()
    async with served() as planner:
        for _ in range(3):
            stream = watch(planner, "plans/p")
            await stream.read()
            await planner.calls.end_streams(error)
            assert reason_of(await failure_of(stream)) == "NOT_LEADER"
            num_frames.add(len(list(traceback.walk_tb(error.__traceback__))))
    assert len(num_frames) == 1


async def test_a_token_that_is_taken_back_or_expires_ends_its_streams_and_no_others() -> None:
    first, second = (f"hetis_{letter * 43}" for letter in "ab")

    def grants(*tokens: str, expires_s: float = 100.0) -> Tokens:
        identity = Identity(name="watcher", roles=CallerRole.VIEWER.includes)
        return Tokens({digest(token): Grant(identity=identity, expires_s=expires_s) for token in tokens})

    known, now_s = grants(first, second), 0.0
    credentials = Credentials(tokens=lambda: known, trust_domain=None, clock=lambda: now_s)
    async with served(authenticator=credentials) as planner:
        streams = [watch(planner, "plans/p", metadata=(("authorization", f"Bearer {t}"),)) for t in (first, second)]
        for stream in streams:
            await stream.read()
        planner.calls.end_revoked_streams()  # nothing has changed yet
        known = grants(second)
        planner.calls.end_revoked_streams()
        error = await failure_of(streams[0].read())
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS")
        following = asyncio.create_task(streams[1].read())
        done, _ = await asyncio.wait({following}, timeout=0.1)
        assert not done
        now_s = 101.0
        planner.calls.end_revoked_streams()
        assert "expired" in str((await failure_of(following)).details())


@pytest.mark.parametrize("waits_for", ["a term", "its message"])
async def test_a_token_that_is_taken_back_while_a_call_waits_is_not_served(waits_for: str) -> None:
    """No list of open streams has the call yet, so that nothing else would end it."""
    token = f"hetis_{'a' * 43}"
    identity = Identity(name="a", roles=frozenset(CallerRole), scope="clusters/c/nodes/n")
    known = Tokens({digest(token): Grant(identity=identity, expires_s=100.0)})
    credentials = Credentials(tokens=lambda: known, trust_domain=None, clock=lambda: 0.0)
    waits, begun = asyncio.Event(), asyncio.Event()

    async def until_begun(_is_change: bool) -> None:
        waits.set()
        await begun.wait()

    async with served(authenticator=credentials) as planner:
        planner.calls.answer_for(
            require_leader=lambda _method: waits.set(), on_refusal=lambda _change: None, until_begun=until_begun
        )
        metadata = (("authorization", f"Bearer {token}"),)
        method, request = "/hetis.v1.PlanService/WatchPlan", plans.WatchPlanRequest(name="plans/p").SerializeToString()
        if waits_for == "a term":
            method = "/hetis.v1.AgentService/ConnectNode"
            request = agents.ConnectNodeRequest(hello=agents.Hello(node="clusters/c/nodes/n")).SerializeToString()
        stream: Any = planner.channel.stream_stream(method)(metadata=metadata)
        await asyncio.wait_for(waits.wait(), 20)
        known = Tokens({})
        planner.calls.end_revoked_streams()
        begun.set()
        await stream.write(request)
        assert reason_of(await asyncio.wait_for(failure_of(stream), 20)) == "CREDENTIALS"


async def test_credentials_that_allow_less_end_the_streams_that_began_with_more() -> None:
    token = f"hetis_{'a' * 43}"
    node, cluster = "clusters/c/nodes/n", "clusters/c"

    def of(*roles: CallerRole, scope: str | None) -> Tokens:
        identity = Identity(name="n", roles=frozenset(roles), scope=scope)
        return Tokens({digest(token): Grant(identity=identity, expires_s=100.0)})

    agent, orchestrator = CallerRole.AGENT, CallerRole.ORCHESTRATOR

    async def test(before: Tokens, after: Tokens, ends: bool) -> None:
        known = before
        credentials = Credentials(tokens=lambda: known, trust_domain=None, clock=lambda: 0.0)
        async with served(authenticator=credentials) as planner:
            stream = AgentServiceStub(planner.channel).ConnectNode(metadata=(("authorization", f"Bearer {token}"),))
            await stream.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node=node)))
            await stream.read()
            known = after
            planner.calls.end_revoked_streams()
            if ends:
                error = await failure_of(stream)
                assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert "allow less than when this call began" in str(error.details())
            else:
                planner.planner.agents.goodbye.set()
                assert (await stream.read()).WhichOneof("message") == "goodbye"

    whole, part = of(agent, scope=cluster), of(agent, scope=node)
    for before, after, ends in (
        (whole, part, True),
        (part, whole, False),
        (part, of(agent, scope="clusters/c/nodes/other"), True),
        (of(agent, orchestrator, scope=node), part, True),
        (part, of(agent, orchestrator, scope=node), False),
    ):
        for _ in range(2):
            with suppress(TimeoutError):  # gRPC misses a timeout now and then, after many other tests
                await asyncio.wait_for(test(before, after, ends), 30)
                break
        else:
            await asyncio.wait_for(test(before, after, ends), 30)
