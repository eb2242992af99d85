"""Admissions in one turn of the event loop share a plan, but each call has its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from hetis.planner.convert.stages import stage_from_proto
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.dispatching import replica as module
from hetis.planner.fleet.dispatching.messages import declared
from hetis.planner.fleet.dispatching.replica import BatchAdmission, ReplicaDispatch
from hetis.planner.fleet.dispatching.stage_copy import Newcomer
from hetis.v1 import dispatch_service_pb2 as pb2
from tests.planner.dispatching.stages import STATE, empty_map, stage_model


def dispatch(total_blocks: int = 1000) -> ReplicaDispatch:
    model = stage_model(3, total_blocks=total_blocks)
    state = pb2.DispatchState(name=STATE, generation=1, head_maps=[empty_map(model)])
    return declared(state, {(0, 0): stage_from_proto(model)}, "s")


def newcomer(name: str, context: int = 10) -> Newcomer:
    return Newcomer(id=name, incarnation=0, context_tokens=context, growth_tokens=0)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of requests in each plan."""
    found, plan = list[int](), module.admit

    def counted(stages: object, loads: object, newcomers: Sequence[Newcomer]) -> object:
        found.append(len(newcomers))
        return plan(stages, loads, newcomers)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "admit", counted)
    return found


def all_at_once(replica: ReplicaDispatch, *calls: Sequence[Newcomer]) -> list[BatchAdmission | BaseException]:
    async def ask() -> list[BatchAdmission | BaseException]:
        return await asyncio.gather(*(replica.admit(call) for call in calls), return_exceptions=True)

    return asyncio.run(ask())


def test_calls_of_one_turn_are_planned_as_one_batch_in_their_order(sizes: list[int]) -> None:
    calls = [[newcomer(f"r{c}-{n}", 3 + 5 * c + n) for n in range(2)] for c in range(4)]
    together, alone = dispatch(), dispatch()
    answers = all_at_once(together, *calls)
    assert sizes == [8]
    (whole,) = all_at_once(alone, [one for call in calls for one in call])
    assert isinstance(whole, BatchAdmission)
    for answer, call in zip(answers, calls, strict=True):
        assert isinstance(answer, BatchAdmission)
        assert list(answer.homes) == [one.id for one in call]
        for name, homes in answer.homes.items():
            assert [home.groups.tolist() for home in homes] == [home.groups.tolist() for home in whole.homes[name]]
        assert answer.qualities == whole.qualities
    assert str(together.head_maps()) == str(alone.head_maps())


def test_what_has_no_room_is_told_to_its_own_caller() -> None:
    answers = all_at_once(dispatch(total_blocks=8), [newcomer("a", 4)], [newcomer("b", 400)], [newcomer("c", 4)])
    found = [answer for answer in answers if isinstance(answer, BatchAdmission)]
    assert [list(answer.homes) for answer in found] == [["a"], [], ["c"]]
    assert [list(answer.refused) for answer in found] == [[], ["b"], []]
    assert found[1].qualities == ()


def test_a_call_that_contradicts_what_runs_fails_alone(sizes: list[int]) -> None:
    replica = dispatch()
    all_at_once(replica, [newcomer("a")])
    wrong, right = all_at_once(replica, [newcomer("b"), newcomer("a", 11)], [newcomer("c")])
    assert isinstance(wrong, ServiceError)
    assert wrong.reason == Reason.ERROR_REASON_REQUEST_RUNNING
    assert isinstance(right, BatchAdmission)
    assert set(replica.running) == {"a", "c"}
    assert sizes == [1, 1]


def test_the_same_request_twice_in_a_turn_is_admitted_once() -> None:
    replica = dispatch()
    first, again, other = all_at_once(replica, [newcomer("a")], [newcomer("a")], [newcomer("a", 11)])
    assert isinstance(first, BatchAdmission)
    assert isinstance(again, BatchAdmission)
    assert isinstance(other, ServiceError)
    assert (list(first.homes), list(again.homes), set(replica.running)) == (["a"], [], {"a"})


async def test_a_call_whose_caller_has_gone_admits_nothing() -> None:
    replica = dispatch()
    gone = asyncio.ensure_future(replica.admit([newcomer("a")]))
    stays = asyncio.ensure_future(replica.admit([newcomer("b")]))
    await asyncio.sleep(0)
    gone.cancel()
    await stays
    assert set(replica.running) == {"b"}


def test_small_batches_wait_for_a_large_one_that_is_planned_in_a_thread(sizes: list[int]) -> None:
    replica = dispatch()
    large = [newcomer(f"l{n}") for n in range(module.MOST_IN_LOOP + 1)]
    answers = all_at_once(replica, large, [newcomer("a")], [newcomer("b")])
    assert all(isinstance(answer, BatchAdmission) for answer in answers)
    assert sizes == [len(large), 2]
    assert len(replica.running) == len(large) + 2
