"""All events in the life of a search, with scripted solver processes."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy

from hetis.planner import callers
from hetis.planner.jobs.pool import PoolSettings
from hetis.planner.resources.pages import MOST_PAGE_BYTES
from hetis.planner.service.identity.credentials import NoCredentials
from hetis.planner.store import Transaction, records
from hetis.v1 import cluster_service_pb2, document_pb2, failure_pb2, plan_pb2, view_pb2
from hetis.v1 import plan_service_pb2 as pb2
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.planner.resources.planned import (
    CRASH,
    FIND_NOTHING,
    HANG,
    WAIT,
    Planner,
    create_request,
    planner_in,
)
from tests.planner.resources.served import refused
from tests.planner.store import samples

QUEUED, SOLVING = plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING
CANCELLED, FAILED = plan_pb2.PLAN_STATE_CANCELLED, plan_pb2.PLAN_STATE_FAILED


async def cancel(planner: Planner, name: str) -> plan_pb2.Plan:
    return (await planner.call("CancelPlan", pb2.CancelPlanRequest(name=name))).plan  # type: ignore[no-any-return]


async def test_a_crashed_solver_process_is_a_failed_plan_and_nothing_else(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("bad", seed=CRASH)
        plan = await planner.solved("plans/bad")
        assert plan.state == FAILED
        assert plan.failure.reason == failure_pb2.ERROR_REASON_SOLVER_CRASHED
        assert dict(plan.failure.metadata) == {"exit_code": "3"}
        assert plan.failure.message == "the solver process ended with exit code 3: MemoryError: no room for tables"
        await planner.create("next", seed=FIND_NOTHING)
        assert (await planner.solved("plans/next")).failure.reason == failure_pb2.ERROR_REASON_NO_PLAN_FOUND


async def test_a_killed_solver_process_is_a_failed_plan_with_its_signal(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        # If the process were killed before its first report, the search would start again.
        await planner.until("plans/night", lambda plan: plan.HasField("progress"))
        os.kill(planner.pool.pids[0], signal.SIGKILL)
        plan = await planner.solved("plans/night")
        assert dict(plan.failure.metadata) == {"exit_code": "-9"}


async def test_a_plan_that_waits_is_cancelled_at_once_and_never_solved(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("first", seed=WAIT)
        await planner.solving("plans/first")
        await planner.create("second", seed=WAIT)
        await cancel(planner, "plans/second")
        assert (await planner.solved("plans/second")).state == CANCELLED
        again = await cancel(planner, "plans/second")
        assert again.state == CANCELLED


async def test_a_repeated_cancellation_leaves_a_later_search_of_the_same_name_alone(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        request = pb2.CancelPlanRequest(name="plans/night", request_id=str(uuid.uuid4()))
        await planner.create("night", seed=WAIT)
        await planner.solving("plans/night")
        await planner.call("CancelPlan", request)
        assert (await planner.solved("plans/night")).state == CANCELLED
        await planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/night"))
        await planner.create("night", seed=WAIT)
        await planner.solving("plans/night")
        await planner.call("CancelPlan", request)
        await asyncio.sleep(0.1)
        await planner.solving("plans/night")
        await cancel(planner, "plans/night")
        assert (await planner.solved("plans/night")).state == CANCELLED


async def test_a_search_that_is_called_off_answers_with_the_best_plan_so_far(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        await planner.solving("plans/night")
        await cancel(planner, "plans/night")
        plan = await planner.solved("plans/night")
        assert plan.state == CANCELLED
        assert (plan.result.status, plan.result.value) == (plan_pb2.SOLVE_STATUS_INTERRUPTED, 1.0)
        read = planner.stub.ReadPlanDocument(pb2.ReadPlanDocumentRequest(name="plans/night"))
        assert (await read.read()).content == b"incumbent"


async def test_a_search_that_does_not_hear_is_cancelled_all_the_same(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True, settings=PoolSettings(grace_s=0.2)) as planner:
        await planner.create("deaf", seed=HANG)
        await planner.solving("plans/deaf")
        told = await cancel(planner, "plans/deaf")
        assert told.state == SOLVING
        assert (await planner.solved("plans/deaf")).state == CANCELLED


async def test_a_full_queue_says_when_to_come_again_but_answers_what_it_has_answered(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True, settings=PoolSettings(queue_size=1)) as planner:
        await planner.create("first", seed=WAIT)
        await planner.solving("plans/first")
        request = create_request("second", request_id=str(uuid.uuid4()), seed=WAIT)
        made = await planner.call("CreatePlan", request)
        full = await refused(planner.call("CreatePlan", create_request("third", seed=WAIT)))
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SOLVER_QUEUE_FULL")
        assert full.metadata == {"queued": "1"}
        assert (await planner.call("CreatePlan", request)).plan == made.plan
        assert (await planner.call("CreatePlan", create_request("x", validate_only=True))).plan.name == "plans/x"
        other = create_request("third", request_id=request.request_id)
        assert (await refused(planner.call("CreatePlan", other))).reason == "REQUEST_ID_REUSED"
        await cancel(planner, "plans/second")
        await planner.solved("plans/second")
        await planner.create("third", seed=WAIT)


async def test_a_name_is_taken_once(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        taken = await refused(planner.call("CreatePlan", create_request("night", seed=WAIT)))
        assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")
        dry = await refused(planner.call("CreatePlan", create_request("night", validate_only=True)))
        assert dry.reason == "ALREADY_EXISTS"
        still = await refused(planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/night")))
        assert still.reason == "PLAN_STATE"
        assert still.message.endswith(" and cannot be deleted before its search has ended: cancel it first")


async def test_validate_only_answers_what_would_be_and_keeps_nothing(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        plan = (await planner.call("CreatePlan", create_request("dry", validate_only=True))).plan
        assert (plan.name, plan.state, plan.etag) == ("plans/dry", 0, "")
        assert not plan.HasField("create_time")
        assert not (await planner.call("ListPlans", pb2.ListPlansRequest())).plans
        assert planner.pool.num_waiting + planner.pool.num_running == 0


async def test_a_plan_is_answered_again_when_what_its_problem_was_made_of_is_gone(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        request = create_request("once", request_id=str(uuid.uuid4()), seed=WAIT)
        made = await planner.call("CreatePlan", request)
        await planner.clusters.delete(cluster_service_pb2.DeleteClusterRequest(name="clusters/paper"))
        assert (await planner.call("CreatePlan", request)).plan == made.plan
        for request_id in (str(uuid.uuid4()), ""):
            another = create_request("once", request_id=request_id, seed=WAIT)
            assert (await refused(planner.call("CreatePlan", another))).reason == "NOT_FOUND"
        other = create_request("other", request_id=request.request_id, seed=WAIT)
        assert (await refused(planner.call("CreatePlan", other))).reason == "REQUEST_ID_REUSED"


async def test_a_deleted_cluster_leaves_nothing_of_its_searches_even_if_the_planner_dies_then(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        await planner.solving("plans/night")
        assert await planner.store.read(lambda reader: reader.plan_documents.get("plans/night/problem"))
        await planner.clusters.delete(cluster_service_pb2.DeleteClusterRequest(name="clusters/paper"))
        rows = sqlalchemy.select(records.plan_documents.c.name)  # the search has not ended
        assert await planner.store.read(lambda reader: reader.connection.execute(rows).all()) == []


async def test_what_was_not_ended_is_queued_again_by_the_next_planner_but_for_what_was_called_off(
    tmp_path: Path,
) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("running", seed=WAIT)
        await planner.solving("plans/running")
        for name in ("waiting", "unwanted"):
            await planner.create(name, seed=FIND_NOTHING)
        before = await planner.stub.WatchPlan(pb2.WatchPlanRequest(name="plans/waiting")).read()
        await planner.create("deaf", seed=HANG)
        await planner.store.write(lambda tx: tx.plan_documents.delete("plans/unwanted/problem"))
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.solving("plans/running")
        assert (await planner.solved("plans/unwanted")).state == CANCELLED
        assert (await planner.get("plans/waiting")).state == QUEUED
        await cancel(planner, "plans/running")
        assert (await planner.solved("plans/waiting")).state == FAILED
        after = [
            r
            async for r in planner.stub.WatchPlan(
                pb2.WatchPlanRequest(name="plans/waiting", after_sequence=before.sequence)
            )
        ]
        assert after[-1].plan.state == FAILED
        assert after[-1].sequence > before.sequence


async def test_without_credentials_each_connection_has_its_own_share_of_the_queue(tmp_path: Path) -> None:
    """In the past one caller filled the queue with plans of an hour, and the next one got SOLVER_QUEUE_FULL."""
    settings = PoolSettings(num_processes=1, queued_per_caller=1)
    async with planner_in(tmp_path, scripted=True, settings=settings) as planner:
        for name in ("first", "second"):
            await planner.create(name, seed=WAIT)
        greedy = await refused(planner.call("CreatePlan", create_request("third", seed=WAIT)))
        assert greedy.reason == "QUOTA_EXCEEDED"
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(planner.address, options=options) as other:
            await PlanServiceStub(other).CreatePlan(create_request("third", seed=WAIT), timeout=30)


class OneCaller(NoCredentials):
    """Takes the callers of all connections for the same one."""

    def identify(self, *_: object) -> callers.Identity:
        return callers.ANYBODY


async def test_searches_still_count_as_their_callers_after_a_restart(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "settings": PoolSettings(num_processes=1, queued_per_caller=1),
        "authenticator": OneCaller(),
    }
    async with planner_in(tmp_path, scripted=True, **settings) as planner:
        for name in ("first", "second"):
            await planner.create(name, seed=WAIT)
    async with planner_in(tmp_path, scripted=True, **settings) as planner:
        assert planner.pool.searches_of().keys() == {callers.ANYBODY.name}
        another = await refused(planner.call("CreatePlan", create_request("third", seed=WAIT)))
        assert another.reason == "QUOTA_EXCEEDED"
        # An earlier version stored no callers.
        await planner.store.write(lambda tx: tx.plan_documents.delete("plans/second/caller"))
    async with planner_in(tmp_path, scripted=True, **settings) as planner:
        assert planner.pool.searches_of().keys() == {callers.ANYBODY.name, callers.PLANNER.name}
        await planner.create("third", seed=WAIT)


async def test_a_watch_ends_with_the_planner(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        watch = planner.stub.WatchPlan(pb2.WatchPlanRequest(name="plans/night"))
        await watch.read()
        planner.hubs.close()

        async def rest() -> None:
            while await watch.read() is not grpc.aio.EOF:
                pass

        ended = await refused(rest())
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        unknown = await refused(planner.call("GetPlan", pb2.GetPlanRequest(name="plans/other")))
        assert unknown.reason == "NOT_FOUND"
        wrong = await refused(planner.call("GetPlan", pb2.GetPlanRequest(name="night", view=view_pb2.VIEW_BASIC)))
        assert wrong.reason == "INVALID_FIELD"


async def test_a_watch_ends_with_the_term_as_one_that_another_planner_continues(tmp_path: Path) -> None:
    """In the past it was told that the planner shuts down, although that stood by from then on."""
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        watch = planner.stub.WatchPlan(pb2.WatchPlanRequest(name="plans/night"))
        await watch.read()
        planner.hubs.close(planner.store.leadership.not_leader())

        async def rest() -> None:
            while await watch.read() is not grpc.aio.EOF:
                pass

        ended = await refused(rest())
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_LEADER")


async def test_pages_begin_with_the_newest(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        for number in range(3):
            await planner.create(f"p{number}", seed=FIND_NOTHING)
        first = await planner.call("ListPlans", pb2.ListPlansRequest(page_size=2))
        assert [plan.name for plan in first.plans] == ["plans/p2", "plans/p1"]
        rest = pb2.ListPlansRequest(page_size=2, page_token=first.next_page_token)
        second = await planner.call("ListPlans", rest)
        assert [plan.name for plan in second.plans] == ["plans/p0"]
        assert not second.next_page_token
        rest.cluster = "clusters/paper"
        assert (await refused(planner.call("ListPlans", rest))).reason == "INVALID_PAGE_TOKEN"


async def test_pages_of_large_plans_fit_into_memory_and_into_an_answer(tmp_path: Path) -> None:
    """Some plans have megabytes of documents, which lists leave out; others are large even without these."""
    document = document_pb2.Document(content=b"x" * 2**20)
    labels = {f"label-{number}": "x" * 255 for number in range(64)}
    bodies = {
        **{f"plans/a{n}": plan_pb2.Plan(spec=plan_pb2.PlanSpec(workload_document=document)) for n in range(5)},
        **{f"plans/b{n:03}": plan_pb2.Plan(labels=labels) for n in range(400)},
        "plans/c": plan_pb2.Plan(
            spec=plan_pb2.PlanSpec(model_document=document_pb2.Document(content=b"x" * (4 << 20)))
        ),
    }

    def fill(tx: Transaction) -> None:
        for number, (name, body) in enumerate(bodies.items()):
            record = samples.plan(name, cluster="clusters/paper", time_s=float(number))
            tx.plans.insert(replace(record, body=body, state=plan_pb2.PLAN_STATE_READY))

    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.store.write(fill)
        pages, token = list[list[str]](), ""
        while token or not pages:
            page = await planner.call("ListPlans", pb2.ListPlansRequest(page_size=500, page_token=token))
            pages.append([plan.name for plan in page.plans])
            token = page.next_page_token
    assert [name for page in pages for name in page] == list(reversed(bodies))
    assert [page for page in pages if "plans/c" in page] == [["plans/c"]]
    for page in pages[1:]:
        assert sum(bodies[name].ByteSize() for name in page) <= MOST_PAGE_BYTES
