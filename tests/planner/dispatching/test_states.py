"""DispatchService as seen by its callers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.dispatching import states
from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.v1 import change_pb2, head_map_pb2, redispatch_pb2, replica_pb2, report_pb2
from hetis.v1 import dispatch_service_pb2 as pb2
from tests.planner.dispatching.stages import REPLICA, STATE, Replica, Replicas, empty_map, running, stage_model


class Service:
    """One replica, and short forms of its calls."""

    def __init__(self, replica: Replica, maps: Sequence[head_map_pb2.HeadMap] | None = None) -> None:
        self.replica = replica
        self.states = DispatchStates(Replicas({REPLICA: replica}))
        self.state_id = self.declare([empty_map(model) for model in replica.stages] if maps is None else maps)

    def declare(self, maps: Sequence[head_map_pb2.HeadMap], generation: int = 1) -> str:
        state = pb2.DispatchState(name=STATE, generation=generation, head_maps=maps)
        return asyncio.run(self.states.update(pb2.UpdateDispatchStateRequest(dispatch_state=state))).state_id

    def admit(
        self, *requests: pb2.NewRequest, validate_only: bool = False, state_id: str | None = None
    ) -> pb2.AdmitRequestsResponse:
        request = pb2.AdmitRequestsRequest(
            parent=REPLICA,
            state_id=self.state_id if state_id is None else state_id,
            requests=requests,
            validate_only=validate_only,
        )
        return asyncio.run(self.states.admit(request))

    def finish(self, *names: str) -> None:
        self.states.finish(pb2.FinishRequestsRequest(parent=REPLICA, state_id=self.state_id, requests=names))

    def grow(self, *growths: pb2.Growth) -> list[str]:
        request = pb2.GrowRequestsRequest(parent=REPLICA, state_id=self.state_id, requests=growths)
        return list(self.states.grow(request).stalled)

    def state(self) -> pb2.DispatchState:
        return self.states.get(pb2.GetDispatchStateRequest(name=STATE)).dispatch_state


def new(name: str, context: int = 10, growth: int = 0, incarnation: int = 0) -> pb2.NewRequest:
    return pb2.NewRequest(id=name, context_tokens=context, growth_tokens=growth, incarnation=incarnation)


def fields(error: ServiceError) -> list[str]:
    return [violation.field for violation in error.violations]


def test_every_head_group_of_a_request_gets_one_owner_on_every_stage() -> None:
    service = Service(Replica([stage_model(3), stage_model(2, stage=1)]))
    answer = service.admit(new("a"), new("b", 100))
    assert [placement.request for placement in answer.placements] == ["a", "b"]
    for placement in answer.placements:
        assert [stage.stage for stage in placement.stages] == [0, 1]
        for stage in placement.stages:
            assert len(stage.owners) == 4
            assert set(stage.owners) == set(range(len(stage.devices)))
    assert [(quality.stage, quality.copy) for quality in answer.stages] == [(0, 0), (1, 0)]
    assert all(0 < quality.bound_s <= quality.makespan_s for quality in answer.stages)
    assert all(quality.path for quality in answer.stages)


def test_a_repeated_request_is_answered_as_it_was_placed_even_when_it_has_grown() -> None:
    service = Service(Replica([stage_model(3)]))
    first = service.admit(new("a", 10, 20), new("b"))
    service.grow(pb2.Growth(id="a", context_tokens=15))
    again = service.admit(new("b"), new("a", 10, 20))
    assert sorted(map(str, again.placements)) == sorted(map(str, first.placements))
    assert not again.stages
    assert len(service.states.get(pb2.GetDispatchStateRequest(name=STATE)).dispatch_state.head_maps[0].requests) == 2


def test_a_running_request_with_other_numbers_is_refused_and_nothing_is_admitted() -> None:
    service = Service(Replica([stage_model(3)]))
    service.admit(new("a", 10))
    for other in (new("a", 11), new("a", 10, 1), new("a", 10, incarnation=1)):
        with pytest.raises(ServiceError) as caught:
            service.admit(new("b"), other)
        assert caught.value.reason == Reason.ERROR_REASON_REQUEST_RUNNING
        assert caught.value.metadata == {"request": "a"}
    assert [request.id for request in service.state().head_maps[0].requests] == ["a"]


def test_validate_only_tells_where_requests_would_go_and_admits_none() -> None:
    service = Service(Replica([stage_model(3)]))
    would = service.admit(new("a"), validate_only=True)
    assert not service.state().head_maps[0].requests
    assert str(service.admit(new("a"))) == str(would)


def test_a_request_that_one_stage_has_no_room_for_is_placed_on_none() -> None:
    models = [stage_model(2), stage_model(2, stage=1)]
    service = Service(Replica(models), [empty_map(models[0]), empty_map(models[1], [4, 4])])
    answer = service.admit(new("a", 4), new("b", 8), new("c", 4))  # 4 blocks, 8, 4
    assert [placement.request for placement in answer.placements] == ["a", "c"]
    (unplaced,) = answer.unplaced
    assert (unplaced.request, unplaced.stage) == ("b", 1)
    assert unplaced.resource == pb2.MISSING_RESOURCE_KV_BLOCKS
    assert unplaced.missing == 4
    assert [[r.id for r in one.requests] for one in service.state().head_maps] == [["a", "c"]] * 2


def test_what_a_stage_refuses_for_the_sake_of_a_request_that_does_not_come_is_tried_again() -> None:
    models = [stage_model(2), stage_model(2, stage=1)]
    service = Service(Replica(models), [empty_map(models[0], [4, 4]), empty_map(models[1], [3, 3])])
    # b fits on stage 0 (8 blocks), where c then finds no room, but not on stage 1 (6 blocks).
    answer = service.admit(new("b", 8), new("c", 4))
    assert [placement.request for placement in answer.placements] == ["c"]
    assert [(one.request, one.stage) for one in answer.unplaced] == [("b", 1)]


def test_requests_go_to_the_copy_with_most_room_and_to_the_other_when_it_is_full() -> None:
    models = [stage_model(1, copy=0), stage_model(1, copy=1)]
    service = Service(Replica(models), [empty_map(models[0], [12]), empty_map(models[1], [8])])
    answer = service.admit(*(new(name, 4) for name in "abcdef"))  # 4 blocks each
    assert [placement.stages[0].copy for placement in answer.placements] == [0, 0, 1, 0, 1]
    assert [one.request for one in answer.unplaced] == ["f"]


def test_growth_is_absolute_so_that_old_and_repeated_messages_change_nothing() -> None:
    service = Service(Replica([stage_model(2)]))
    service.admit(new("a", 10, 30))
    for tokens in (14, 14, 12):
        assert not service.grow(pb2.Growth(id="a", context_tokens=tokens))
    (request,) = service.state().head_maps[0].requests
    assert (request.context_tokens, request.remaining_tokens) == (14, 26)
    service.grow(pb2.Growth(id="a", context_tokens=15, remaining_tokens=100), pb2.Growth(id="?", context_tokens=9))
    (request,) = service.state().head_maps[0].requests
    assert (request.context_tokens, request.remaining_tokens) == (15, 100)
    service.grow(pb2.Growth(id="a", context_tokens=15, remaining_tokens=7))
    service.grow(pb2.Growth(id="a", context_tokens=14, remaining_tokens=50))
    (request,) = service.state().head_maps[0].requests
    assert (request.context_tokens, request.remaining_tokens) == (15, 7), "of the same length, but told later"


def test_a_request_without_room_on_one_stage_stalls_on_all_and_earlier_ones_go_first() -> None:
    models = [stage_model(1), stage_model(1, stage=1)]
    service = Service(Replica(models), [empty_map(models[0], [20]), empty_map(models[1], [12])])
    service.admit(new("a", 4), new("b", 4))  # 4 blocks each; 4 are left on stage 1
    assert service.grow(pb2.Growth(id="b", context_tokens=5), pb2.Growth(id="a", context_tokens=5)) == ["a"]
    for one in service.state().head_maps:
        assert {request.id: request.context_tokens for request in one.requests} == {"a": 4, "b": 5}


def test_requests_that_ended_leave_room_and_those_not_running_are_ignored() -> None:
    service = Service(Replica([stage_model(1)]), [empty_map(stage_model(1), [4])])
    service.admit(new("a", 4))
    assert service.admit(new("b", 4)).unplaced
    service.finish("a", "nobody")
    assert service.admit(new("b", 4)).placements


def test_a_state_that_is_not_the_planners_is_lost() -> None:
    service = Service(Replica([stage_model(1)]))
    old = service.state_id
    service.state_id = service.declare([empty_map(stage_model(1))])
    with pytest.raises(ServiceError) as caught:
        service.admit(new("a"), state_id=old)
    assert caught.value.reason == Reason.ERROR_REASON_DISPATCH_STATE_LOST
    assert caught.value.metadata == {"replica": REPLICA, "state_id": service.state_id}


def test_a_planner_that_restarted_has_no_state_and_says_so() -> None:
    service = Service(Replica([stage_model(1)]))
    service.states = DispatchStates(Replicas({REPLICA: service.replica}))
    with pytest.raises(ServiceError) as caught:
        service.finish("a")
    assert caught.value.metadata == {"replica": REPLICA, "state_id": ""}
    with pytest.raises(ServiceError):
        service.grow(pb2.Growth(id="a", context_tokens=1))
    assert service.state() == pb2.DispatchState(name=STATE, generation=1)


def test_a_large_batch_is_planned_beside_the_loop_and_again_when_something_changed_meanwhile() -> None:
    service = Service(Replica([stage_model(2)]), [empty_map(stage_model(2), [100, 0])])
    service.admit(*(new(f"old{n}", 4) for n in range(5)))  # 4 blocks each

    async def admit_while_others_finish() -> pb2.AdmitRequestsResponse:
        request = pb2.AdmitRequestsRequest(
            parent=REPLICA, state_id=service.state_id, requests=[new(f"r{n}", 4) for n in range(25)]
        )
        admitting = asyncio.ensure_future(service.states.admit(request))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        service.finish(*(f"old{n}" for n in range(5)))
        return await admitting

    answer = asyncio.run(admit_while_others_finish())
    assert len(answer.placements) == 25
    assert len(service.state().head_maps[0].requests) == 25


def step(service: Service, *finished: str, new: pb2.NewRequest) -> pb2.DispatchRequestsRequest:
    return pb2.DispatchRequestsRequest(parent=REPLICA, state_id=service.state_id, finished=finished, new_requests=[new])


@pytest.mark.parametrize("others", [0, 25])  # the first call is planned in the event loop, or in a thread
def test_a_step_that_admits_what_another_call_admits_first_finishes_nothing(others: int) -> None:
    service = Service(Replica([stage_model(2)]))
    service.admit(new("old"))
    first = pb2.AdmitRequestsRequest(
        parent=REPLICA, state_id=service.state_id, requests=[new("a"), *(new(f"r{n}", 4) for n in range(others))]
    )

    async def call() -> list[object]:
        steps = [step(service, "old", new=new("a", 11)), step(service, new=new("a"))]
        calls = [service.states.admit(first), *(service.states.step(one) for one in steps)]
        return await asyncio.gather(*calls, return_exceptions=True)

    admitted, contradicting, repeating = asyncio.run(call())
    assert isinstance(contradicting, ServiceError)
    assert contradicting.reason == Reason.ERROR_REASON_REQUEST_RUNNING
    assert {request.id for request in service.state().head_maps[0].requests} >= {"old", "a"}
    assert isinstance(admitted, pb2.AdmitRequestsResponse)
    assert isinstance(repeating, pb2.DispatchRequestsResponse)
    assert list(repeating.placements) == list(admitted.placements[:1])


def test_two_steps_that_start_a_request_anew_are_each_told_their_own_placement() -> None:
    service = Service(Replica([stage_model(2)]), [empty_map(stage_model(2), [4, 12])])

    async def call() -> list[pb2.DispatchRequestsResponse]:
        steps = [step(service, "a", new=new("a", 4)), step(service, "a", new=new("a", 12, incarnation=1))]
        return await asyncio.gather(*(service.states.step(one) for one in steps))

    first, second = asyncio.run(call())
    alone = Service(service.replica, [empty_map(stage_model(2), [4, 12])])
    assert list(first.placements) == list(alone.admit(new("a", 4)).placements)
    assert first.placements != second.placements
    (request,) = service.state().head_maps[0].requests
    assert (request.incarnation, request.context_tokens) == (1, 12)


def test_a_state_that_is_declared_anew_while_a_batch_is_planned_is_lost() -> None:
    service = Service(Replica([stage_model(2)]))

    async def admit_while_declared() -> None:
        request = pb2.AdmitRequestsRequest(
            parent=REPLICA, state_id=service.state_id, requests=[new(f"r{n}", 4) for n in range(25)]
        )
        admitting = asyncio.ensure_future(service.states.admit(request))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        state = pb2.DispatchState(name=STATE, generation=1, head_maps=[empty_map(stage_model(2))])
        await service.states.update(pb2.UpdateDispatchStateRequest(dispatch_state=state))
        await admitting

    asyncio.run(service.states.warm_up())
    with pytest.raises(ServiceError) as caught:
        asyncio.run(admit_while_declared())
    assert caught.value.reason == Reason.ERROR_REASON_DISPATCH_STATE_LOST
    assert not service.state().head_maps[0].requests


@pytest.mark.parametrize("name", [REPLICA, "clusters/a/replicas/none"])
def test_a_state_that_is_lost_is_refused_before_kernels_are_compiled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[str]()
    monkeypatch.setattr(states, "compile_dispatch", lambda: compiled.append(name))
    service = Service(Replica([stage_model(1)]))
    admit = pb2.AdmitRequestsRequest(parent=name, state_id="lost", requests=[new("a")])
    step = pb2.DispatchRequestsRequest(parent=name, state_id="lost", new_requests=[new("a")])
    for call in (lambda: service.states.admit(admit), lambda: service.states.step(step)):
        with pytest.raises(ServiceError) as caught:
            asyncio.run(call())
        lost = Reason.ERROR_REASON_DISPATCH_STATE_LOST
        assert (caught.value.reason == lost) == (name == REPLICA)
    assert not compiled


def test_an_engine_that_dispatches_by_itself_is_sent_away() -> None:
    service = Service(Replica([stage_model(1)]))
    service.replica.authority = replica_pb2.HEAD_MAP_AUTHORITY_ENGINE
    service.states.replica_changed(REPLICA)
    for call in (lambda: service.admit(new("a")), service.state, lambda: service.declare([])):
        with pytest.raises(ServiceError) as caught:
            call()
        assert caught.value.reason == Reason.ERROR_REASON_ENGINE_IS_AUTHORITY


def test_a_replica_without_stages_to_dispatch_is_refused() -> None:
    with pytest.raises(ServiceError) as caught:
        Service(Replica([]))
    assert caught.value.reason == Reason.ERROR_REASON_INVALID_FIELD
    assert f"{REPLICA} has no stages to dispatch: it is a prefill replica, which decodes nothing" in str(caught.value)


def test_another_generation_cannot_be_declared() -> None:
    service = Service(Replica([stage_model(1)]))
    with pytest.raises(ServiceError) as caught:
        service.declare([empty_map(stage_model(1))], generation=7)
    assert caught.value.reason == Reason.ERROR_REASON_GENERATION_MISMATCH
    assert caught.value.metadata == {"base_generation": "7", "generation": "1"}


def test_a_declaration_is_told_every_wrong_field_and_leaves_the_old_state() -> None:
    models = [stage_model(2), stage_model(2, stage=1)]
    service = Service(Replica(models))
    service.admit(new("a"))
    wrong = empty_map(models[0])
    wrong.devices[1].name = "elsewhere"
    wrong.devices[0].status = report_pb2.DEVICE_STATUS_UNSPECIFIED
    wrong.requests.append(running("", [0] * 4, context=0))
    wrong.requests.append(running("x", [0, 0, 9, 0]))
    with pytest.raises(ServiceError) as caught:
        service.declare([wrong, empty_map(stage_model(2, stage=5))])
    path = "dispatch_state.head_maps"
    assert fields(caught.value) == [
        f"{path}[0].devices[0].status",
        f"{path}[0].devices[1].name",
        f"{path}[0].requests[0].id",
        f"{path}[0].requests[0].context_tokens",
        f"{path}[0].requests[1].owners",
        f"{path}[1].stage",
        path,
        f"{path}[0].requests[0].id",
        f"{path}[0].requests[1].id",
    ]
    assert [request.id for request in service.state().head_maps[0].requests] == ["a"]


def test_a_declaration_that_does_not_fit_in_memory_is_refused() -> None:
    one = empty_map(stage_model(1), [3])
    one.requests.append(running("a", [0] * 4))
    with pytest.raises(ServiceError) as caught:
        Service(Replica([stage_model(1)]), [one])
    assert fields(caught.value) == ["dispatch_state.head_maps[0]"]


def test_a_large_declaration_is_read_beside_the_loop() -> None:
    one = empty_map(stage_model(2), [100_000, 100_000])
    one.requests.extend(running(f"r{n}", [n % 2] * 4, context=1 + n, remaining=n) for n in range(150))
    service = Service(Replica([stage_model(2)]), [one])
    assert service.state().head_maps[0] == one
    assert service.states.head_maps(REPLICA).maps == (one,)  # type: ignore[union-attr]


def test_a_declared_request_is_a_running_one() -> None:
    one = empty_map(stage_model(3))
    one.requests.append(running("a", [2, 1, 1, 0], context=12, remaining=5, incarnation=3))
    service = Service(Replica([stage_model(3)]), [one])
    assert service.state().head_maps[0] == one
    (placement,) = service.admit(new("a", 12, 5, 3)).placements
    (stage,) = placement.stages
    assert [stage.devices[owner] for owner in stage.owners] == ["s0c0/d2", "s0c0/d1", "s0c0/d1", "s0c0/d0"]


@pytest.mark.parametrize(
    ("requests", "wrong"),
    [
        ([], ["requests"]),
        ([new(f"r{n}") for n in range(1025)], ["requests"]),
        ([new("a", 0), new("a", 2**24 + 1), new("x" * 129, 1, 2**24 + 1)],
         ["requests[0].context_tokens", "requests[1].id", "requests[1].context_tokens", "requests[2].id",
          "requests[2].growth_tokens"]),
    ],
)  # fmt: skip
def test_wrong_batches_are_told_every_wrong_field(requests: list[pb2.NewRequest], wrong: list[str]) -> None:
    with pytest.raises(ServiceError) as caught:
        Service(Replica([stage_model(1)])).admit(*requests)
    assert caught.value.reason == Reason.ERROR_REASON_INVALID_FIELD
    assert fields(caught.value) == wrong


def test_pages_follow_each_other_and_tokens_of_other_states_are_refused() -> None:
    service = Service(Replica([stage_model(2)]))
    service.admit(*(new(f"r{n}") for n in range(5)))
    seen, token = list[str](), ""
    for _ in range(3):
        request = pb2.GetDispatchStateRequest(name=STATE, page_size=2, page_token=token)
        page = service.states.get(request)
        seen += [one.id for one in page.dispatch_state.head_maps[0].requests]
        token, old = page.next_page_token, token or page.next_page_token
    assert seen == [f"r{n}" for n in range(5)]
    assert token == ""
    service.declare([empty_map(stage_model(2))])
    for bad in (old, "nonsense", "é"):
        with pytest.raises(ServiceError) as caught:
            service.states.get(pb2.GetDispatchStateRequest(name=STATE, page_token=bad))
        assert caught.value.reason == Reason.ERROR_REASON_INVALID_PAGE_TOKEN


def test_a_lost_device_takes_its_requests_along_and_gets_no_new_ones() -> None:
    models = [stage_model(2), stage_model(1, stage=1)]
    maps = [empty_map(models[0]), empty_map(models[1])]
    for request in (running("a", [1, 1, 1, 1]), running("b", [0, 0, 0, 0])):
        maps[0].requests.append(request)
        maps[1].requests.append(running(request.id, [0] * 4))
    service = Service(Replica(models), maps)
    service.replica.conditions = {"s0c0/d1": report_pb2.DEVICE_STATUS_LOST}
    service.states.replica_changed(REPLICA)
    assert [[r.id for r in one.requests] for one in service.state().head_maps] == [["b"]] * 2
    (placement,) = service.admit(new("a")).placements
    assert placement.stages[0].devices == ["s0c0/d0"]


def test_moves_take_room_at_once_and_owners_change_when_the_authority_has_flipped() -> None:
    one = empty_map(stage_model(2), [100, 4])
    one.requests.append(running("a", [0, 0, 0, 0], context=4))
    service = Service(Replica([stage_model(2)]), [one])
    moves = [
        head_map_pb2.Move(number=n, request="a", head_groups=[n], source="s0c0/d0", target="s0c0/d1") for n in (0, 1)
    ]
    redispatch = redispatch_pb2.Redispatch(
        name="clusters/c/redispatches/x",
        replica=REPLICA,
        change=change_pb2.Change(change_id="x", replica=REPLICA, base_generation=1, generation=2, moves=moves),
    )
    service.states.redispatch_begun(redispatch)
    assert [move.move.number for move in service.state().head_maps[0].moves] == [0, 1]
    assert list(service.state().head_maps[0].requests[0].owners) == [0, 0, 0, 0]
    redispatch.state = redispatch_pb2.REDISPATCH_STATE_DONE
    redispatch.nodes.add(
        node="n",
        parts=[change_pb2.CHANGE_PART_AUTHORITY],
        status=change_pb2.ChangeStatus(moves=[change_pb2.MoveResult(number=1)]),
    )
    service.states.redispatch_ended(redispatch)
    state = service.state()
    assert list(state.head_maps[0].requests[0].owners) == [1, 0, 0, 0]
    assert not state.head_maps[0].moves


def test_the_generation_is_what_the_primary_reports_whatever_was_decided_about_the_replica() -> None:
    service = Service(Replica([stage_model(2)]))
    service.states.redispatch_ended(
        redispatch_pb2.Redispatch(
            replica=REPLICA,
            change=change_pb2.Change(change_id="x", generation=2),
            state=redispatch_pb2.REDISPATCH_STATE_DONE,
        )
    )
    assert service.state().generation == 1
    service.declare([empty_map(stage_model(2))], generation=service.state().generation)
    service.replica.generation = 2
    assert service.state().generation == 2


def test_an_aborted_redispatch_leaves_everything_where_it_is() -> None:
    one = empty_map(stage_model(2))
    one.requests.append(running("a", [0, 0, 0, 0], context=4))
    service = Service(Replica([stage_model(2)]), [one])
    before = service.state()
    move = head_map_pb2.Move(request="a", head_groups=[0], source="s0c0/d0", target="s0c0/d1")
    redispatch = redispatch_pb2.Redispatch(
        replica=REPLICA, change=change_pb2.Change(change_id="x", generation=2, moves=[move])
    )
    service.states.redispatch_begun(redispatch)
    redispatch.state = redispatch_pb2.REDISPATCH_STATE_ABORTED
    service.states.redispatch_ended(redispatch)
    assert service.state() == before


def test_a_replica_that_does_not_exist_has_no_state() -> None:
    states = DispatchStates(Replicas())
    with pytest.raises(ServiceError) as caught:
        states.get(pb2.GetDispatchStateRequest(name=STATE))
    assert caught.value.reason == Reason.ERROR_REASON_NOT_FOUND
    assert caught.value.metadata == {"name": REPLICA}
