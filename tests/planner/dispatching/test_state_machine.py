"""DispatchService against a model that keeps one record per head group and recounts everything each time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.v1 import dispatch_service_pb2 as pb2
from hetis.v1 import report_pb2
from tests.planner.dispatching.stages import BLOCK, REPLICA, STATE, Replica, Replicas, empty_map, stage_model

GROUPS = 4
NAMES = [f"r{n}" for n in range(6)]
Place = tuple[int, int]


@dataclass
class Known:
    """A request as its engine knows it: owners by name for each (stage, copy) where it is."""

    admitted: tuple[int, int, int]
    context: int
    remaining: int
    owners: dict[Place, list[str]]

    def blocks(self, device: str) -> int:
        groups = sum(owner == device for owners in self.owners.values() for owner in owners)
        return groups * -(-self.context // BLOCK)


class Machine(RuleBasedStateMachine):
    """Every rule makes one call and applies it to the model."""

    @initialize(
        totals=st.lists(st.integers(0, 40), min_size=8, max_size=8),
        tp=st.sampled_from([1, 2]),
        copies=st.integers(1, 2),
    )
    def start(self, totals: list[int], tp: int, copies: int) -> None:
        self.models = [stage_model(2, copy=copy, tp=tp) for copy in range(copies)] + [stage_model(3, stage=1, tp=tp)]
        self.tp, rest = tp, iter(totals)
        self.totals = {device.name: next(rest) for model in self.models for device in model.devices}
        self.replica = Replica(self.models)
        self.states = DispatchStates(Replicas({REPLICA: self.replica}))
        self.known: dict[str, Known] = {}
        self.draining: set[str] = set()
        self.declare()

    def declare(self) -> None:
        maps = [empty_map(model, [self.totals[device.name] for device in model.devices]) for model in self.models]
        for one in maps:
            names = [device.name for device in one.devices]
            for name, known in self.known.items():
                if owners := known.owners.get((one.stage, one.copy)):
                    one.requests.add(
                        id=name,
                        incarnation=known.admitted[0],
                        context_tokens=known.context,
                        remaining_tokens=known.remaining,
                        owners=[names.index(owner) for owner in owners],
                    )
        state = pb2.DispatchState(name=STATE, generation=1, head_maps=maps)
        request = pb2.UpdateDispatchStateRequest(dispatch_state=state)
        self.state_id = asyncio.run(self.states.update(request)).state_id

    # --- rules

    @rule(
        batch=st.lists(
            st.tuples(st.sampled_from(NAMES), st.integers(1, 30), st.integers(0, 20), st.integers(0, 1)),
            min_size=1,
            max_size=4,
            unique_by=lambda one: one[0],
        ),
        validate_only=st.booleans(),
    )
    def admit(self, batch: list[tuple[str, int, int, int]], validate_only: bool) -> None:
        request = pb2.AdmitRequestsRequest(parent=REPLICA, state_id=self.state_id, validate_only=validate_only)
        for name, context, growth, incarnation in batch:
            request.requests.add(id=name, context_tokens=context, growth_tokens=growth, incarnation=incarnation)
        others = [
            name
            for name, context, growth, incarnation in batch
            if name in self.known and self.known[name].admitted != (incarnation, context, growth)
        ]
        if others:
            with pytest.raises(ServiceError) as caught:
                asyncio.run(self.states.admit(request))
            assert caught.value.reason == Reason.ERROR_REASON_REQUEST_RUNNING
            assert caught.value.metadata["request"] == others[0]
            return
        answer = asyncio.run(self.states.admit(request))
        placed = {placement.request: placement for placement in answer.placements}
        assert [name for name, *_ in batch if name in placed] == [one.request for one in answer.placements]
        assert placed.keys().isdisjoint(one.request for one in answer.unplaced)
        assert len(placed) + len(answer.unplaced) == len(batch)
        for name, context, growth, incarnation in batch:
            if name not in placed:
                continue
            stages = placed[name].stages
            assert [stage.stage for stage in stages] == [0, 1]
            owners = {(one.stage, one.copy): [one.devices[owner] for owner in one.owners] for one in stages}
            if name in self.known:
                assert self.known[name].owners == owners
            elif not validate_only:
                assert not self.draining & {owner for devices in owners.values() for owner in devices}
                self.known[name] = Known((incarnation, context, growth), context, growth, owners)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    def finish(self, names: list[str]) -> None:
        for _ in range(2):
            self.states.finish(pb2.FinishRequestsRequest(parent=REPLICA, state_id=self.state_id, requests=names))
        for name in names:
            self.known.pop(name, None)

    @rule(
        growths=st.lists(
            st.tuples(st.sampled_from(NAMES), st.integers(1, 60), st.none() | st.integers(0, 9)),
            min_size=1,
            max_size=4,
            unique_by=lambda one: one[0],
        )
    )
    def grow(self, growths: list[tuple[str, int, int | None]]) -> None:
        request = pb2.GrowRequestsRequest(parent=REPLICA, state_id=self.state_id)
        for name, tokens, remaining in growths:
            request.requests.add(id=name, context_tokens=tokens, remaining_tokens=remaining)
        stalled = list(self.states.grow(request).stalled)
        expected = []
        for name, tokens, remaining in growths:
            known = self.known.get(name)
            if known is None or tokens < known.context:
                continue
            before = (known.context, known.remaining)
            known.context = tokens
            known.remaining = max(0, before[1] - (tokens - before[0])) if remaining is None else remaining
            if any(used > self.totals[device] for device, used in self.used().items()):
                known.context, known.remaining = before
                expected.append(name)
        assert stalled == expected

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        self.draining = data.draw(st.sets(st.sampled_from(sorted(self.totals)), max_size=2))
        gpus = {device.name: device.gpus[0] for model in self.models for device in model.devices}
        self.replica.conditions = {gpus[name]: report_pb2.DEVICE_STATUS_DRAINING for name in self.draining}
        self.states.replica_changed(REPLICA)

    @precondition(lambda self: self.known)
    @rule()
    def restart(self) -> None:
        """A restarted planner gets the running requests, and continues as if it had not restarted."""
        self.states = DispatchStates(Replicas({REPLICA: self.replica}))
        for known in self.known.values():
            known.admitted = (known.admitted[0], known.context, known.remaining)
        self.declare()

    # --- invariants

    def used(self) -> dict[str, int]:
        return {device: sum(known.blocks(device) for known in self.known.values()) for device in self.totals}

    @invariant()
    def the_planner_knows_what_the_engine_knows(self) -> None:
        state = self.states.get(pb2.GetDispatchStateRequest(name=STATE)).dispatch_state
        seen: dict[str, dict[Place, list[str]]] = {}
        for one in state.head_maps:
            for request in one.requests:
                known = self.known[request.id]
                assert (request.context_tokens, request.remaining_tokens) == (known.context, known.remaining)
                assert len(request.owners) == GROUPS
                owners = [one.devices[owner].name for owner in request.owners]
                assert owners.count(one.devices[0].name) % self.tp == 0
                seen.setdefault(request.id, {})[one.stage, one.copy] = owners
        assert seen == {name: known.owners for name, known in self.known.items()}

    @invariant()
    def no_device_holds_more_blocks_than_it_has(self) -> None:
        assert all(used <= self.totals[device] for device, used in self.used().items())
        for copy in self.states._states[REPLICA].copies:
            copy.state.check_invariants()
            used = self.used()
            for i, name in enumerate(copy.terms.stage.devices):
                assert copy.state.free_blocks()[i] == self.totals[name] - used[name]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
