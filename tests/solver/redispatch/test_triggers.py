"""The triggers of re-dispatch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

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


@given(problems(max_devices=4))
def test_the_makespan_is_that_of_the_oracle(problem: RedispatchProblem) -> None:
    snapshot: StateSnapshot = problem.snapshot
    assert makespan_s(snapshot) == pytest.approx(oracle.makespan_s(snapshot, snapshot.groups), rel=1e-9, abs=1e-15)


def test_a_device_without_blocks_is_no_reason() -> None:
    empty = DispatchState(stage(2), [100, 0])
    empty.admit_one("a", context_tokens=4, remaining_tokens=0, groups=np.array([4, 0]))
    snapshot = replace(empty.snapshot(), devices=(empty.devices[0], DeviceSnapshot(name="d1", total_blocks=0)))
    assert triggers(snapshot, Dispatcher(empty.stage)) == ()
