"""Dispatch and re-dispatch of a stage that the caller describes: solved as the verbs of the same names do, not kept."""

from __future__ import annotations

from functools import partial

import numpy as np

from hetis.formats.dispatch.new_requests import NewRequests
from hetis.formats.dispatch.saved_state import SavedState
from hetis.formats.errors import DocumentError
from hetis.planner.convert.documents import read_document
from hetis.planner.convert.plans import message_of
from hetis.planner.convert.stages import reason_to_proto
from hetis.planner.failures import invalid_document
from hetis.planner.resources.checks import Checks
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.planner.use_cases.dispatch.answers import Dispatched, Redispatched, dispatch_requests, redispatch_stage
from hetis.planner.use_cases.dispatch.stages import CostedStage, require_new, with_costs
from hetis.solver.dispatch.dispatch_problem import Path, Resource
from hetis.v1 import dispatch_service_pb2 as pb

MOST_NEW, MOST_RUNNING = 1024, 4096  # requests of a call, which occupies a thread of the planner until it is solved
_RESOURCES = {one: pb.MissingResource.Value(f"MISSING_RESOURCE_{one.name}") for one in Resource}
_PATHS = {one: pb.DispatchPath.Value(f"DISPATCH_PATH_{one.name}") for one in Path}


async def solve_dispatch(request: pb.SolveDispatchRequest) -> pb.SolveDispatchResponse:
    """Place new requests. Raises INVALID_FIELD, INVALID_DOCUMENT or INVALID_PROBLEM."""
    checks = Checks()
    state = await _state(checks, request)
    new = await checks.document("requests", request.requests, partial(read_document, kind=NewRequests))
    if new is not None:
        checks.require(len(new.requests) <= MOST_NEW, "requests", f"are {len(new.requests)}, at most {MOST_NEW}")
    checks.raise_if_wrong()
    assert state is not None
    assert new is not None

    def solve() -> Dispatched:
        stage = _costed(state, request)
        require_new(stage, new, request.requests.source_name or "document")
        return dispatch_requests(stage, new)

    try:
        found = await run_in_thread_gc_paused(solve)
    except DocumentError as error:
        raise invalid_document(error, "requests") from None
    plan, names = found.plan, found.stage.snapshot.stage.devices
    unplaced = {one.id for one in plan.unplaced}
    return pb.SolveDispatchResponse(
        placements=[
            pb.Placement(request=one.id, head_groups={names[i]: int(groups[i]) for i in np.flatnonzero(groups)})
            for one, groups in zip(new.requests, plan.groups, strict=True)
            if one.id not in unplaced
        ],
        unplaced=[
            pb.Unplaced(request=one.id, resource=_RESOURCES[one.resource], missing=one.missing) for one in plan.unplaced
        ],
        makespan_s=plan.makespan_s,
        bound_s=plan.bound_s,
        path=_PATHS[plan.path],
    )


async def solve_redispatch(request: pb.SolveRedispatchRequest) -> pb.SolveRedispatchResponse:
    """Find moves that pay. Raises INVALID_FIELD, INVALID_DOCUMENT or INVALID_PROBLEM."""
    checks = Checks()
    state = await _state(checks, request)
    checks.raise_if_wrong()
    assert state is not None

    def solve() -> Redispatched:
        return redispatch_stage(_costed(state, request))

    plan, names = (await run_in_thread_gc_paused(solve)).plan, [device.name for device in state.devices]
    return message_of(
        pb.SolveRedispatchResponse,
        plan,
        moves=[
            pb.SolvedMove(
                request=move.request,
                num_groups=move.groups,
                source=names[move.source],
                target=names[move.target],
                kv_bytes=move.num_bytes,
                reason=reason_to_proto(move.reason),
                together=move.together,
            )
            for move in plan.moves
        ],
    )


async def _state(checks: Checks, request: pb.SolveDispatchRequest | pb.SolveRedispatchRequest) -> SavedState | None:
    state = await checks.document("state", request.state, partial(read_document, kind=SavedState))
    if state is not None:
        message = f"has {len(state.requests)} running requests, at most {MOST_RUNNING}"
        checks.require(len(state.requests) <= MOST_RUNNING, "state", message)
    return state


def _costed(state: SavedState, request: pb.SolveDispatchRequest | pb.SolveRedispatchRequest) -> CostedStage:
    return with_costs(state, request.state.source_name or "document", {})
