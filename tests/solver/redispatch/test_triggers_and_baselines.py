"""The triggers of re-dispatch, and the baselines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from benchmarks.measuring.baselines import last_admitted, paper_rule, whole_request_moves
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import DeviceSnapshot, StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
from hetis.solver.redispatch.triggers import TriggerKind, makespan_s, triggers
from tests.solver.dispatch_state.stages import stage
from tests.solver.redispatch import oracle
from tests.solver.redispatch.instances import problems


def lopsided() -> DispatchState:
    """Two equal devices, the first of which holds all running requests."""
    state = DispatchState(stage(2), [100, 100])
    state.admit_one("a", context_tokens=40, remaining_tokens=40, groups=np.array([4, 0]))
    state.admit_one("b", context_tokens=40, remaining_tokens=40, groups=np.array([4, 0]))
    return state


def kinds(state: DispatchState, theta: float = 0.5) -> list[TriggerKind]:
    return [trigger.kind for trigger in triggers(state.snapshot(), Dispatcher(state.stage), theta=theta)]


def test_a_stage_far_from_its_ideal_is_seen() -> None:
    state = lopsided()
    [trigger] = triggers(state.snapshot(), Dispatcher(state.stage))
    assert trigger.kind is TriggerKind.DEVIATION
    # 16 heads on one device: 16 (1 us + 8 bytes exchanged at 1 ns) + 1280 bytes at 1 ns + 2 us; half of that on two.
    assert makespan_s(state.snapshot()) == pytest.approx(16 * 1.008e-6 + 1.28e-6 + 2e-6)
    ideal_s = 8 * 1.008e-6 + 0.64e-6 + 2e-6
    assert trigger.value == pytest.approx(makespan_s(state.snapshot()) / ideal_s - 1, rel=1e-3)
    assert str(trigger) == "the makespan is 81% above the ideal, more than 50%"
    assert kinds(state, theta=0.9) == []


def test_memory_and_devices_are_seen_with_their_numbers() -> None:
    state = lopsided()
    state.grow(["a", "b"], 6)  # 12 blocks for each of 8 groups
    [found] = triggers(state.snapshot(), Dispatcher(state.stage), theta=9)
    assert str(found) == "d0 uses 96% of its KV blocks, more than 90%"
    state.drain_device(0)
    [found] = triggers(state.snapshot(), Dispatcher(state.stage), theta=9)
    assert str(found) == "d0 is draining and holds 8 head groups"
    state.restore_device(0)
    assert kinds(state, theta=9) == [TriggerKind.HIGH_WATER, TriggerKind.CHANGED]
    state.mark_seen()
    state.lose_device(1)
    assert kinds(state, theta=9) == [TriggerKind.HIGH_WATER, TriggerKind.LOST]


def test_an_empty_stage_gives_no_reason() -> None:
    assert triggers(DispatchState(stage(2), [0, 0]).snapshot(), Dispatcher(stage(2))) == ()
    with pytest.raises(InvalidProblemError, match="theta is -1"):
        triggers(lopsided().snapshot(), Dispatcher(stage(2)), theta=-1)


def problem_of(state: DispatchState) -> RedispatchProblem:
    num = state.stage.num_devices
    return RedispatchProblem(snapshot=state.snapshot(), num_layers=2, link_byte_s=np.full(num, 1e-12))


def test_the_papers_rule_moves_one_request() -> None:
    state = lopsided()
    moves = paper_rule(problem_of(state), Dispatcher(state.stage))
    assert [(move.groups, move.source, move.target) for move in moves] == [(4, 0, 1)]
    assert moves[0].num_bytes == 4 * 40 * 4 * 2


def test_the_papers_rule_frees_a_full_device() -> None:
    state = lopsided()
    moves = paper_rule(problem_of(state), Dispatcher(state.stage), device=0)
    assert {move.source for move in moves} == {0}
    assert len({move.request for move in moves}) == 1


def test_whole_requests_are_never_split() -> None:
    moves = whole_request_moves(problem_of(lopsided()))
    assert [(move.groups, move.source, move.target) for move in moves] == [(4, 0, 1)]


def test_the_last_admitted_is_evicted_first() -> None:
    snapshot = lopsided().snapshot()
    assert last_admitted(snapshot, 0) == "b"
    assert last_admitted(snapshot, 0, but=["b"]) == "a"
    assert last_admitted(snapshot, 1) is None


@given(problems())
def test_moves_of_baselines_can_be_carried_out(problem: RedispatchProblem) -> None:
    dispatcher = Dispatcher(problem.snapshot.stage)
    for moves in (paper_rule(problem, dispatcher), whole_request_moves(problem)):
        state = DispatchState.of(problem.snapshot)
        for together in dict.fromkeys(move.together for move in moves):
            prepared = [
                state.prepare_move(m.request, groups=m.groups, source=m.source, target=m.target)
                for m in moves
                if m.together == together
            ]
            numbers = [move.number for move in prepared if move is not None]
            assert len(numbers) == len(prepared)
            state.commit_moves(*numbers)
        state.check_invariants()


@given(problems(max_devices=4))
def test_the_makespan_is_that_of_the_oracle(problem: RedispatchProblem) -> None:
    snapshot: StateSnapshot = problem.snapshot
    assert makespan_s(snapshot) == pytest.approx(oracle.makespan_s(snapshot, snapshot.groups), rel=1e-9, abs=1e-15)


def test_a_device_without_blocks_is_no_reason() -> None:
    empty = DispatchState(stage(2), [100, 0])
    empty.admit_one("a", context_tokens=4, remaining_tokens=0, groups=np.array([4, 0]))
    snapshot = replace(empty.snapshot(), devices=(empty.devices[0], DeviceSnapshot(name="d1", total_blocks=0)))
    assert triggers(snapshot, Dispatcher(empty.stage)) == ()
