"""Health, reflection, addresses, and an orderly end."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from hetis.planner.service.calls import Calls
from hetis.planner.service.identity.credentials import Credentials, NoCredentials, Tokens
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import Telemetry
from hetis.planner.service.server import AddressError, PlannerServer
from hetis.v1 import agent_service_pb2 as agents
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.planner.service.fakes import FakePlanner
from tests.planner.service.serving import channel_to, details_of, failure_of, reason_of, served

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LOCKED = Credentials(tokens=lambda: Tokens({}), trust_domain=None, clock=time.time)


def plan_service(planner: Any) -> PlanServiceStub:
    return PlanServiceStub(planner.channel)


async def test_health_is_told_to_anybody_for_every_service() -> None:
    async with served(authenticator=LOCKED) as planner:
        health = health_pb2_grpc.HealthStub(planner.channel)
        reflection = [f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha")]
        for service in ("", "hetis.v1.PlanService", "hetis.v1.AgentService", "grpc.health.v1.Health", *reflection):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))  # without a deadline, too
            assert answer.status == SERVING
        error = await failure_of(health.Check(health_pb2.HealthCheckRequest(service="x")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_every_watcher_of_health_hears_of_the_drain_also_when_another_left() -> None:
    async with served() as planner:
        health = health_pb2_grpc.HealthStub(planner.channel)
        watchers = [health.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(3)]
        for watcher in watchers:
            assert (await watcher.read()).status == SERVING
        watchers[0].cancel()
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(planner.server.drain(5, planner.planner.say_goodbye))
        for watcher in watchers[1:]:
            assert (await watcher.read()).status == NOT_SERVING
        await draining


async def test_no_call_of_a_burst_is_cancelled() -> None:
    async with served() as planner, AsyncExitStack() as stack:
        calls = list[Any]()
        for _ in range(3):
            apart = [("grpc.use_local_subchannel_pool", 1)]  # otherwise all would share a connection
            stub = PlanServiceStub(stack.enter_context(grpc.insecure_channel(planner.address, apart)))
            calls += [stub.GetPlan.future(plans.GetPlanRequest(name="plans/p"), timeout=60) for _ in range(3000)]
        time.sleep(1)  # the planner is busy while they arrive
        codes = await asyncio.to_thread(lambda: {call.code() for call in calls})
    assert codes == {grpc.StatusCode.OK}


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_tools_can_read_the_contract_from_the_server(version: str) -> None:
    async with served(authenticator=LOCKED) as planner:
        ask = planner.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="hetis.v1.PlanService"),
        ]
        listed, described = [answer async for answer in ask(iter(requests))]
        names = {service.name for service in listed.list_services_response.service}
        assert {f"hetis.v1.{name}Service" for name in ("Cluster", "Profile", "Plan", "Dispatch", "Agent")} < names
        assert {"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} < names
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(raw)
            for raw in described.file_descriptor_response.file_descriptor_proto
        ]
        assert "hetis/v1/plan_service.proto" in {file.name for file in files}


@pytest.mark.parametrize("address", ["[::1]:0", "localhost:0", "127.0.0.1:0"])
async def test_the_port_that_was_chosen_is_told(address: str) -> None:
    server = PlannerServer((), Calls(NoCredentials(), Telemetry(ServiceMetrics("0"))))
    bound = server.listen(address)
    assert bound.startswith(address.removesuffix("0"))
    assert int(bound.rsplit(":", 1)[1]) > 0
    await server.start()
    async with channel_to(bound) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    await server.stop_at_once()


async def test_a_unix_socket_serves(tmp_path: Any) -> None:
    server = PlannerServer((), Calls(NoCredentials(), Telemetry(ServiceMetrics("0"))))
    assert server.listen(f"unix:{tmp_path}/p.sock") == f"unix:{tmp_path}/p.sock"
    await server.start()
    async with channel_to(f"unix:{tmp_path}/p.sock") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    await server.stop_at_once()


async def test_a_unix_socket_is_not_taken_from_a_planner_that_serves(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/p.sock"

    def server() -> PlannerServer:
        return PlannerServer((), Calls(NoCredentials(), Telemetry(ServiceMetrics("0"))))

    first = server()
    first.listen(address)
    await first.start()
    with pytest.raises(AddressError, match=rf"cannot listen on {address}: address already in use"):
        server().listen(address)
    async with channel_to(address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    await first.stop_at_once()
    with socket.socket(socket.AF_UNIX) as left:  # as a killed planner leaves it behind
        left.bind(str(tmp_path / "p.sock"))
    assert server().listen(address) == address


async def test_a_port_in_use_is_an_error() -> None:
    async with served() as planner:
        other = PlannerServer((), Calls(NoCredentials(), Telemetry(ServiceMetrics("0"))))
        with pytest.raises(AddressError, match=f"cannot listen on {planner.address}: address already in use"):
            other.listen(planner.address)
        with pytest.raises(AddressError, match=r"192\.0\.2\.1:1: cannot assign requested address"):
            other.listen("192.0.2.1:1")


async def test_a_drain_finishes_calls_says_goodbye_and_ends_watches() -> None:
    async with served() as planner:
        fake: FakePlanner = planner.planner
        running = plan_service(planner).GetPlan(plans.GetPlanRequest(name="plans/slow"), timeout=20)
        watch = plan_service(planner).WatchPlan(plans.WatchPlanRequest(name="plans/p"))
        assert (await watch.read()).plan.name == "plans/p"
        deaf = plan_service(planner).WatchPlan(plans.WatchPlanRequest(name="plans/deaf"))
        assert (await deaf.read()).plan.name == "plans/deaf"
        agent = AgentServiceStub(planner.channel).ConnectNode()
        await agent.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node="clusters/c/nodes/n")))
        assert (await agent.read()).WhichOneof("message") == "welcome"
        await fake.plans.entered.wait()

        draining = asyncio.create_task(planner.server.drain(20, fake.say_goodbye))
        assert (await agent.read()).WhichOneof("message") == "goodbye"
        for stream in (agent, watch, deaf):
            error = await failure_of(stream)
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        error = await failure_of(plan_service(planner).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=5))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert details_of(error)["RetryInfo"].retry_delay.seconds == 1
        assert not draining.done()
        fake.plans.release.set()
        assert (await running).plan.name == "plans/slow"
        assert await draining
        with pytest.raises(grpc.aio.AioRpcError):
            await plan_service(planner).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=2)


async def test_a_drain_ends_in_its_time_whatever_hangs() -> None:
    async with served() as planner:
        running = plan_service(planner).GetPlan(plans.GetPlanRequest(name="plans/slow"), timeout=20)
        await planner.planner.plans.entered.wait()
        began = time.monotonic()

        async def hang() -> None:
            await asyncio.Event().wait()

        assert not await planner.server.drain(0.5, hang)
        assert time.monotonic() - began < 15  # less than the 20 s of the call
        assert (await failure_of(running)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_pings_every_ten_seconds_are_allowed_and_ports_are_not_shared() -> None:
    from hetis.planner.service.server import OPTIONS

    options = dict(OPTIONS)
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 8_000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.max_connection_age_ms"] == 1_800_000
    assert options["grpc.max_receive_message_length"] == 4 * 2**20
    assert options["grpc.so_reuseport"] == 0
