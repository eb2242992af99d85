"""The real engine under the contract: what the planner may do to it, and that no text changes for that."""

from __future__ import annotations

import pytest

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.executor.refusals import RefusedError, reason_name
from hetis.solver.dispatch.snapshot import DeviceStatus as OwnStatus
from hetis.v1.change_pb2 import ChangeOutcome, ChangePhase
from hetis.v1.executor_service_pb2 import ApplyAssignmentRequest
from hetis.v1.head_map_pb2 import Move
from hetis.v1.replica_pb2 import AssignmentGoal, DeviceCondition
from hetis.v1.report_pb2 import AssignmentState, DeviceStatus
from tests.runtime.checkpoints import random_prompts
from tests.runtime.steering.world import NAMES, REPLICA, World, assignment_of, stage_of

FLIPPED, ABORTED = ChangeOutcome.CHANGE_OUTCOME_FLIPPED, ChangeOutcome.CHANGE_OUTCOME_ABORTED
PAGE_BYTES = 2 * 3 * 16 * 8 * 4  # of `random_model`: layers, page tokens, head size, float32


def started(**more: object) -> tuple[World, int]:
    """One request that decodes, all its heads on the primary."""
    world = World(**more)  # type: ignore[arg-type]
    world.assign()
    number = world.add()
    world.step(2)
    assert world.heads(number) == (0, 0, 0, 0)
    return world, number


def refused(world: World, *moves: Move) -> str:
    with pytest.raises(RefusedError) as error:
        world.reserve(world.change(*moves))
    return reason_name(error.value.failure)


def test_a_change_of_the_planner_moves_heads_at_one_boundary_and_the_text_stays() -> None:
    world, number = started()
    change = world.prepared(world.move(number, 0, NAMES[1]), world.move(number, 3, NAMES[2], index=1))
    assert world.heads(number) == (0, 0, 0, 0)  # until it is permitted, the source owns and serves
    assert [entry.change_id for entry in world.head_map().moves] == [change.change_id] * 2
    answer = world.flip(change)
    assert (answer.outcome, answer.generation, answer.step) == (FLIPPED, change.generation, world.engine.num_steps + 1)
    assert world.heads(number) == (1, 0, 0, 2)
    assert world.flip(change) == answer, "asked again it answers as the first time"
    world.release(change)
    (status,) = world.steered.report(world.now_s).changes
    assert status.phase == ChangePhase.CHANGE_PHASE_RELEASED
    (request,) = world.head_map().requests
    assert [world.head_map().devices[owner].name for owner in request.owners] == [NAMES[1], *[NAMES[0]] * 2, NAMES[2]]
    world.finish()


def test_copies_go_in_the_background_and_a_flip_before_they_are_there_is_refused() -> None:
    world = World(bytes_per_step=PAGE_BYTES)
    world.assign()
    number = world.add(random_prompts(5, 1, shortest=120, longest=120)[0])
    world.step(2)
    change = world.change(world.move(number, 0, NAMES[1]), world.move(number, 1, NAMES[1], index=1))
    world.reserve(change)
    with pytest.raises(RefusedError, match="its copies are not there yet"):
        world.ask_flip(change)
    world.copy(change)
    seen = []
    while world.steered.permission == "preparing":
        (status,) = world.steered.report(world.now_s).changes
        seen.append(status.copied_bytes)
        world.step()
    assert world.steered.permission == "ready"
    assert len(set(seen)) > 3
    assert world.flip(change).outcome == FLIPPED
    assert world.heads(number) == (1, 1, 0, 0)
    world.finish()


def test_a_copy_whose_request_ends_is_over_though_no_step_is_made_any_more() -> None:
    world = World(bytes_per_step=PAGE_BYTES)
    world.assign()
    number = world.add(random_prompts(5, 1, shortest=120, longest=120)[0])
    world.step(2)
    change = world.change(world.move(number, 0, NAMES[1]))
    world.reserve(change)
    world.copy(change)
    world.engine.cancel(number)
    assert not world.engine.running
    world.engine.tend()
    assert world.steered.permission == "ready"
    answer = world.flip(change)
    assert (answer.outcome, reason_name(answer.failure)) == (ABORTED, "REQUEST_GONE")
    world.finish()


def test_a_permission_that_has_expired_moves_nothing() -> None:
    world, number = started()
    change = world.prepared(world.move(number, 0, NAMES[1]))
    answer = world.flip(change, timeout_s=0)
    assert answer.outcome == ABORTED
    assert reason_name(answer.failure) == "PREPARE_EXPIRED"
    assert world.heads(number) == (0, 0, 0, 0)
    world.finish()


def test_a_change_whose_agent_has_gone_is_given_up_at_its_deadline() -> None:
    world, number = started()
    change = world.prepared(world.move(number, 0, NAMES[1]), timeout_s=10)
    world.now_s += 10
    world.step()
    (status,) = world.steered.report(world.now_s).changes
    assert (status.phase, status.change_id) == (ChangePhase.CHANGE_PHASE_ABORTED, change.change_id)
    assert world.engine.placement.moves == ()
    assert world.abort(change.change_id).outcome == ABORTED
    with pytest.raises(RefusedError, match="was not flipped"):
        world.release(change)
    world.finish()


def test_changes_that_are_not_known_are_refused_and_one_that_was_given_up_does_not_come_late() -> None:
    world, number = started()
    change = world.change(world.move(number, 0, NAMES[1]))
    with pytest.raises(RefusedError) as unknown:
        world.ask_flip(change)
    assert reason_name(unknown.value.failure) == "CHANGE_UNKNOWN"
    assert world.abort(change.change_id).outcome == ABORTED
    with pytest.raises(RefusedError) as late:
        world.reserve(change)
    assert reason_name(late.value.failure) == "CHANGE_PHASE"
    world.finish()


def test_an_old_planner_can_change_nothing_any_more() -> None:
    world, number = started()
    world.epoch = 7
    change = world.prepared(world.move(number, 0, NAMES[1]))
    for act in (lambda: world.ask_flip(change, epoch=6), lambda: world.reserve(change, epoch=6)):
        with pytest.raises(RefusedError, match="epoch 6 is over: 7 was obeyed already"):
            act()
    assert world.flip(change).outcome == FLIPPED
    world.finish()


def test_what_does_not_fit_the_head_map_is_refused_by_its_reason() -> None:
    world, number = started(pages=(200, 200, 3))
    good = world.move(number, 0, NAMES[1])
    for changes, reason in (
        ({"request": "99"}, "REQUEST_GONE"),
        ({"request": "first"}, "REQUEST_GONE"),
        ({"incarnation": 1}, "REQUEST_GONE"),
        ({"source": NAMES[1], "target": NAMES[0]}, "NOT_OWNER"),
        ({"head_groups": [4]}, "NOT_OWNER"),
        ({"head_groups": []}, "NOT_OWNER"),
        ({"target": "elsewhere"}, "DEVICE_UNAVAILABLE"),
        ({"target": NAMES[0]}, "DEVICE_UNAVAILABLE"),
        ({"target": NAMES[2]}, "KV_BLOCKS_EXHAUSTED"),
    ):
        bad = Move()
        bad.CopyFrom(good)
        bad.ClearField("head_groups") if "head_groups" in changes else None
        bad.MergeFrom(Move(**changes))  # type: ignore[arg-type]
        assert refused(world, bad) == reason, changes
    assert refused(world) == "INVALID_FIELD"
    change = world.change(good)
    change.base_generation = 5
    change.generation = 6
    with pytest.raises(RefusedError, match="the change builds on generation 5, the state here is of generation 1"):
        world.reserve(change)
    assert world.engine.placement.moves == ()
    world.reserve(world.change(good))
    assert refused(world, world.move(number, 1, NAMES[1])) == "CHANGE_IN_FLIGHT"
    world.finish()


def test_moves_that_belong_together_are_left_out_together() -> None:
    world, number = started(pages=(200, 200, 3))
    change = world.change(
        world.move(number, 0, NAMES[1], index=0, together=7),
        world.move(number, 1, NAMES[2], index=1, together=7),  # there is no room for it
        world.move(number, 2, NAMES[1], index=2, together=8),
    )
    answer = world.reserve(change)
    assert [result.number for result in answer.moves] == [0, 1]
    world.copy(change)
    world.step(2)
    assert [result.number for result in world.flip(change).moves] == [0, 1]
    assert world.heads(number) == (0, 0, 1, 0)
    world.finish()


@pytest.mark.parametrize("how", ["cancel", "preempt", "lose", "differ"])
def test_a_change_whose_ground_is_gone_ends_with_the_reason(how: str) -> None:
    world, number = started()
    change = world.prepared(world.move(number, 0, NAMES[1]))
    target = world.engine.stage.devices[1]
    assert isinstance(target, LocalDevice)
    if how == "cancel":
        world.engine.cancel(number)
    elif how == "preempt":
        world.engine.preempt(number)
    elif how == "lose":
        world.engine.lose_device(1)
    else:
        k, v = target.export(number, 0, [0], 7, 8)
        target.adopt(number, 0, [0], 7, k + 1e-3, v)
    answer = world.flip(change)
    assert answer.outcome == ABORTED
    reasons = {
        "cancel": "REQUEST_GONE",
        "preempt": "REQUEST_GONE",
        "lose": "DEVICE_UNAVAILABLE",
        "differ": "COPY_FAILED",
    }
    assert reason_name(answer.failure) == reasons[how]
    assert not any(world.heads(number)) if how in ("lose", "differ") else True
    world.finish()


def test_an_engine_runs_what_it_was_started_for_and_says_all_that_differs() -> None:
    world = World()
    other = assignment_of(world.engine)
    del other.stages[:]
    other.stages.append(stage_of(world.engine, head_groups=8, block_tokens=32))
    other.stages[0].devices[2].name = "elsewhere"
    with pytest.raises(RefusedError) as error:
        world.assign(other)
    assert reason_name(error.value.failure) == "ENGINE_CANNOT"
    assert error.value.failure.message == (
        "the plan counts on 8 head groups, this engine has 4; "
        "the plan counts on 32 tokens per KV block (--page-tokens), this engine has 16; "
        "the plan's devices are local0, local1, elsewhere, this engine's local0, local1, local2"
    )
    del other.stages[:]
    with pytest.raises(RefusedError, match="the assignment has 0 stages with their copies, this engine 1"):
        world.assign(other)
    assert not world.steered.report(0).replicas


def test_the_goal_says_whether_clients_are_served() -> None:
    world = World()
    said: list[str] = []
    world.steered.front.close = said.append
    goals = AssignmentGoal
    states = [
        world.assign(assignment_of(world.engine, goal=goal))
        for goal in (
            goals.ASSIGNMENT_GOAL_LOAD,
            goals.ASSIGNMENT_GOAL_SERVE,
            goals.ASSIGNMENT_GOAL_DRAIN,
        )
    ]
    assert states == [
        AssignmentState.ASSIGNMENT_STATE_LOADED,
        AssignmentState.ASSIGNMENT_STATE_SERVING,
        AssignmentState.ASSIGNMENT_STATE_STOPPED,
    ]
    removed = ApplyAssignmentRequest(epoch=1, generation=9, removed_replica=REPLICA)
    world.steered.apply_assignment(removed, world.now_s)
    assert [bool(why) for why in said] == [True, False, True, True]
    with pytest.raises(RefusedError):
        world.head_map()


def test_a_device_that_drains_takes_no_heads_until_it_may_again() -> None:
    world, number = started()
    change = world.prepared(world.move(number, 0, NAMES[1]))
    drains = DeviceCondition(device=NAMES[1], status=DeviceStatus.DEVICE_STATUS_LOST)  # as the planner sees it
    world.assign(assignment_of(world.engine, conditions=[drains]))
    assert world.engine.placement.moves == ()
    assert world.abort(change.change_id).outcome == ABORTED
    assert world.engine.placement.state.devices[1].status is OwnStatus.DRAINING  # we reach it: its KV is not gone
    assert [device.status for device in world.head_map().devices][1] == DeviceStatus.DEVICE_STATUS_DRAINING
    assert refused(world, world.move(number, 0, NAMES[1])) == "DEVICE_UNAVAILABLE"
    world.assign()
    assert world.flip(world.prepared(world.move(number, 0, NAMES[1]))).outcome == FLIPPED
    world.finish()


def test_an_engine_that_moves_heads_by_itself_refuses_the_planners_changes() -> None:
    world, number = started()
    world.steered.takes_moves = False
    assert refused(world, world.move(number, 0, NAMES[1])) == "ENGINE_CANNOT"
    world.finish()
