"""Futile searches become rare while little changes, and changes are noticed at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.triggers import TriggerKind, Watch, triggers
from tests.solver.dispatch_state.stages import stage

ALIVE = 20


def lopsided(num_requests: int = ALIVE) -> DispatchState:
    """All groups are on the first of three devices, for which the deviation trigger fires all the time."""
    state = DispatchState(stage(3), [10**6] * 3)
    for j in range(num_requests):
        state.admit_one(f"r{j}", context_tokens=400, remaining_tokens=100, groups=np.array([4, 0, 0]))
    return state


@given(st.integers(0, 2**32))
def test_looks_in_vain_become_rare_under_steady_load(seed: int) -> None:
    rng, state, watch, looks = np.random.default_rng(seed), lopsided(), Watch(), list[int]()
    steps, dispatcher = 6 * ALIVE, Dispatcher(state.stage)
    for step in range(steps):  # one request comes and one goes, so that ALIVE steps replace all of them
        state.finish(f"r{step}")
        tokens = int(rng.integers(200, 600))
        state.admit_one(f"r{step + ALIVE}", context_tokens=tokens, remaining_tokens=100, groups=np.array([4, 0, 0]))
        snapshot = state.snapshot()
        fired = triggers(snapshot, dispatcher)
        assert TriggerKind.DEVIATION in [trigger.kind for trigger in fired]
        if watch.due(snapshot, fired):
            looks.append(step)
            watch.looked(snapshot, fired, moved=False)
    assert looks[0] == 0
    assert len(looks) <= 12
    assert min(np.diff(looks)[3:]) >= ALIVE // 2


def test_news_are_due_at_once() -> None:
    state, watch = lopsided(), Watch()
    dispatcher = Dispatcher(state.stage)

    def due() -> list[TriggerKind]:
        snapshot = state.snapshot()
        return [trigger.kind for trigger in watch.due(snapshot, triggers(snapshot, dispatcher))]

    assert due() == [TriggerKind.DEVIATION]
    watch.looked(state.snapshot(), triggers(state.snapshot(), dispatcher), moved=False)
    assert due() == []
    state.admit_one("one", context_tokens=400, remaining_tokens=1, groups=np.array([4, 0, 0]))
    assert due() == []
    state.drain_device(0)
    assert TriggerKind.DRAINING in due()
    state.restore_device(0)
    state.mark_seen()
    for j in range(10):
        state.finish(f"r{j}")
    assert due() == [TriggerKind.DEVIATION]


def test_a_look_that_moves_something_is_forgotten() -> None:
    state, watch = lopsided(), Watch()
    snapshot = state.snapshot()
    fired = triggers(snapshot, Dispatcher(state.stage))
    watch.looked(snapshot, fired, moved=False)
    assert watch.due(snapshot, fired) == ()
    watch.looked(snapshot, fired, moved=True)
    assert watch.due(snapshot, fired) == fired
    with pytest.raises(InvalidProblemError, match="change is 0"):
        Watch(change=0)
