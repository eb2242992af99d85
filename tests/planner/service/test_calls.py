"""Every call, over a real connection: deadlines, errors with their details, malformed messages, telemetry."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool

from hetis.commands.endpoints import STREAM_OPEN
from hetis.planner.callers import Identity
from hetis.planner.failures import Reason, ServiceError, not_found, wrong_node
from hetis.planner.service import statuses
from hetis.planner.service.methods import METHODS
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import JsonLines, Telemetry, TextLines
from hetis.v1 import agent_service_pb2 as agents
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1 import report_pb2
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from hetis.v1.statuses import CODE_OF_REASON
from tests.planner.service.serving import Served, details_of, failure_of, reason_of, served


def get(served: Served, name: str, timeout: float | None = 20, **more: Any) -> Any:
    return PlanServiceStub(served.channel).GetPlan(plans.GetPlanRequest(name=name), timeout=timeout, **more)


def watch(served: Served, name: str, **more: Any) -> Any:
    return PlanServiceStub(served.channel).WatchPlan(plans.WatchPlanRequest(name=name), **more)


async def test_a_unary_call_without_a_deadline_is_refused() -> None:
    async with served() as planner:
        error = await failure_of(get(planner, "plans/p", timeout=None))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "/hetis.v1.PlanService/GetPlan has no deadline: set one of at most 60 s"
        assert details_of(error)["ErrorInfo"].reason == "DEADLINE_REQUIRED"
        assert dict(details_of(error)["ErrorInfo"].metadata) == {"max_s": "60"}


@pytest.mark.parametrize(("seconds", "accepted"), [(10, True), (60, True), (62, False), (1e6, False)])
async def test_a_deadline_may_be_sixty_seconds_away(seconds: float, accepted: bool) -> None:
    async with served() as planner:
        if accepted:
            assert (await get(planner, "plans/p", timeout=seconds)).plan.name == "plans/p"
        else:
            error = await failure_of(get(planner, "plans/p", timeout=seconds))
            assert reason_of(error) == "DEADLINE_TOO_LONG"


async def test_agents_and_changes_that_come_while_a_term_begins_wait_for_it_and_reads_try_another_planner() -> None:
    """In the past 500 agents were refused time and again, and a term took up to 52 s to begin beside them."""
    begun = asyncio.Event()

    async def until_begun(_is_change: bool) -> None:
        await begun.wait()

    def require_leader(_method: str) -> None:
        if not begun.is_set():
            raise ServiceError(Reason.ERROR_REASON_NOT_LEADER, "this planner does not lead yet")

    async with served() as planner:
        planner.calls.answer_for(
            require_leader=require_leader, on_refusal=lambda _change: None, until_begun=until_begun
        )
        agent: Any = AgentServiceStub(planner.channel).ConnectNode()
        await agent.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node="clusters/c/nodes/a")))
        request = plans.DeletePlanRequest(name="plans/p")
        change = asyncio.ensure_future(failure_of(PlanServiceStub(planner.channel).DeletePlan(request, timeout=20)))
        assert reason_of(await failure_of(get(planner, "plans/p"))) == "NOT_LEADER"
        await asyncio.sleep(0.05)
        assert not agent.done()
        assert not change.done()
        begun.set()
        assert (await agent.read()).WhichOneof("message") == "welcome"
        assert (await change).code() is grpc.StatusCode.UNIMPLEMENTED  # by the fake, which it has reached
        agent.cancel()


async def test_an_agent_sends_no_more_than_is_read_of_it() -> None:
    """In the past 500 agents had sent 80,000 reports after 15 s, which took more than a minute to read."""
    begun, written = asyncio.Event(), 0
    report = agents.ConnectNodeRequest(
        report=agents.NodeReport(devices=[report_pb2.DeviceReport(unhealthy="x" * 1000)])
    )
    async with served() as planner:
        planner.calls.answer_for(
            require_leader=lambda _: None, on_refusal=lambda _: None, until_begun=lambda _: _waited(begun)
        )
        agent: Any = AgentServiceStub(planner.channel).ConnectNode()
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                for _ in range(200):
                    await agent.write(report)
                    written += 1
        assert 10 <= written <= 40
        agent.cancel()
        begun.set()


async def _waited(event: asyncio.Event) -> None:
    await event.wait()


async def test_an_agent_that_waits_for_a_term_is_sent_on_when_its_planner_shuts_down() -> None:
    waits, begun = asyncio.Event(), asyncio.Event()

    async def until_begun(_is_change: bool) -> None:
        waits.set()
        await begun.wait()

    async with served() as planner:
        planner.calls.answer_for(
            require_leader=lambda _method: None, on_refusal=lambda _change: None, until_begun=until_begun
        )
        agent: Any = AgentServiceStub(planner.channel).ConnectNode()
        await agent.write(agents.ConnectNodeRequest(sequence=1, hello=agents.Hello(node="clusters/c/nodes/a")))
        await waits.wait()
        planner.calls.refuse_new()
        begun.set()
        assert reason_of(await asyncio.wait_for(failure_of(agent), 20)) == "DRAINING"


async def test_a_watch_is_said_to_be_open_at_its_beginning() -> None:
    async with served() as planner:
        stream = watch(planner, "plans/p")
        assert STREAM_OPEN in [tuple(one) for one in await stream.initial_metadata()]
        stream.cancel()
        planner.calls.refuse_new()
        refused = watch(planner, "plans/p")
        await failure_of(refused)
        assert STREAM_OPEN not in [tuple(one) for one in await refused.initial_metadata()]


@pytest.mark.parametrize("name", ["missing", "changed", "full", "used", "gpus"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_errors_have_reason_and_details(name: str, streaming: bool) -> None:
    async with served() as planner:
        error = await failure_of((watch if streaming else get)(planner, f"plans/{name}"))
    details = details_of(error)
    code, reason = {
        "missing": (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
        "changed": (grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
        "full": (grpc.StatusCode.RESOURCE_EXHAUSTED, "SOLVER_QUEUE_FULL"),
        "used": (grpc.StatusCode.FAILED_PRECONDITION, "RESOURCE_IN_USE"),
        "gpus": (grpc.StatusCode.FAILED_PRECONDITION, "INVENTORY_MISMATCH"),
    }[name]
    assert (error.code(), reason_of(error)) == (code, reason)
    match name:
        case "missing":
            assert error.details() == "plans/missing does not exist"
            assert details["ResourceInfo"].resource_type == "hetis.v1.Plan"
            assert details["ResourceInfo"].resource_name == "plans/missing"
        case "changed":
            assert dict(details["ErrorInfo"].metadata) == {"name": "plans/changed", "etag": "v2"}
        case "full":
            assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 2.5
        case "used":
            assert details["ResourceInfo"].owner == "plans/p"
            assert details["ResourceInfo"].resource_type == "hetis.v1.Cluster"
        case "gpus":
            violations = details["PreconditionFailure"].violations
            assert [(v.type, v.subject) for v in violations] == [("GPU_MISSING", "n1/0"), ("GPU_MISSING", "n2/3")]


async def test_a_thousand_violations_arrive_shortened_and_say_so() -> None:
    async with served() as planner:
        error = await failure_of(get(planner, "plans/fields"))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        violations = details_of(error)["BadRequest"].field_violations
        assert [v.field for v in violations[:3]] == [f"plan.spec.field_{n}" for n in range(3)]
        left = 1000 - (len(violations) - 1)
        assert violations[-1].description == f"... and {left} more problems from here on"


async def test_a_message_that_headers_cannot_hold_is_shortened() -> None:
    async with served() as planner:
        error = await failure_of(get(planner, "plans/long"))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert (error.details() or "").endswith("üü...")


def test_no_more_of_a_text_is_escaped_than_a_header_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers choose names of megabytes, and calls are answered in the event loop."""
    lengths, quote = list[int](), statuses.quote

    def escaped(text: str, safe: str) -> str:
        lengths.append(len(text))
        return quote(text, safe=safe)

    monkeypatch.setattr(statuses, "quote", escaped)
    stranger, long = Identity(name="stranger", roles=frozenset()), "é" * 2_000_000
    for error in (not_found(long), wrong_node(stranger, long)):
        status = statuses.to_status(error)
        assert status.ByteSize() < 8192
    assert lengths
    assert max(lengths) < 8192


async def test_a_bad_document_is_invalid_with_its_line() -> None:
    async with served() as planner:
        error = await failure_of(get(planner, "plans/document"))
        assert reason_of(error) == "INVALID_DOCUMENT"
        (violation,) = details_of(error)["BadRequest"].field_violations
        assert violation.description == "cluster.yaml:3: is empty"


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_bug_tells_callers_an_incident_and_the_log_the_rest(
    streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hetis")
    async with served() as planner:
        # An alert on its increase sees the first bug only if the counter was scraped before.
        assert "hetis_planner_internal_errors_total 0.0" in planner.metrics.text().decode()
        await failure_of(get(planner, "plans/missing"))
        error = await failure_of((watch if streaming else get)(planner, "plans/bug"))
        async with asyncio.timeout(30):  # a caller may see the end of a stream before it is counted
            while "hetis_planner_internal_errors_total 1.0" not in planner.metrics.text().decode():
                await asyncio.sleep(0.01)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in str(error)
    assert "Traceback" not in str(error)
    incident_id = details_of(error)["ErrorInfo"].metadata["incident"]
    assert incident_id in (error.details() or "")
    (record,) = [record for record in caplog.records if record.getMessage() == "incident"]
    logged = json.loads(JsonLines().format(record))
    assert logged["incident"] == incident_id
    assert "ZeroDivisionError: the secret is 42" in logged["traceback"]


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_answer_that_cannot_be_written_is_no_bug(streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In the past each agent whose connection broke while it was welcomed made an incident."""
    caplog.set_level(logging.INFO, "hetis")
    async with served() as planner:
        await failure_of((watch if streaming else get)(planner, "plans/unwritten", timeout=1))
        async with asyncio.timeout(30):
            while 'code="CANCELLED"' not in planner.metrics.text().decode():
                await asyncio.sleep(0.01)
    assert "incident" not in caplog.text


def test_every_reason_becomes_a_status_with_its_code() -> None:
    for reason, code in CODE_OF_REASON.items():
        status = statuses.to_status(ServiceError(reason, "so", metadata={"name": "clusters/c/nodes/n"}))
        assert status.code == code.value[0]
        info = status.details[0]
        assert Reason.Name(reason).removeprefix("ERROR_REASON_").encode() in info.value


@pytest.mark.parametrize(
    ("method", "raw"), [("PlanService/GetPlan", b"\xff\xff\xff"), ("PlanService/WatchPlan", b"\x0a\xff")]
)
async def test_bytes_that_are_no_message_are_an_invalid_field(method: str, raw: bytes) -> None:
    async with served() as planner:
        name = f"/hetis.v1.{method}"
        channel = planner.channel
        call: Any = channel.unary_stream(name)(raw) if "Watch" in method else channel.unary_unary(name)(raw, timeout=5)
        error = await failure_of(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert (await get(planner, "plans/p")).plan.name == "plans/p"


async def test_bytes_that_are_no_message_end_a_stream_of_an_agent() -> None:
    async with served() as planner:
        stream = planner.channel.stream_stream("/hetis.v1.AgentService/ConnectNode")()
        await stream.write(b"\xff\xff\xff")
        error = await failure_of(stream)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


async def test_an_oversized_message_is_refused_by_grpc() -> None:
    async with served() as planner:
        error = await failure_of(get(planner, "x" * (4 * 2**20 + 1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await get(planner, "plans/p")).plan.name == "plans/p"


@pytest.mark.parametrize("method", ["/hetis.v1.PlanService/Nothing", "/nothing.Service/Method", "/x"])
async def test_an_unknown_method_is_unimplemented(method: str) -> None:
    async with served() as planner:
        error = await failure_of(planner.channel.unary_unary(method)(b"", timeout=5))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert method.encode() not in planner.metrics.text()  # callers cannot create labels


def test_every_method_of_the_contract_that_the_planner_serves_needs_a_role() -> None:
    pool = descriptor_pool.Default()
    services = ("ClusterService", "ProfileService", "PlanService", "DispatchService", "AgentService")
    methods = {
        f"/hetis.v1.{service}/{method.name}"
        for service in services
        for method in pool.FindServiceByName(f"hetis.v1.{service}").methods
    }
    assert methods == set(METHODS)


async def test_calls_and_streams_are_measured_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "hetis")
    async with served() as planner:
        await get(planner, "plans/p")
        await failure_of(get(planner, "plans/missing"))
        await failure_of(watch(planner, "plans/missing"))
        watched = 'streams_ended_total{code="NOT_FOUND",method="/hetis.v1.PlanService/WatchPlan"} 1.0'
        async with asyncio.timeout(30):  # a caller may see the end of a stream before it is counted
            while watched not in (text := planner.metrics.text().decode()):
                await asyncio.sleep(0.01)
    get_plan = "/hetis.v1.PlanService/GetPlan"
    assert f'hetis_planner_rpc_seconds_count{{code="OK",method="{get_plan}"}} 1.0' in text
    assert f'hetis_planner_rpc_seconds_count{{code="NOT_FOUND",method="{get_plan}"}} 1.0' in text
    assert f"hetis_planner_{watched}" in text
    assert f'hetis_planner_rpcs_running{{method="{get_plan}"}} 0.0' in text
    records = [record for record in caplog.records if record.name == "hetis.planner.calls"]
    lines = [json.loads(JsonLines().format(record)) for record in records]
    assert [(line["method"].rsplit("/", 1)[1], line["code"], line["request"], line["caller"]) for line in lines] == [
        ("GetPlan", "OK", "plans/p", "local"),
        ("GetPlan", "NOT_FOUND", "plans/missing", "local"),
        ("WatchPlan", "NOT_FOUND", "plans/missing", "local"),
    ]
    assert all(line["seconds"] >= 0 for line in lines)
    assert lines[1]["reason"] == "NOT_FOUND"


def test_the_line_of_a_refused_agent_names_its_node(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise the log of two agents with the token of a cluster does not say which node they both claim to be."""
    caplog.set_level(logging.INFO, "hetis")
    metrics = ServiceMetrics("test")
    record = Telemetry(metrics).begin("/hetis.v1.AgentService/ConnectNode", "ipv4:127.0.0.1:1", is_stream=True)
    metadata = {"node": "clusters/c/nodes/n"}
    record.failed(ServiceError(Reason.ERROR_REASON_NODE_IN_USE, "another agent is connected", metadata=metadata))
    record.end(grpc.StatusCode.ABORTED, metrics)
    (line,) = [json.loads(JsonLines().format(one)) for one in caplog.records]
    assert (line["message"], line["reason"], line["request"]) == ("stream ended", "NODE_IN_USE", "clusters/c/nodes/n")


def test_a_log_line_stays_one_line_whatever_a_caller_writes() -> None:
    record = logging.makeLogRecord({"msg": "call", "name": "hetis", "request": 'plans/x\n{"level": "info"}'})
    assert "\n" not in JsonLines().format(record)
    assert "\n" not in TextLines().format(record)


async def test_a_call_that_its_caller_gives_up_is_counted_as_such() -> None:
    async def counted(planner: Served, label: str) -> None:
        while label not in planner.metrics.text().decode():
            await asyncio.sleep(0.02)

    async with served() as planner:
        error = await failure_of(get(planner, "plans/slow", timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await counted(planner, 'code="DEADLINE_EXCEEDED"')
        planner.planner.plans.entered.clear()
        call = get(planner, "plans/slow")
        await planner.planner.plans.entered.wait()
        call.cancel()
        await counted(planner, 'code="CANCELLED"')
