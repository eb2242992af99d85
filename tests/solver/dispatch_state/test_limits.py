"""A state accepts values up to the last block and token, and refuses one more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hetis.solver.dispatch.dispatch_problem import MOST_TOKENS, Primary
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.dispatch.state import DispatchState, Evicted
from hetis.solver.errors import InvalidProblemError
from tests.solver.dispatch_state.stages import stage


def one_request(total_blocks: tuple[int, ...] = (9, 5), **of_stage: Any) -> DispatchState:
    """a: 3 groups and 1 of 10 tokens, three blocks each."""
    state = DispatchState(stage(len(total_blocks), **of_stage), total_blocks)
    groups = np.zeros(len(total_blocks), np.int64)
    groups[:2] = 3, 1
    state.admit_one("a", context_tokens=10, remaining_tokens=2, groups=groups)
    return state


def test_a_device_is_filled_to_its_last_block() -> None:
    state = one_request()
    assert state.free_blocks().tolist() == [0, 2]
    with pytest.raises(InvalidProblemError, match=r"^request b needs 4 KV blocks on d1, 2 are free$"):
        state.admit_one("b", context_tokens=4, remaining_tokens=0, groups=np.array([0, 4]))
    with pytest.raises(InvalidProblemError, match=r"^request a needs 9 KV blocks on d0, 8 are free$"):
        one_request((8, 5))
    assert len(state) == 1


@pytest.mark.parametrize(
    ("context", "remaining", "is_refused"), [(1, 0, False), (0, 0, True), (1, -1, True), (1, MOST_TOKENS + 1, True)]
)
def test_requests_have_a_token_and_no_more_than_the_limit(context: int, remaining: int, is_refused: bool) -> None:
    state = DispatchState(stage(2), [2**34, 0])
    given: dict[str, Any] = {"remaining_tokens": remaining, "groups": np.array([4, 0])}
    if is_refused:
        with pytest.raises(InvalidProblemError, match="must be >= 1 and >= 0, and <= 2147483648"):
            state.admit_one("a", context_tokens=context, **given)
        with pytest.raises(InvalidProblemError, match=f"has {MOST_TOKENS + 1} context"):
            state.admit_one("a", context_tokens=MOST_TOKENS + 1, **given)
        return
    state.admit_one("a", context_tokens=MOST_TOKENS, **given | {"remaining_tokens": MOST_TOKENS})
    assert (state.context_tokens("a"), state.remaining_tokens("a")) == (MOST_TOKENS, MOST_TOKENS)
    state.admit_one("b", context_tokens=context, **given)
    state.check_invariants()


def test_what_is_expected_may_be_corrected_within_limits() -> None:
    state = one_request()
    for tokens in (0, MOST_TOKENS, 7):
        state.expect("a", tokens)
        assert state.remaining_tokens("a") == tokens
        state.check_invariants()
    assert state.load().free_blocks.tolist() == [9 - 3 * 5, 5 - 5]
    for tokens in (-1, MOST_TOKENS + 1):
        with pytest.raises(InvalidProblemError, match=rf"^request a: remaining_tokens is {tokens}, must be >= 0"):
            state.expect("a", tokens)
    with pytest.raises(InvalidProblemError, match="request z is not running"):
        state.expect("z", 1)


def test_growth_counts_as_expected_output_until_none_is_left() -> None:
    state = one_request((100, 100))
    assert state.grow(["a"], 1) == ()
    assert (state.context_tokens("a"), state.remaining_tokens("a")) == (11, 1)
    assert state.grow(["a"], 5) == ()
    assert (state.context_tokens("a"), state.remaining_tokens("a")) == (16, 0)
    state.check_invariants()
    assert state.free_blocks().tolist() == [100 - 12, 100 - 4]
    with pytest.raises(InvalidProblemError, match="growth by 0 tokens of 1 requests, 1 different"):
        state.grow(["a"], 0)


def test_earlier_requests_grow_into_the_last_blocks() -> None:
    """Each of three requests needs a block for each of its 4 groups; there are 8, then 0."""
    state = DispatchState(stage(2), [20, 0])
    for name in ("a", "b", "c"):
        state.admit_one(name, context_tokens=4, remaining_tokens=0, groups=np.array([4, 0]))
    assert state.grow(["b", "c", "a"]) == ("a",)
    assert [state.context_tokens(name) for name in ("a", "b", "c")] == [4, 5, 5]
    assert state.free_blocks().tolist() == [0, 0]
    assert state.grow(["a", "b", "c"], 3) == ("a",)
    assert [state.context_tokens(name) for name in ("a", "b", "c")] == [4, 8, 8]
    state.check_invariants()


def test_one_request_grows_as_far_as_every_device_has_blocks() -> None:
    state = one_request((9, 6, 9))  # 10 tokens in blocks of 4: 3 blocks for each of 3 groups, and for 1 group
    assert state.grow_one("a", context_tokens=12)
    assert state.free_blocks().tolist() == [0, 3, 9]
    assert not state.grow_one("a", context_tokens=13)
    assert state.grow_one("a", context_tokens=12)
    assert (state.context_tokens("a"), state.remaining_tokens("a")) == (12, 0)
    state.check_invariants()


def test_moves_take_the_last_block_and_have_numbers_of_their_own() -> None:
    state = one_request((9, 6, 9))
    assert state.prepare_move("a", groups=2, source=0, target=1) is None  # 6 blocks, 3 are free
    first = state.prepare_move("a", groups=1, source=0, target=1)
    second = state.prepare_move("a", groups=2, source=0, target=2)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    assert state.free_blocks().tolist() == [0, 0, 3]
    with pytest.raises(InvalidProblemError, match=r"^request a: 1 head groups of 0 on d0 cannot move to d2$"):
        state.prepare_move("a", groups=1, source=0, target=2)
    for groups, target in ((0, 2), (1, 1)):
        with pytest.raises(InvalidProblemError, match="cannot move"):
            state.prepare_move("a", groups=groups, source=1, target=target)
    again = DispatchState.of(state.snapshot())
    assert again.moves == state.moves
    assert again.free_blocks().tolist() == [0, 0, 3]
    third = again.prepare_move("a", groups=1, source=1, target=2)
    assert third is not None
    assert third.number == 2
    again.abort_move(0)
    again.check_invariants()
    again.commit_moves(1, 2)
    again.check_invariants()
    assert again.groups("a").tolist() == [1, 0, 3]
    assert (again.moves, again.free_blocks().tolist()) == ((), [6, 6, 0])


def test_moves_of_two_requests_are_committed_together() -> None:
    state = one_request((40, 40))
    state.admit_one("b", context_tokens=4, remaining_tokens=0, groups=np.array([0, 4]))
    ours = state.prepare_move("a", groups=3, source=0, target=1)
    theirs = state.prepare_move("b", groups=2, source=1, target=0)
    assert ours is not None
    assert theirs is not None
    state.commit_moves(ours.number, theirs.number)
    assert (state.groups("a").tolist(), state.groups("b").tolist()) == ([0, 4], [2, 2])
    state.check_invariants()


def test_what_is_lost_leaves_with_what_it_lost() -> None:
    """a has groups on both devices, b on the second alone, and c on the first, one of which is moving to the second."""
    state = one_request((40, 40))
    state.admit_one("b", context_tokens=4, remaining_tokens=1, groups=np.array([0, 4]))
    state.admit_one("c", context_tokens=4, remaining_tokens=1, groups=np.array([4, 0]))
    assert state.prepare_move("c", groups=1, source=0, target=1)
    assert state.prepare_move("b", groups=1, source=1, target=0)
    assert state.lose_device(1) == (
        Evicted(id="a", context_tokens=10, remaining_tokens=2),
        Evicted(id="b", context_tokens=4, remaining_tokens=1),
    )
    assert (state.ids, state.moves, state.free_blocks().tolist()) == (("c",), (), [36, 40])
    assert [device.status for device in state.devices] == [DeviceStatus.OK, DeviceStatus.LOST]
    assert [device.changed for device in state.devices] == [False, True]
    with pytest.raises(InvalidProblemError, match="d1 is lost and cannot be drained"):
        state.drain_device(1)
    state.restore_device(1)
    state.mark_seen()
    state.restore_device(1)
    assert not any(device.changed for device in state.devices)
    state.check_invariants()


def test_draining_aborts_what_arrives_and_not_what_leaves() -> None:
    state = one_request((40, 40, 40))
    arrives = state.prepare_move("a", groups=1, source=0, target=1)
    leaves = state.prepare_move("a", groups=1, source=1, target=2)
    assert arrives is not None
    state.drain_device(1)
    assert state.moves == (leaves,)
    with pytest.raises(InvalidProblemError, match="d1 is draining and takes no head groups"):
        state.admit_one("b", context_tokens=1, remaining_tokens=0, groups=np.array([0, 4, 0]))
    state.admit_one("b", context_tokens=1, remaining_tokens=0, groups=np.array([4, 0, 0]))
    state.check_invariants()


def test_a_finished_request_takes_only_its_own_moves_along() -> None:
    state = one_request((40, 40))
    state.admit_one("b", context_tokens=4, remaining_tokens=0, groups=np.array([4, 0]))
    assert state.prepare_move("a", groups=1, source=0, target=1)
    kept = state.prepare_move("b", groups=1, source=0, target=1)
    state.finish("a")
    assert state.moves == (kept,)
    assert state.free_blocks().tolist() == [36, 39]
    state.check_invariants()


def test_slots_are_reused_by_any_number_of_requests() -> None:
    state = DispatchState(stage(1), [10_000])
    for j in range(100):
        state.admit_one(f"r{j}", context_tokens=j + 1, remaining_tokens=j, groups=np.array([4]))
        if j % 3 == 2:
            state.finish(f"r{j - 1}")
        state.check_invariants()
    assert state.ids == tuple(f"r{j}" for j in range(100) if j % 3 != 1)
    assert [state.context_tokens(name) for name in state.ids] == [int(name[1:]) + 1 for name in state.ids]


def test_only_an_empty_device_changes_its_size() -> None:
    state = one_request((9, 5, 4))
    with pytest.raises(InvalidProblemError, match=r"^d1 holds 3 KV blocks and cannot be resized$"):
        state.resize_device(1, 10)
    state.resize_device(2, 7)
    assert state.free_blocks().tolist() == [0, 2, 7]
    assert state.snapshot().total_blocks().tolist() == [9, 5, 7]
    assert [device.changed for device in state.devices] == [False, False, True]


def test_a_stage_keeps_its_devices_when_costs_change() -> None:
    state = one_request(tp=1)
    with pytest.raises(InvalidProblemError, match=r"^the stage has 3 devices, must have 2$"):
        state.change_costs(stage(3, tp=1))
    with pytest.raises(InvalidProblemError, match="the new stage must have the same primary"):
        state.change_costs(stage(2))
    with pytest.raises(InvalidProblemError, match="the new stage must have the same primary"):
        state.change_costs(replace(stage(2), primary=Primary(device=1)))
    state.change_costs(stage(2, tp=1))
    assert not any(device.changed for device in state.devices)
    state.change_costs(stage(2, tp=1, speed=2.0))
    assert all(device.changed for device in state.devices)
    for name in ("transfer_byte_s", "transfer_s"):
        state.mark_seen()
        state.change_costs(replace(state.stage, **{name: getattr(state.stage, name) * np.array([1.0, 2.0])}))
        assert [device.changed for device in state.devices] == [False, True]


def test_a_state_has_a_number_of_blocks_for_every_device() -> None:
    for totals in ([1], [1, 2, 3]):
        with pytest.raises(InvalidProblemError, match=rf"^{len(totals)} totals of KV blocks, the stage has 2 devices$"):
            DispatchState(stage(2), totals)
    state = DispatchState(stage(2), [0, 3], high_water=0.5)
    assert state.free_blocks().tolist() == [0, 3]
    assert [device.high_water for device in state.devices] == [0.5, 0.5]
    assert [device.name for device in state.devices] == ["d0", "d1"]
    assert ("a" in state, len(state), state.ids) == (False, 0, ())
