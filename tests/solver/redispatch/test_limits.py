"""Problems, triggers and watches accept values up to their limits, and refuse those beyond."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason, RedispatchPlan, RedispatchProblem
from hetis.solver.redispatch.redispatch_tables import horizons, marks
from hetis.solver.redispatch.triggers import CHANGE, MOST_CHANGE, THETA, Trigger, TriggerKind, Watch, triggers
from tests.solver.dispatch_state.stages import stage

INF, NAN = float("inf"), float("nan")
ABOVE_1, BELOW_0 = np.nextafter(1.0, 2.0), np.nextafter(0.0, -1.0)


def two_devices() -> DispatchState:
    """Request a has 4 groups of 10 tokens, 3 blocks each, on the first of two devices of 30 blocks."""
    state = DispatchState(stage(2), [30, 30])
    state.admit_one("a", context_tokens=10, remaining_tokens=20, groups=np.array([4, 0]))
    return state


def problem(**changes: Any) -> RedispatchProblem:
    given: dict[str, Any] = {"snapshot": two_devices().snapshot(), "num_layers": 2, "link_byte_s": np.full(2, 1e-10)}
    return RedispatchProblem(**given | changes)


def test_a_problem_takes_what_is_just_within_its_limits() -> None:
    for name, values in (
        ("num_layers", (1,)),
        ("link_byte_s", (np.zeros(2),)),
        ("budget_bytes", (0.0, INF)),
        ("least_gain", (0.0, np.nextafter(1.0, 0.0))),
        ("patience", (1e-9, 1.0)),
        ("ahead_steps", (0,)),
        ("full", (frozenset[int](), frozenset({0, 1}))),
        ("refill_token_s", (0.0,)),
    ):
        for value in values:
            assert getattr(problem(**{name: value}), name) is value


def test_a_problem_refuses_what_is_just_beyond_its_limits() -> None:
    beyond: list[tuple[str, Any, str]] = [
        ("num_layers", 0, "num_layers is 0, must be >= 1"),
        *(("link_byte_s", np.array([0.0, value]), "link_byte_s must be 2 finite numbers >= 0")
          for value in (BELOW_0, INF, NAN)),
        ("link_byte_s", np.zeros(3), "link_byte_s must be 2 finite numbers >= 0"),
        *(("budget_bytes", value, f"budget_bytes is {value}, must be >= 0") for value in (BELOW_0, NAN)),
        *(("least_gain", value, f"least_gain is {value}, must be >= 0 and < 1") for value in (BELOW_0, 1.0, NAN)),
        *(("patience", value, f"patience is {value}, must be > 0 and <= 1") for value in (0.0, ABOVE_1, NAN)),
        *(("full", frozenset({value}), rf"full devices are \[{value}\], the stage has 2 devices") for value in (-1, 2)),
        ("ahead_steps", -1, "ahead_steps is -1 and refill_token_s 0.0004, must be finite and >= 0"),
        *(("refill_token_s", value, f"and refill_token_s {value}, must be finite") for value in (BELOW_0, INF, NAN)),
    ]  # fmt: skip
    for name, value, message in beyond:
        with pytest.raises(InvalidProblemError, match=message):
            problem(**{name: value})


def test_a_problem_is_patient_for_a_quarter_of_a_request_and_looks_a_hundred_steps_ahead() -> None:
    usual = problem()
    assert (usual.patience, usual.ahead_steps, usual.least_gain) == (0.25, 100, 0.01)
    assert (usual.budget_bytes, usual.refill_token_s, usual.full) == (INF, 4e-4, frozenset())


def test_blocks_are_counted_after_a_block_and_far_ahead() -> None:
    assert horizons(problem()) == (4, 100)  # blocks of 4 tokens
    assert horizons(problem(ahead_steps=4)) == (4,)
    assert horizons(problem(ahead_steps=3)) == (3,)


def test_moves_fill_a_device_to_its_mark_or_while_another_drains_altogether() -> None:
    assert marks(problem()).tolist() == [27, 27]
    state = two_devices()
    state.drain_device(0)
    assert marks(problem(snapshot=state.snapshot())).tolist() == [30, 30]


def kinds(state: DispatchState, **changes: Any) -> list[tuple[TriggerKind, str | None, float, float]]:
    fired = triggers(state.snapshot(), Dispatcher(state.stage), **{"theta": 99.0} | changes)
    return [(one.kind, one.device, one.value, one.limit) for one in fired]


def test_a_device_at_its_mark_is_no_reason_and_one_block_above_it_is() -> None:
    state = DispatchState(stage(2), [12, 30], high_water=1.0)
    state.admit_one("a", context_tokens=10, remaining_tokens=0, groups=np.array([4, 0]))
    assert kinds(state) == []
    state = DispatchState(stage(2), [24, 30], high_water=0.5)
    state.admit_one("a", context_tokens=12, remaining_tokens=0, groups=np.array([4, 0]))
    assert kinds(state) == []
    state.grow(["a"])
    assert kinds(state) == [(TriggerKind.HIGH_WATER, "d0", 16 / 24, 0.5)]
    state.drain_device(0)  # a device that drains has no high-water mark, and causes no other trigger
    assert kinds(state) == [(TriggerKind.DRAINING, "d0", 4.0, 0.0)]
    state.drain_device(1)
    assert kinds(state) == [(TriggerKind.DRAINING, "d0", 4.0, 0.0)]  # the other device is empty


def test_a_stage_as_far_from_its_ideal_as_the_limit_is_no_reason() -> None:
    state = two_devices()
    assert THETA == 0.5
    [(kind, device, value, limit)] = kinds(state, theta=0.0)
    assert (kind, device, limit) == (TriggerKind.DEVIATION, None, 0.0)
    assert kinds(state, theta=value) == []
    assert len(kinds(state, theta=value * (1 - 1e-9))) == 1
    with pytest.raises(InvalidProblemError, match="theta is -5e-324, must be >= 0"):
        kinds(state, theta=BELOW_0)


def test_what_drains_serves_in_the_ideal_only_where_it_must() -> None:
    state = DispatchState(stage(2), [30, 5])
    state.admit_one("a", context_tokens=10, remaining_tokens=20, groups=np.array([4, 0]))
    state.drain_device(0)
    assert kinds(state, theta=0.0)[-1] == (TriggerKind.DRAINING, "d0", 4.0, 0.0)
    roomy = DispatchState(stage(2), [30, 30])
    roomy.admit_one("a", context_tokens=10, remaining_tokens=20, groups=np.array([4, 0]))
    roomy.drain_device(0)
    assert [one[0] for one in kinds(roomy, theta=1e-6)] == [TriggerKind.DRAINING]  # the other would be as slow alone


@pytest.mark.parametrize("change", [0.0, np.nextafter(MOST_CHANGE, 1.0), -0.1])
def test_a_watch_refuses_shares_beyond_its_limits(change: float) -> None:
    assert (CHANGE, MOST_CHANGE) == (0.2, 0.8)
    Watch(change=MOST_CHANGE)
    Watch(change=1e-9)
    with pytest.raises(InvalidProblemError, match=rf"^change is {change}, must be > 0 and <= 0.8$"):
        Watch(change=change)


def crowd(num_requests: int) -> DispatchState:
    state = DispatchState(stage(2), [10**6, 10**6])
    for j in range(num_requests):
        state.admit_one(f"r{j}", context_tokens=100, remaining_tokens=100, groups=np.array([4, 0]))
    return state


def trigger(value: float, kind: TriggerKind = TriggerKind.DEVIATION, device: str | None = None) -> Trigger:
    return Trigger(kind=kind, device=device, value=value, limit=0.5)


def test_a_trigger_is_news_when_its_value_has_grown_by_more_than_the_ratio() -> None:
    watch, seen = Watch(change=0.25), crowd(10).snapshot()
    watch.looked(seen, (trigger(1.0),), moved=False)
    assert watch.due(seen, (trigger(1.25),)) == ()
    assert watch.due(seen, (trigger(1.2500001),)) == (trigger(1.2500001),)
    other = trigger(0.1, TriggerKind.HIGH_WATER, "d0")
    assert watch.due(seen, (trigger(1.0), other)) == (other,)
    events = (trigger(0.0, TriggerKind.LOST, "d1"), trigger(0.0, TriggerKind.CHANGED, "d0"))
    watch.looked(seen, events, moved=False)
    assert watch.due(seen, events) == events
    # The ratio has doubled to 0.5, and the value remembered is the last one that led to a search.
    assert watch.due(seen, (trigger(1.5),)) == ()
    assert watch.due(seen, (trigger(1.5001),)) == (trigger(1.5001),)


def test_a_stage_is_new_when_more_than_the_share_of_its_kv_came_or_went() -> None:
    """With 20 requests, 2 that come and 2 that go are 4 of 40, a tenth; 3 of each are 6 of 40."""
    for gone, is_new in ((2, False), (3, True)):
        state, watch = crowd(20), Watch(change=0.1)
        fired = (trigger(1.0),)
        watch.looked(state.snapshot(), fired, moved=False)
        for j in range(gone):
            state.finish(f"r{j}")
            state.admit_one(f"new{j}", context_tokens=100, remaining_tokens=0, groups=np.array([4, 0]))
        assert watch.due(state.snapshot(), fired) == (fired if is_new else ())
        watch.looked(state.snapshot(), fired, moved=False)
        for j in range(gone, 2 * gone):  # the share has doubled to a fifth
            state.finish(f"r{j}")
            state.admit_one(f"new{j}", context_tokens=100, remaining_tokens=0, groups=np.array([4, 0]))
        assert watch.due(state.snapshot(), fired) == ()


def test_the_share_doubles_up_to_its_limit_and_begins_anew_where_devices_changed() -> None:
    state, watch, fired = crowd(10), Watch(change=0.3), (trigger(1.0),)
    for share in (0.3, 0.6, 0.8, 0.8):
        watch.looked(state.snapshot(), fired, moved=False)
        assert watch.due(state.snapshot(), (trigger(1 + share - 1e-6),)) == ()
        assert watch.due(state.snapshot(), (trigger(1 + share + 1e-6),)) != ()
    state.drain_device(1)
    assert watch.due(state.snapshot(), fired) == fired
    watch.looked(state.snapshot(), fired, moved=False)
    assert watch.due(state.snapshot(), (trigger(1.31),)) != ()
    watch.looked(state.snapshot(), fired, moved=False)
    watch.looked(state.snapshot(), fired, moved=True)
    watch.looked(state.snapshot(), fired, moved=False)
    assert watch.due(state.snapshot(), (trigger(1.31),)) != ()


def test_a_plan_sums_its_bytes_and_says_how_far_it_is_from_the_bound() -> None:
    move = Move(
        request="a", groups=1, source=0, target=1, num_bytes=3.0, seconds=1.0, payback_steps=None,
        reason=MoveReason.BALANCE, wave=0, together=0,
    )  # fmt: skip
    plan = RedispatchPlan(
        moves=(move, replace(move, num_bytes=4.5)), refused=(), makespan_before_s=1.0, makespan_after_s=1.0,
        short_before=0.0, short_after=0.0, objective_s=0.75, stay_s=3.0, bound_s=0.5,
    )  # fmt: skip
    assert plan.num_bytes == 7.5
    assert plan.gap == 0.5
    assert replace(plan, bound_s=3.5).gap == 0.0
    assert replace(plan, bound_s=0.0).gap == INF
    assert replace(plan, bound_s=0.0, objective_s=0.0).gap == 0.0
