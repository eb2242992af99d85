"""Dispatch and re-dispatch of a described stage, through a real server: what the verbs answer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.planner.use_cases.dispatch.answers import dispatch_requests, redispatch_stage
from hetis.planner.use_cases.dispatch.stages import load_new_requests, load_stage
from hetis.v1 import dispatch_service_pb2 as pb
from hetis.v1 import document_pb2, head_map_pb2
from tests.planner.command_line import EXAMPLES
from tests.planner.resources.served import refused, served

STAGES = EXAMPLES / "dispatch"


def document(name: str, *, text: str = "") -> document_pb2.Document:
    text = text or (STAGES / f"{name}.yaml").read_text()
    return document_pb2.Document(content=text.encode(), source_name=f"{name}.yaml")


def requests(*contexts: int, prefix: str = "new", number: bool = True) -> document_pb2.Document:
    names = [f"{prefix}-{n}" if number else prefix for n in range(len(contexts))]
    listed = "".join(
        f"- {{id: {name}, context_tokens: {tokens}}}\n" for name, tokens in zip(names, contexts, strict=True)
    )
    return document("requests", text=f"apiVersion: hetis/v1\nkind: DispatchRequests\nrequests:\n{listed}")


async def test_a_dispatch_is_that_of_the_verb(tmp_path: Path) -> None:
    stage = load_stage(str(STAGES / "a100-l4.yaml"))
    new = load_new_requests(stage, file=None, words=["8000/0", "500/0"])
    expected = dispatch_requests(stage, new).plan
    request = pb.SolveDispatchRequest(state=document("a100-l4"), requests=requests(8000, 500))
    async with served(tmp_path) as planner:
        answer = await planner.dispatch.SolveDispatch(request)
    devices = stage.snapshot.stage.devices
    given = [{name: n for name, n in zip(devices, row.tolist(), strict=True) if n} for row in expected.groups]
    assert [dict(one.head_groups) for one in answer.placements] == given
    assert [one.request for one in answer.placements] == ["new-0", "new-1"]
    assert (answer.makespan_s, answer.bound_s) == (expected.makespan_s, expected.bound_s)
    assert pb.DispatchPath.Name(answer.path) == f"DISPATCH_PATH_{expected.path.name}"


async def test_what_does_not_fit_is_told_and_the_others_are_placed(tmp_path: Path) -> None:
    request = pb.SolveDispatchRequest(state=document("drifted"), requests=requests(2_000_000, 500))
    async with served(tmp_path) as planner:
        answer = await planner.dispatch.SolveDispatch(request)
    assert [one.request for one in answer.placements] == ["new-1"]
    (unplaced,) = answer.unplaced
    assert (unplaced.request, unplaced.resource) == ("new-0", pb.MISSING_RESOURCE_KV_BLOCKS)
    assert unplaced.missing > 0


async def test_a_redispatch_is_that_of_the_verb(tmp_path: Path) -> None:
    expected = redispatch_stage(load_stage(str(STAGES / "draining.yaml"))).plan
    async with served(tmp_path) as planner:
        answer = await planner.dispatch.SolveRedispatch(pb.SolveRedispatchRequest(state=document("draining")))
    assert [(one.request, one.num_groups) for one in answer.moves] == [(m.request, m.groups) for m in expected.moves]
    assert {one.source for one in answer.moves if one.reason == head_map_pb2.MOVE_REASON_DRAIN} == {"l4-3"}
    assert (answer.bound_s, answer.objective_s, answer.stay_s) == (
        expected.bound_s,
        expected.objective_s,
        expected.stay_s,
    )
    assert answer.makespan_after_s == expected.makespan_after_s


RUNNING = load_stage(str(STAGES / "drifted.yaml")).saved.requests[0].id


@pytest.mark.parametrize(
    ("new", "reason", "message"),
    [
        (document("a100-l4"), "INVALID_DOCUMENT", "expected DispatchRequests"),
        (requests(*[1] * 1025), "INVALID_FIELD", "are 1025, at most 1024"),
        (requests(1, prefix=RUNNING, number=False), "INVALID_DOCUMENT", f"request {RUNNING!r} is running already"),
    ],
)
async def test_requests_that_no_engine_would_get_are_refused(
    new: document_pb2.Document, reason: str, message: str, tmp_path: Path
) -> None:
    request = pb.SolveDispatchRequest(state=document("drifted"), requests=new)
    async with served(tmp_path) as planner:
        error = await refused(planner.dispatch.SolveDispatch(request))
    assert error.reason == reason
    assert message in " ".join(error.fields.values())
