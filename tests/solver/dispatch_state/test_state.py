"""`DispatchState`: sums worked out by hand, plans of the dispatcher, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetis.solver.dispatch.dispatch_problem import Requests
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from tests.solver.dispatch_state.stages import stage


def two_requests() -> DispatchState:
    """a: 4 groups of 10 tokens (3 blocks, 5 with growth); b: 4 groups of 4 tokens (1 block, 1 with growth)."""
    state = DispatchState(stage(3), [40, 40, 6])
    state.admit_one("a", context_tokens=10, remaining_tokens=7, groups=np.array([3, 1, 0]))
    state.admit_one("b", context_tokens=4, remaining_tokens=0, groups=np.array([0, 2, 2]))
    return state


def test_load_counts_heads_bytes_and_blocks_with_growth() -> None:
    load = two_requests().load()
    assert load.heads.tolist() == [6, 6, 4]  # 2 query heads per group
    assert load.kv_bytes.tolist() == [120.0, 72.0, 32.0]  # 4 bytes per token
    assert load.free_blocks.tolist() == [40 - 15, 40 - 5 - 2, 6 - 2]


def test_groups_under_way_hold_blocks_at_both_ends_and_run_at_the_source() -> None:
    state = two_requests()
    move = state.prepare_move("a", groups=2, source=0, target=2)
    assert move is None  # two groups of three blocks do not fit beside those of b
    move = state.prepare_move("a", groups=1, source=0, target=2)
    assert move is not None
    assert state.free_blocks().tolist() == [40 - 9, 40 - 3 - 2, 6 - 2 - 3]
    assert state.load().heads.tolist() == [6, 6, 4]
    state.check_invariants()
    state.commit_moves(move.number)
    assert state.free_blocks().tolist() == [40 - 6, 40 - 3 - 2, 6 - 2 - 3]
    assert state.load().heads.tolist() == [4, 6, 6]


def test_growth_takes_blocks_at_both_ends_of_a_move() -> None:
    state = two_requests()
    assert state.prepare_move("a", groups=1, source=0, target=2)
    assert state.grow(["a"], 2) == ()
    assert state.free_blocks().tolist() == [31, 35, 1]
    assert state.grow(["a"]) == ()  # the thirteenth token starts a block
    assert state.free_blocks().tolist() == [28, 34, 0]
    assert state.grow(["b"]) == ("b",)
    assert state.context_tokens("b") == 4


def test_what_a_dispatcher_placed_is_admitted_and_the_rest_waits() -> None:
    state = DispatchState(stage(2), [10, 10])
    requests = Requests(ids=("a", "b"), context_tokens=np.array([8, 60]), growth_tokens=np.array([4, 0]))
    plan = Dispatcher(state.stage).dispatch(state.load(), requests)
    assert state.admit(requests, plan) == ("a",)
    assert "b" not in state
    assert state.load().free_blocks.sum() == 20 - 4 * 3
    state.check_invariants()


def test_devices_that_take_nothing_have_no_free_blocks_for_new_requests() -> None:
    state = two_requests()
    state.drain_device(1)
    assert state.load().free_blocks.tolist() == [25, 0, 4]
    assert [request.id for request in state.lose_device(2)] == ["b"]
    assert state.load().free_blocks.tolist() == [25, 0, 0]
    assert state.ids == ("a",)


def test_changed_costs_mark_the_device() -> None:
    state = two_requests()
    slower = replace(state.stage, kv_byte_s=state.stage.kv_byte_s * np.array([[1.0], [2.0], [1.0]]))
    state.change_costs(slower)
    assert [device.changed for device in state.devices] == [False, True, False]
    with pytest.raises(InvalidProblemError, match="must have the devices and heads of the old one"):
        state.change_costs(replace(slower, devices=("x", "y", "z")))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([3, 0, 0], r"request c has \[3, 0, 0\] head groups on the devices, must be 4 in all"),
        ([5, -1, 0], r"request c has \[5, -1, 0\] head groups"),
        ([0, 0, 4], "request c needs 8 KV blocks on d2, 4 are free"),
    ],
)
def test_admission_refuses_what_cannot_be(groups: list[int], message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        two_requests().admit_one("c", context_tokens=8, remaining_tokens=0, groups=np.array(groups))


def test_the_primary_takes_groups_evenly() -> None:
    state = DispatchState(stage(2, tp=2), [40, 40])
    with pytest.raises(InvalidProblemError, match="request a: 3 head groups on d0, which takes 2 at a time"):
        state.admit_one("a", context_tokens=1, remaining_tokens=0, groups=np.array([3, 1]))
    state.admit_one("a", context_tokens=1, remaining_tokens=0, groups=np.array([2, 2]))
    one = state.prepare_move("a", groups=1, source=0, target=1)
    other = state.prepare_move("a", groups=1, source=0, target=1)
    assert one is not None
    assert other is not None
    with pytest.raises(InvalidProblemError, match="1 head groups on d0"):
        state.commit_moves(one.number)
    with pytest.raises(InvalidProblemError, match="a move is committed twice"):
        state.commit_moves(one.number, one.number)
    state.commit_moves(one.number, other.number)
    assert state.groups("a").tolist() == [0, 4]
    state.check_invariants()


def test_mistakes_of_the_caller_are_named() -> None:
    state = two_requests()
    with pytest.raises(InvalidProblemError, match="request a is running already"):
        state.admit_one("a", context_tokens=1, remaining_tokens=0, groups=np.array([4, 0, 0]))
    with pytest.raises(InvalidProblemError, match="request z is not running"):
        state.finish("z")
    with pytest.raises(InvalidProblemError, match="2 head groups of 1 on d1 cannot move to d0"):
        state.prepare_move("a", groups=2, source=1, target=0)
    with pytest.raises(InvalidProblemError, match="no move 7 is under way"):
        state.commit_moves(7)
    with pytest.raises(InvalidProblemError, match="growth by 1 tokens of 2 requests, 1 different"):
        state.grow(["a", "a"])
    state.drain_device(2)
    with pytest.raises(InvalidProblemError, match="d2 is draining and takes no head groups"):
        state.prepare_move("a", groups=1, source=0, target=2)


def test_later_changes_leave_a_snapshot_as_it_is() -> None:
    state = two_requests()
    snapshot = state.snapshot()
    state.grow(["a"], 5)
    state.finish("b")
    assert snapshot.context_tokens.tolist() == [10, 4]
    assert snapshot.groups.tolist() == [[3, 1, 0], [0, 2, 2]]
