"""Spans of calls: children of the caller's span, in the log by their trace."""

from __future__ import annotations

import json
import logging

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hetis.planner.service.observability.telemetry import JsonLines, Traces, open_traces
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.planner.service.serving import failure_of, served

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)


async def test_a_call_is_a_span_of_the_callers_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hetis")
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with served(traces=Traces(provider)) as planner:
        stub = PlanServiceStub(planner.channel)
        await stub.GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=5, metadata=PARENT)
        await failure_of(stub.GetPlan(plans.GetPlanRequest(name="plans/bug"), timeout=5))
        watch = stub.WatchPlan(plans.WatchPlanRequest(name="plans/missing"), metadata=PARENT)
        await failure_of(watch)
    found: tuple[ReadableSpan, ...] = exporter.get_finished_spans()
    assert [(span.name, (span.attributes or {})["rpc.grpc.status_code"]) for span in found] == [
        ("hetis.v1.PlanService/GetPlan", "OK"),
        ("hetis.v1.PlanService/GetPlan", "INTERNAL"),
        ("hetis.v1.PlanService/WatchPlan", "NOT_FOUND"),
    ]
    traces = [format(span.context.trace_id, "032x") for span in found if span.context]
    assert traces[0] == traces[2] == TRACE
    assert traces[1] != TRACE
    assert found[0].parent is not None
    assert found[1].parent is None
    assert [span.status.is_ok for span in found] == [True, False, True]
    lines = [json.loads(JsonLines().format(r)) for r in caplog.records if r.getMessage() in ("call", "stream ended")]
    assert [line["trace"] for line in lines] == traces


def test_without_an_endpoint_nothing_is_traced_and_nothing_imported() -> None:
    assert open_traces(None, "0") is None


async def test_an_endpoint_that_nobody_listens_on_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    traces = open_traces("http://127.0.0.1:1", "0")
    async with served(traces=traces) as planner:
        answer = await PlanServiceStub(planner.channel).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=5)
        assert answer.plan.name == "plans/p"
    traces.close()
