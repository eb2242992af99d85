"""A planner's control of vLLM through its agent, and the reports, without vLLM and with fake ranks."""

from __future__ import annotations

import pytest

from hetis.runtime.moves.refusals import RefusedError, reason_name
from hetis.runtime.vllm.calibration import Calibration, Coefficients
from hetis.runtime.vllm.steps import MoveStep
from hetis.v1.change_pb2 import ChangeOutcome, ChangePhase
from hetis.v1.executor_service_pb2 import ApplyAssignmentRequest
from hetis.v1.head_map_pb2 import Move
from hetis.v1.replica_pb2 import AssignmentGoal, DeviceCondition
from hetis.v1.report_pb2 import AssignmentState, DeviceStatus
from tests.runtime.vllm.scheduling import NAMES, REPLICA, World

FLIPPED, ABORTED = ChangeOutcome.CHANGE_OUTCOME_FLIPPED, ChangeOutcome.CHANGE_OUTCOME_ABORTED
LOST, DRAINING = DeviceStatus.DEVICE_STATUS_LOST, DeviceStatus.DEVICE_STATUS_DRAINING


def started(**more: object) -> tuple[World, str]:
    """One request that decodes, all its groups here."""
    world = World(**more)  # type: ignore[arg-type]
    world.assign()
    number = world.add("a")
    assert world.devices("a") == (0, 0, 0, 0)
    return world, number


def refused(world: World, *moves: Move) -> str:
    with pytest.raises(RefusedError) as error:
        world.reserve(world.change(*moves))
    return reason_name(error.value.failure)


def test_a_change_of_the_planner_moves_groups_at_one_boundary() -> None:
    world, number = started()
    change = world.prepared(world.move(number, [0], NAMES[1]), world.move(number, [3], NAMES[2], index=1))
    world.step(3)
    assert world.devices("a") == (0, 0, 0, 0), "until it is permitted, the source owns and serves"
    assert [entry.change_id for entry in world.head_map().moves] == [change.change_id] * 2
    answer = world.flip(change)
    assert (answer.outcome, answer.generation) == (FLIPPED, change.generation)
    assert world.devices("a") == (1, 0, 0, 2)
    commits = [
        plan.number
        for plan in world.plans
        for event in plan.events
        if isinstance(event, MoveStep) and event.phase == "commit"
    ]
    assert len(commits) == 2
    assert len(set(commits)) == 1, "the ranks hear of both with one step"
    assert world.flip(change) == answer, "asked again it answers as the first time"
    world.release(change)
    (status,) = world.steered.report(world.now_s).changes
    assert status.phase == ChangePhase.CHANGE_PHASE_RELEASED
    (request,) = world.head_map().requests
    assert [world.head_map().devices[owner].name for owner in request.owners] == [NAMES[1], *[NAMES[0]] * 2, NAMES[2]]
    world.finish("a")
    assert world.blocks.free == 400


def test_groups_go_from_worker_to_worker_and_home() -> None:
    world, number = started()
    assert world.flip(world.prepared(world.move(number, [1, 2], NAMES[1]))).outcome == FLIPPED
    assert world.flip(world.prepared(world.move(number, [2], NAMES[2], source=NAMES[1]))).outcome == FLIPPED
    assert world.devices("a") == (0, 1, 2, 0)
    world.step(40)
    assert world.flip(world.prepared(world.move(number, [1], NAMES[0], source=NAMES[1]))).outcome == FLIPPED
    assert world.devices("a") == (0, 0, 2, 0)
    assert world.side.moves["planner", "committed"] == 3


def test_a_change_that_is_given_up_gives_back_the_blocks_that_it_had_taken() -> None:
    world, number = started()
    world.flip(world.prepared(world.move(number, [1, 2], NAMES[1])))
    home = world.prepared(world.move(number, [1, 2], NAMES[0], source=NAMES[1]))
    assert sum(world.blocks.tables["a"]) == 4 * world.blocks.needed["a"]
    assert world.abort(home.change_id).outcome == ABORTED
    assert sum(world.blocks.tables["a"]) == 2 * world.blocks.needed["a"]
    away = world.prepared(world.move(number, [1, 2], NAMES[2], source=NAMES[1]))
    assert world.head_map().devices[2].total_blocks - world.side.allocator.room(2) == 2 * world.blocks.needed["a"]
    world.abort(away.change_id)
    assert world.side.allocator.room(2) == 400


def test_a_flip_before_the_copies_are_there_is_refused() -> None:
    world, number = started(copy_steps=4)
    change = world.change(world.move(number, [0], NAMES[1]))
    assert world.reserve(change).copy_bytes > 0
    world.copy(change)
    for _ in range(3):
        with pytest.raises(RefusedError, match="its copies are not complete yet"):
            world.request_flip(change)
        world.step()
    world.step(2)
    assert world.flip(change).outcome == FLIPPED


def test_a_permission_that_has_expired_moves_nothing() -> None:
    world, number = started()
    answer = world.flip(world.prepared(world.move(number, [0], NAMES[1])), timeout_s=0)
    assert (answer.outcome, reason_name(answer.failure)) == (ABORTED, "PREPARE_EXPIRED")
    assert world.devices("a") == (0, 0, 0, 0)


def test_a_change_whose_agent_has_gone_is_given_up_at_its_deadline() -> None:
    world, number = started()
    change = world.prepared(world.move(number, [0], NAMES[1]), timeout_s=10)
    world.now_s += 10
    world.step()
    (status,) = world.steered.report(world.now_s).changes
    assert (status.phase, status.change_id) == (ChangePhase.CHANGE_PHASE_ABORTED, change.change_id)
    assert world.side.allocator.moves == ()
    assert world.abort(change.change_id).outcome == ABORTED
    with pytest.raises(RefusedError, match="was not flipped"):
        world.release(change)


def test_a_change_that_was_given_up_does_not_come_late() -> None:
    world, number = started()
    change = world.change(world.move(number, [0], NAMES[1]))
    assert world.abort(change.change_id).outcome == ABORTED
    with pytest.raises(RefusedError) as late:
        world.reserve(change)
    assert reason_name(late.value.failure) == "CHANGE_PHASE"


def test_an_old_planner_can_change_nothing_any_more() -> None:
    world, number = started()
    world.epoch = 7
    change = world.prepared(world.move(number, [0], NAMES[1]))
    for act in (lambda: world.request_flip(change, epoch=6), lambda: world.reserve(change, epoch=6)):
        with pytest.raises(RefusedError, match="epoch 6 is over: 7 was already accepted"):
            act()
    assert world.flip(change).outcome == FLIPPED


def test_what_does_not_fit_the_head_map_is_refused_by_its_reason() -> None:
    world, number = started(blocks=(400, 3))
    good = world.move(number, [0], NAMES[1])
    for changes, reason in (
        ({"request": "99"}, "REQUEST_GONE"),
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
        bad.MergeFrom(Move(**changes))
        assert refused(world, bad) == reason, changes
    assert refused(world) == "INVALID_FIELD"
    change = world.change(good)
    change.base_generation, change.generation = 5, 6
    with pytest.raises(RefusedError, match="the change builds on generation 5, the state here is of generation 1"):
        world.reserve(change)
    assert world.side.allocator.moves == ()
    world.reserve(world.change(good))
    assert refused(world, world.move(number, [1], NAMES[1])) == "CHANGE_IN_FLIGHT"


def test_moves_that_belong_together_are_left_out_together() -> None:
    world, number = started(blocks=(400, 3))
    change = world.change(
        world.move(number, [0], NAMES[1], index=0, together=7),
        world.move(number, [1], NAMES[2], index=1, together=7),  # worker 2 has no room for it
        world.move(number, [2], NAMES[1], index=2, together=8),
    )
    assert [result.number for result in world.reserve(change).moves] == [0, 1]
    world.copy(change)
    world.step(2)
    assert [result.number for result in world.flip(change).moves] == [0, 1]
    assert world.devices("a") == (0, 0, 1, 0)


@pytest.mark.parametrize("how", ["finish", "preempt", "lose"])
def test_a_change_whose_ground_is_gone_ends_with_the_reason(how: str) -> None:
    world, number = started()
    change = world.prepared(world.move(number, [0], NAMES[1]))
    if how == "finish":
        world.finish("a")
    elif how == "preempt":
        world.preempt("a")
    else:
        world.lose_worker(1)
        world.step()
    answer = world.flip(change)
    assert answer.outcome == ABORTED
    reasons = {"finish": "REQUEST_GONE", "preempt": "REQUEST_GONE", "lose": "DEVICE_UNAVAILABLE"}
    assert reason_name(answer.failure) == reasons[how]


def test_an_engine_runs_what_it_was_started_for_and_says_all_that_differs() -> None:
    world = World()
    stage = world.stage(head_groups=8, block_tokens=32)
    stage.devices[2].name = stage.devices[2].gpus[0] = "elsewhere"
    with pytest.raises(RefusedError) as error:
        world.assign(world.assignment(stage=stage))
    assert reason_name(error.value.failure) == "ENGINE_CANNOT"
    assert error.value.failure.message == (
        "the plan counts on 8 head groups, this engine has 4; "
        "the plan counts on 32 tokens per KV block, this engine's --block-size 16 is no multiple of that; "
        "the plan has attention workers elsewhere, this engine's are n/1, n/2"
    )
    assert not world.steered.report(0).replicas


def test_blocks_are_told_as_the_plan_counts_them() -> None:
    world = World()
    stage = world.stage(block_tokens=8)
    stage.devices[1].total_blocks = 500
    world.assign(world.assignment(stage=stage))
    world.add("a", 60)
    here, bounded, free = world.head_map().devices
    assert (here.total_blocks, bounded.total_blocks, free.total_blocks) == (2 * 399, 500, 400)
    (load,) = world.steered.report(0).replicas[0].stages
    assert load.devices[0].used_blocks == 4 * 8, "60 tokens take four blocks of 16, or eight of 8"


def test_the_goal_says_how_far_the_replica_is() -> None:
    world = World()
    goals, states = AssignmentGoal, AssignmentState
    for goal, state in (
        (goals.ASSIGNMENT_GOAL_LOAD, states.ASSIGNMENT_STATE_LOADED),
        (goals.ASSIGNMENT_GOAL_SERVE, states.ASSIGNMENT_STATE_SERVING),
        (goals.ASSIGNMENT_GOAL_DRAIN, states.ASSIGNMENT_STATE_STOPPED),
    ):
        assert world.assign(world.assignment(goal=goal)) == state
    world.add("a")
    (replica,) = world.steered.report(world.now_s).replicas
    assert replica.assignment_state == states.ASSIGNMENT_STATE_DRAINING
    world.steered.apply_assignment(ApplyAssignmentRequest(epoch=1, generation=9, removed_replica=REPLICA), 1.0)
    with pytest.raises(RefusedError):
        world.head_map()


def test_a_device_that_drains_takes_no_groups_until_it_may_again() -> None:
    world, number = started()
    change = world.prepared(world.move(number, [0], NAMES[1]))
    said = DeviceCondition(device=NAMES[1], status=LOST)  # only the planner lost contact: its KV is not gone
    world.assign(world.assignment(conditions=[said]))
    assert world.side.allocator.moves == ()
    assert world.abort(change.change_id).outcome == ABORTED
    assert [device.status for device in world.head_map().devices][1] == DRAINING
    assert refused(world, world.move(number, [0], NAMES[1])) == "DEVICE_UNAVAILABLE"
    world.assign()
    assert world.flip(world.prepared(world.move(number, [0], NAMES[1]))).outcome == FLIPPED


def test_the_plan_bounds_where_dispatch_puts_groups() -> None:
    world = World(policy="remote")
    stage = world.stage()
    stage.devices[1].total_blocks = 12
    del stage.devices[2]  # the plan does not use it
    world.assign(world.assignment(stage=stage))
    world.add("a", 60)
    counts = [world.devices("a").count(device) for device in range(3)]
    assert counts == [4, 0, 0], "260 tokens of growth and prompt take 17 blocks each: more than 12"
    stage.devices[1].total_blocks = 40
    world.assign(world.assignment(stage=stage))
    world.add("b", 60)
    counts = [world.devices("b").count(device) for device in range(3)]
    assert counts == [2, 2, 0], "two of them fit into 40 blocks"
    load = {device.device: device for device in world.steered.report(0).replicas[0].stages[0].devices}
    assert load[NAMES[1]].total_blocks == 40


def test_reports_say_what_the_planner_decides_by() -> None:
    world, number = started()
    world.flip(world.prepared(world.move(number, [0, 1], NAMES[2])))
    world.add("b", 100)
    world.step(3)
    (replica,) = world.steered.report(world.now_s).replicas
    assert (replica.num_running, replica.num_waiting, replica.num_preempted) == (2, 0, 0)
    (stage,) = replica.stages
    here, idle, busy = stage.devices
    tokens = [request.context_tokens for request in world.head_map().requests]
    assert (here.heads, idle.heads, busy.heads) == (2 * (2 + 4), 0, 2 * 2)
    assert busy.kv_bytes == 2 * tokens[0] * 64
    assert here.kv_bytes == (2 * tokens[0] + 4 * tokens[1]) * 64
    assert (busy.total_blocks, busy.used_blocks) == (400, 2 * -(-tokens[0] // 16))
    assert here.total_blocks == 400 - 2, "each request has one block that holds no KV"
    assert idle.predicted_s == 0 < busy.predicted_s
    (reports,) = [world.steered.report(0).devices]
    assert [device.index for device in reports] == [1, 2, 9]
    world.preempt("b")
    world.finish("a")
    (replica,) = world.steered.report(world.now_s).replicas
    assert (replica.num_running, replica.num_waiting, replica.num_preempted, replica.num_finished) == (0, 1, 1, 1)


def test_groups_of_all_ranks_move_together() -> None:
    world, number = started(ranks=2)
    (request,) = world.head_map().requests
    assert len(request.owners) == 8
    assert refused(world, world.move(number, [1], NAMES[1])) == "INVALID_FIELD"
    assert world.flip(world.prepared(world.move(number, [1, 5], NAMES[1]))).outcome == FLIPPED
    assert list(world.head_map().requests[0].owners) == [0, 1, 0, 0, 0, 1, 0, 0]
    assert world.head_map().devices[1].total_blocks == 800


def test_groups_move_in_all_stages_of_a_pipeline_by_the_names_of_its_first_stage() -> None:
    world, number = started(stage_layers=(2, 1))
    assert [worker.name for worker in world.side.settings.workers] == ["n/1+m1/0", "n/2+m1/1"]
    assert world.flip(world.prepared(world.move(number, [1, 3], NAMES[2]))).outcome == FLIPPED
    assert world.devices("a") == (0, 2, 0, 2)
    (load,) = world.steered.report(world.now_s).replicas[0].stages
    assert [device.device for device in load.devices] == list(NAMES)
    world.assign(world.assignment(conditions=[DeviceCondition(device="m1/1", status=DRAINING)]))
    assert world.head_map().devices[2].status == DRAINING, "as one of its GPUs, in whatever stage"


def test_stages_with_maps_of_their_own_are_refused() -> None:
    world = World()
    assignment = world.assignment()
    assignment.stages.append(world.stage())
    with pytest.raises(RefusedError, match="has 2 stages with head maps of their own, those of vLLM share one"):
        world.assign(assignment)


def test_the_times_of_stages_count_by_their_layers() -> None:
    world = World(stage_layers=(2, 1), blocks=(400,))

    def measured(seconds: float) -> dict[int, Calibration]:
        own = Coefficients(pieces=((seconds, 0.0, 0.0),), transfer_s=seconds)
        return {1: Calibration(coefficients=own, copy_byte_s=seconds, read_s=0.0)}

    world.side.workers_connected({(0, 0): (400,), (1, 0): (400,)}, {(0, 0): measured(3e-6), (1, 0): measured(9e-6)})
    costs = world.side.costs
    assert costs.stage.head_s[1, 0] == pytest.approx(max(2 / 3 * 3e-6, 1 / 3 * 9e-6))
    assert costs.stage.transfer_s[1] == costs.link_byte_s[1] == costs.stage.head_s[1, 0]


def test_a_worker_that_is_lost_is_reported_and_takes_part_again_when_it_is_back() -> None:
    world, number = started()
    world.flip(world.prepared(world.move(number, [0], NAMES[1])))
    world.lose_worker(1)
    world.step()
    assert world.devices("a") == (0, 0, 0, 0)
    assert world.head_map().devices[1].status == LOST
    world.ranks.blocks[0] = 300
    world.step()
    assert world.head_map().devices[1].status == DeviceStatus.DEVICE_STATUS_OK
    assert world.flip(world.prepared(world.move(number, [0], NAMES[1]))).outcome == FLIPPED


def test_requests_that_lose_a_worker_leave_one_that_drains_too() -> None:
    world, number = started()
    world.flip(world.prepared(world.move(number, [0], NAMES[1]), world.move(number, [1], NAMES[2], index=1)))
    world.assign(world.assignment(conditions=[DeviceCondition(device=NAMES[2], status=DRAINING)]))
    world.lose_worker(1)
    world.step(2)
    assert world.devices("a") == (0, 0, 0, 0)


def test_a_drained_worker_has_no_move_on_its_way_to_it() -> None:
    world, _ = started()
    allocator = world.side.allocator
    to_one, to_two = allocator.prepare("a", [0], 1), allocator.prepare("a", [3], 2)
    assert to_one is not None
    assert to_two is not None
    allocator.drain(frozenset({1}))
    assert allocator.moves == (to_two,)
    assert allocator.abort(to_one.number) is None
    assert allocator.moving("a") == {3}
    allocator.check_invariants()


@pytest.mark.parametrize("policy", ["local", "remote", "solver"])
def test_what_a_step_would_compile_is_compiled_before_the_first_request(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[str]()
    monkeypatch.setattr("hetis.solver.dispatch.dispatcher.compile_dispatch", lambda: compiled.append("dispatch"))
    monkeypatch.setattr(
        "hetis.solver.redispatch.redispatcher.compile_redispatch", lambda: compiled.append("redispatch")
    )
    World(policy=policy)
    assert compiled == ["dispatch", "redispatch"]


def test_an_engine_without_workers_needs_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("a kernel of the solver would be compiled in a step")

    for name in ("dispatch.dispatcher.compile_dispatch", "redispatch.redispatcher.compile_redispatch"):
        monkeypatch.setattr(f"hetis.solver.{name}", unexpected)
    monkeypatch.setattr("hetis.runtime.vllm.redispatch.triggers", unexpected)
    world = World(blocks=())
    world.add("a")
    world.step(40)
    assert world.devices("a") == (0, 0, 0, 0)
