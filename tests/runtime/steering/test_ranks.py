"""The planner moves heads of a stage with tensor parallelism, whose ranks it sees as one device."""

from __future__ import annotations

import pytest

from hetis.planner.convert.stages_in import stage_from_proto
from hetis.planner.fleet.redispatching.planning import StageLook, StagePlanner
from hetis.planner.fleet.redispatching.policy import RedispatchPolicy
from hetis.runtime.executor.refusals import RefusedError, reason_name
from hetis.solver.dispatch.snapshot import DeviceStatus as OwnStatus
from hetis.v1.change_pb2 import ChangeOutcome
from hetis.v1.replica_pb2 import DeviceCondition
from hetis.v1.report_pb2 import DeviceStatus
from tests.runtime.steering.world import World, assignment_of, stage_of

FLIPPED = ChangeOutcome.CHANGE_OUTCOME_FLIPPED


def started(pages: int = 200) -> tuple[World, int]:
    """One request that decodes, all its heads on the two ranks."""
    world = World(ranks=2, pages=(pages,))
    world.assign()
    number = world.add()
    world.step(2)
    assert world.heads(number) == (0, 0, 1, 1)
    return world, number


def test_moves_of_the_planner_leave_both_ranks_and_come_home_and_the_text_stays() -> None:
    world, number = started()
    primary, first, second = world.names
    change = world.prepared(world.move(number, 1, first, 3), world.move(number, 0, second, 2, index=1))
    assert [entry.move.number for entry in world.head_map().moves] == [0, 1]
    assert world.flip(change).outcome == FLIPPED
    assert world.heads(number) == (3, 2, 3, 2)
    (request,) = world.head_map().requests
    assert list(request.owners) == [2, 1, 2, 1]
    back = world.move(number, 0, primary, together=4), world.move(number, 3, primary, index=1, together=4)
    assert world.flip(world.prepared(*back)).outcome == FLIPPED
    assert world.heads(number) == (0, 2, 3, 1)
    (replica,) = world.steered.report(world.now_s).replicas
    (load,) = replica.stages
    blocks = -(-world.head_map().requests[0].context_tokens // 16)
    found = [(device.device, device.heads, device.total_blocks, device.used_blocks) for device in load.devices]
    assert found == [(primary, 4, 400, 2 * blocks), (first, 2, 200, blocks), (second, 2, 200, blocks)]
    world.finish()


def test_what_would_leave_the_primary_uneven_is_refused_and_so_is_what_a_rank_has_no_room_for() -> None:
    world, number = started(pages=19)  # a rank has room for three heads of five pages, no more
    primary, first, _ = world.names
    with pytest.raises(RefusedError, match="changes the heads on the ranks of s0c0d0 by -1, 0: must be") as error:
        world.reserve(world.change(world.move(number, 1, first)))
    assert reason_name(error.value.failure) == "INVALID_FIELD"
    assert world.flip(world.prepared(world.move(number, 0, first, 2))).outcome == FLIPPED
    other = world.add()
    world.step(8)
    assert world.heads(other) == (0, 0, 1, 1)
    with pytest.raises(RefusedError) as full:
        world.reserve(world.change(world.move(number, 0, primary, 2)))
    assert reason_name(full.value.failure) == "KV_BLOCKS_EXHAUSTED"
    assert world.engine.placement.moves == ()
    world.finish()


def test_a_request_that_an_operator_left_uneven_is_not_told() -> None:
    world, number = started()
    assert world.engine.move(number, [0], 2)
    found = world.head_map()
    assert not found.requests
    blocks = -(-world.engine.placement.tokens(number) // 16)
    assert [device.total_blocks for device in found.devices] == [2 * (200 - 2 * blocks), 200 - blocks, 200]
    assert world.engine.move(number, [2], 3)
    assert [list(request.owners) for request in world.head_map().requests] == [[1, 0, 2, 0]]
    world.finish()


def test_the_planners_own_moves_empty_a_worker_and_the_engine_makes_them() -> None:
    """Its own code reads the head map, solves, and says which heads go."""
    world, number = started()
    assert world.flip(world.prepared(world.move(number, 0, world.names[1], 1, 2, 3))).outcome == FLIPPED
    assert world.heads(number) == (2, 2, 2, 2)
    gone = DeviceCondition(device=world.names[1], status=DeviceStatus.DEVICE_STATUS_DRAINING)
    world.assign(assignment_of(world.engine, conditions=[gone]))
    look = StageLook(
        head_map=world.head_map(),
        terms=stage_from_proto(stage_of(world.engine)),
        conditions={gone.device: gone.status},
        changed=frozenset(),
        policy=RedispatchPolicy(),
    )
    found = StagePlanner().look(look)
    assert found is not None
    assert world.flip(world.prepared(*found.moves)).outcome == FLIPPED
    heads = world.heads(number)
    assert 2 not in heads
    assert heads.count(0) == heads.count(1)
    world.finish()


def test_a_rank_that_drains_drains_the_primary() -> None:
    world, _ = started()
    gpu = DeviceCondition(device="s0c0d1", status=DeviceStatus.DEVICE_STATUS_DRAINING)
    world.assign(assignment_of(world.engine, conditions=[gpu]))
    states = [device.status for device in world.engine.placement.state.devices]
    assert states == [OwnStatus.DRAINING, OwnStatus.DRAINING, OwnStatus.OK, OwnStatus.OK]
    assert world.head_map().devices[0].status == DeviceStatus.DEVICE_STATUS_DRAINING
    world.assign()
    assert {device.status for device in world.engine.placement.state.devices} == {OwnStatus.OK}
    world.finish()


def test_a_plan_with_another_number_of_cards_is_refused() -> None:
    world = World(ranks=2)
    other = assignment_of(world.engine)
    del other.stages[0].devices[0].gpus[1:]
    with pytest.raises(RefusedError, match="the plan's primary s0c0d0 has 1 cards, this engine's 2"):
        world.assign(other)
