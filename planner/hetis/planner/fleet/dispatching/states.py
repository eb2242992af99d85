"""The implementation of DispatchService: the states, in memory, of all replicas whose authority is the planner.

A restarted planner has no states: engines, which hold the KV, declare what is running. Calls are answered in the event
loop, including solves, which take a fraction of a millisecond. Large batches and large declarations are processed in a
thread, so that other calls do not wait. The compiled kernels have to be loaded first: `admit` waits for them once, for
up to a minute after an installation, and a caller whose deadline is earlier gets DEADLINE_EXCEEDED.
"""

from __future__ import annotations

import asyncio
import base64
import sys
import uuid
from collections.abc import Iterable
from itertools import islice

from hetis.planner.convert.stages import stage_from_proto
from hetis.planner.failures import Reason, ServiceError, invalid_field, not_found
from hetis.planner.fleet.dispatching.messages import (
    check_batch,
    check_step,
    declared,
    names_violations,
    placement_to_proto,
    request_violations,
)
from hetis.planner.fleet.dispatching.replica import BatchAdmission, ReplicaDispatch
from hetis.planner.fleet.dispatching.stage_copy import Newcomer
from hetis.planner.fleet.link import HeadMaps
from hetis.planner.fleet.views import LiveReplica, RunningReplicas
from hetis.planner.threads import run_in_daemon_thread
from hetis.solver.dispatch.solve import compile_dispatch
from hetis.v1 import change_pb2, redispatch_pb2, replica_pb2
from hetis.v1 import dispatch_service_pb2 as pb2

MOST_DECLARED_IN_LOOP = 100  # running requests on all stages, which take a few milliseconds
PAGE_SIZE, MOST_PAGE_SIZE = 1000, 10_000
_STATE = "/dispatchState"
_SHOWN = 80  # characters of an invalid name in a message


class DispatchStates:
    """One dispatch state per replica. Belongs to one event loop."""

    def __init__(self, replicas: RunningReplicas) -> None:
        self._replicas = replicas
        self._states: dict[str, ReplicaDispatch] = {}  # by replica
        self._warming: asyncio.Task[None] | None = None  # loads the kernels; None: not needed yet

    # --- kernels

    async def warm_up(self) -> None:
        """Compile or load the kernels of dispatch; the service starts this, `admit` waits for it.

        The work runs in a thread that does not keep the process alive. A caller whose deadline is earlier gets
        DEADLINE_EXCEEDED and retries.
        """
        if self._warming is None:
            self._warming = asyncio.ensure_future(run_in_daemon_thread(compile_dispatch, name="kernels of dispatch"))
        await asyncio.shield(self._warming)

    # --- calls

    async def admit(self, request: pb2.AdmitRequestsRequest) -> pb2.AdmitRequestsResponse:
        """Answer `AdmitRequests`. The `StageQuality` of the answer does not cover requests that already run."""
        state = await self._warm_state(request.parent, request.state_id)
        check_batch(len(request.requests), request_violations("requests", request.requests, "growth_tokens"))
        admitted = await state.admit(_newcomers(request.requests), keep=not request.validate_only)
        self._require_present(request.parent, state)
        return pb2.AdmitRequestsResponse(
            placements=_placements(state, request.requests, admitted),
            unplaced=admitted.refused.values(),
            stages=admitted.qualities,
        )

    async def step(self, request: pb2.DispatchRequestsRequest) -> pb2.DispatchRequestsResponse:
        """Answer a message of `DispatchRequests`. All of it is checked, in its turn, before anything is done."""
        state = await self._warm_state(request.parent, request.state_id)
        check_step(request)
        answer = pb2.DispatchRequestsResponse(sequence=request.sequence)
        if request.new_requests:
            newcomers = _newcomers(request.new_requests)
            admitted = await state.admit(newcomers, finished=request.finished, grown=request.grown)
            self._require_present(request.parent, state)
            answer.stalled.extend(admitted.stalled)
            answer.placements.extend(_placements(state, request.new_requests, admitted))
            answer.unplaced.extend(admitted.refused.values())
            answer.stages.extend(admitted.qualities)
            return answer
        if request.finished:
            state.finish(request.finished)
        if request.grown:
            answer.stalled.extend(state.grow(request.grown))
        return answer

    def _require_present(self, name: str, state: ReplicaDispatch) -> None:
        if self._states.get(name) is not state:
            raise self._lost(name, state.state_id)  # the engine has declared another state in the meantime

    def finish(self, request: pb2.FinishRequestsRequest) -> pb2.FinishRequestsResponse:
        state = self._state(request.parent, request.state_id)
        check_batch(len(request.requests), names_violations("requests", request.requests))
        state.finish(request.requests)
        return pb2.FinishRequestsResponse()

    def grow(self, request: pb2.GrowRequestsRequest) -> pb2.GrowRequestsResponse:
        state = self._state(request.parent, request.state_id)
        check_batch(len(request.requests), request_violations("requests", request.requests, "remaining_tokens"))
        return pb2.GrowRequestsResponse(stalled=state.grow(request.requests))

    def get(self, request: pb2.GetDispatchStateRequest) -> pb2.GetDispatchStateResponse:
        """Answer `GetDispatchState`; a replica without a declared state has no `state_id` and no head maps."""
        replica = self._replica_of_state(request.name, "name")
        if request.page_size < 0:
            raise invalid_field("page_size", f"is {request.page_size}, must be at least 0")
        size = min(request.page_size or PAGE_SIZE, MOST_PAGE_SIZE)
        state = self._states.get(replica.name)
        first = _position(request.page_token, state)
        answer = pb2.DispatchState(name=request.name, generation=replica.generation)
        if state is None:
            return pb2.GetDispatchStateResponse(dispatch_state=answer)
        answer.state_id = state.state_id
        names = list(islice(state.running, first, first + size))
        answer.head_maps.extend(state.head_maps(names))
        token = _token(state, first + size) if first + size < len(state.running) else ""
        return pb2.GetDispatchStateResponse(dispatch_state=answer, next_page_token=token)

    async def update(self, request: pb2.UpdateDispatchStateRequest) -> pb2.UpdateDispatchStateResponse:
        if wrong := [path for path in request.update_mask.paths if path not in ("head_maps", "*")]:
            raise invalid_field("update_mask", f"{wrong[0]} cannot be changed, only head_maps can")
        state = request.dispatch_state
        replica = self._replica_of_state(state.name, "dispatch_state.name")
        _require_generation(state, replica)
        if not replica.stages:
            what = "a prefill replica, which decodes nothing, or its plan is still being read"
            raise invalid_field("dispatch_state.name", f"{replica.name} has no stages to dispatch: it is {what}")
        terms = {(stage.stage, stage.copy): stage_from_proto(stage) for stage in replica.stages}
        if sum(len(one.requests) for one in state.head_maps) <= MOST_DECLARED_IN_LOOP:
            made = declared(state, terms, str(uuid.uuid4()))
        else:
            made = await asyncio.to_thread(declared, state, terms, str(uuid.uuid4()))
            replica = self._replica(replica.name)
            _require_generation(state, replica)
        made.follow(replica.conditions)
        self._states[replica.name] = made
        return pb2.UpdateDispatchStateResponse(state_id=made.state_id)

    # --- calls by the planner itself

    def head_maps(self, replica: str) -> HeadMaps | None:
        """Return the head maps of a replica, or None if no state was declared."""
        state, view = self._states.get(replica), self._replicas.replica_view(replica)
        if state is None or view is None:
            return None
        return HeadMaps(replica=replica, generation=view.generation, step=0, maps=tuple(state.head_maps()))

    def replica_changed(self, name: str) -> None:
        """Take over changes of a replica.

        Devices may be draining, lost or back, the replica may be gone, or its engine may now dispatch by itself.
        """
        state = self._states.get(name)
        replica = self._replicas.replica_view(name)
        if state is None:
            return
        if replica is None or replica.authority != replica_pb2.HEAD_MAP_AUTHORITY_PLANNER:
            del self._states[name]
            return
        state.follow(replica.conditions)

    def redispatch_begun(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Reserve room for the moves of a re-dispatch."""
        state = self._states.get(redispatch.replica)
        if state is not None:
            state.prepare(redispatch.change)

    def redispatch_refused(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Release the room for the moves of a re-dispatch that could not begin."""
        if (state := self._states.get(redispatch.replica)) is not None:
            state.abort(redispatch.change)

    def redispatch_ended(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Commit or abort the moves of a re-dispatch, as its authority decided."""
        state = self._states.get(redispatch.replica)
        if state is None:
            return
        if redispatch.state == redispatch_pb2.REDISPATCH_STATE_DONE:
            state.commit(redispatch.change, left_out_of(redispatch))
        else:
            state.abort(redispatch.change)

    # --- internals

    def _replica(self, name: str) -> LiveReplica:
        replica = self._replicas.replica_view(name)
        if replica is None:
            raise not_found(name)
        if replica.authority != replica_pb2.HEAD_MAP_AUTHORITY_PLANNER:
            message = f"the engine of {name} does its own dispatch"
            raise ServiceError(Reason.ERROR_REASON_ENGINE_IS_AUTHORITY, message, metadata={"replica": name})
        return replica

    def _replica_of_state(self, name: str, field: str) -> LiveReplica:
        if not name.endswith(_STATE):
            raise invalid_field(field, f"{name[:_SHOWN]!r} is not clusters/{{cluster}}/replicas/{{replica}}{_STATE}")
        return self._replica(name.removesuffix(_STATE))

    async def _warm_state(self, name: str, state_id: str) -> ReplicaDispatch:
        """Return a state with which dispatch can work at once. A state that does not exist is refused without delay."""
        state = self._state(name, state_id)
        if self._warming is not None and self._warming.done():
            return state
        await self.warm_up()
        return self._state(name, state_id)

    def _state(self, name: str, state_id: str) -> ReplicaDispatch:
        state = self._states.get(name)
        if state is not None and state.state_id == state_id:
            return state
        self._replica(name)
        raise self._lost(name, state_id)

    def _lost(self, name: str, state_id: str) -> ServiceError:
        state = self._states.get(name)
        present = "" if state is None else state.state_id
        return ServiceError(
            Reason.ERROR_REASON_DISPATCH_STATE_LOST,
            f"{name} has the dispatch state {present!r}, but the call refers to {state_id!r}: declare what is running",
            metadata={"replica": name, "state_id": present},
        )


def left_out_of(redispatch: redispatch_pb2.Redispatch) -> set[int]:
    """Return the numbers of moves that did not share the outcome of their change, as reported by its authority."""
    return {
        move.number
        for node in redispatch.nodes
        if change_pb2.CHANGE_PART_AUTHORITY in node.parts
        for move in node.status.moves
    }


def _require_generation(state: pb2.DispatchState, replica: LiveReplica) -> None:
    if state.generation != replica.generation:
        raise ServiceError(
            Reason.ERROR_REASON_GENERATION_MISMATCH,
            f"{state.name} is declared at generation {state.generation}, but the replica is at {replica.generation}",
            metadata={"base_generation": state.generation, "generation": replica.generation},
        )


def _newcomers(requests: Iterable[pb2.NewRequest]) -> list[Newcomer]:
    return [
        Newcomer(
            id=one.id, incarnation=one.incarnation, context_tokens=one.context_tokens, growth_tokens=one.growth_tokens
        )
        for one in requests
    ]


def _placements(
    state: ReplicaDispatch, requests: Iterable[pb2.NewRequest], admitted: BatchAdmission
) -> list[pb2.Placement]:
    """Return the placements of the requests admitted now, and of those that were already running."""
    return [
        placement_to_proto(one.id, state.running.get(one.id), admitted.homes.get(one.id))
        for one in requests
        if one.id in admitted.homes or one.id in state.running
    ]


def _token(state: ReplicaDispatch, first: int) -> str:
    return base64.urlsafe_b64encode(f"{first} {state.state_id}".encode()).decode()


def _position(token: str, state: ReplicaDispatch | None) -> int:
    if not token:
        return 0
    try:
        first, _, state_id = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(" ")
        if state is not None and state_id == state.state_id and 0 <= int(first) <= sys.maxsize // 2:
            return int(first)
    except ValueError:
        pass
    raise ServiceError(Reason.ERROR_REASON_INVALID_PAGE_TOKEN, f"page_token {token!r} does not belong to this state")
