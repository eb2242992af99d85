"""Changes that the planner sends can be applied: by an authority, to its own head map, all at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings

from hetis.planner.convert.stages import snapshot_from_proto, stage_from_proto
from hetis.planner.fleet.redispatching.planning import FoundMoves, StageLook, StagePlanner
from hetis.planner.fleet.settings import RedispatchPolicy
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
from hetis.solver.redispatch.redispatcher import Redispatcher
from hetis.v1 import head_map_pb2, report_pb2
from tests.planner.redispatching.messages import apply_moves, head_map_message, stage_message
from tests.solver.redispatch.instances import problems, random_problem

EAGER = RedispatchPolicy(deviation_ratio=0.0)


def look_of(problem: RedispatchProblem, policy: RedispatchPolicy = EAGER) -> StageLook:
    return StageLook(
        head_map=head_map_message(problem.snapshot),
        terms=stage_from_proto(stage_message(problem)),
        conditions={},
        changed=frozenset(problem.snapshot.stage.devices),
        policy=policy,
    )


def moves_of(problem: RedispatchProblem, policy: RedispatchPolicy = EAGER) -> tuple[StageLook, FoundMoves | None]:
    look = look_of(problem, policy)
    return look, StagePlanner().look(look)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_change_can_be_made_at_once_by_who_owns_the_head_groups(problem: RedispatchProblem) -> None:
    look, found = moves_of(problem)
    if found is None:
        return
    heads, devices = problem.snapshot.stage.heads, look.head_map.devices
    running = {request.id: request for request in look.head_map.requests}
    used, seen = Counter[str](), Counter[tuple[str, int]]()
    for request in look.head_map.requests:
        for owner in request.owners:
            used[devices[owner].name] += -(-request.context_tokens // heads.block_tokens)
    for number, move in enumerate(found.moves):
        request = running[move.request]
        assert move.number == number
        assert move.incarnation == request.incarnation
        assert move.head_groups
        assert list(move.head_groups) == sorted(set(move.head_groups))
        assert move.source != move.target
        assert all(devices[request.owners[group]].name == move.source for group in move.head_groups)
        used[move.target] += len(move.head_groups) * -(-request.context_tokens // heads.block_tokens)
        seen.update((move.request, group) for group in move.head_groups)
    assert not seen or max(seen.values()) == 1  # no head group moves twice
    for device in devices:  # sources still hold the groups that leave
        assert used[device.name] <= device.total_blocks
        if device.status != report_pb2.DEVICE_STATUS_OK:
            assert device.name not in {move.target for move in found.moves}
    after = head_map_pb2.HeadMap.FromString(look.head_map.SerializeToString())
    apply_moves(after, found.moves)
    primary = problem.snapshot.stage.primary
    if primary is not None:
        unit = problem.snapshot.stage.primary_groups
        assert all(list(request.owners).count(primary.device) % unit == 0 for request in after.requests)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_change_stays_within_the_budget(problem: RedispatchProblem) -> None:
    layers, heads = problem.num_layers, problem.snapshot.stage.heads
    policy = replace(EAGER, kv_bytes=heads.kv_bytes_per_token * layers * 2000)
    look, found = moves_of(problem, policy)
    if found is None:
        return
    tokens = {request.id: request.context_tokens for request in look.head_map.requests}
    moved = sum(tokens[move.request] * len(move.head_groups) for move in found.moves)
    assert moved * heads.kv_bytes_per_token * layers <= policy.kv_bytes * (1 + 1e-9)
    assert sum(move.kv_bytes for move in found.moves) == pytest.approx(moved * heads.kv_bytes_per_token * layers)


def test_a_device_that_is_slower_than_its_profile_gives_head_groups_away() -> None:
    problem = random_problem(3, num_devices=4, num_requests=40, head_groups=8, slack=5.0)
    model, head_map = stage_message(problem), head_map_message(problem.snapshot)
    planner, policy = StagePlanner(), RedispatchPolicy()

    def look(slowness: dict[str, float]) -> FoundMoves | None:
        return planner.look(
            StageLook(
                head_map=head_map,
                terms=stage_from_proto(model, slowness=slowness),
                conditions={},
                changed=frozenset(slowness),
                policy=policy,
            )
        )

    while (found := look({})) is not None:
        apply_moves(head_map, found.moves)
    slow = look({"d1": 2.0})
    assert slow is not None
    assert slow.makespan_after_s < slow.makespan_before_s
    groups = Counter[str]()
    for move in slow.moves:
        groups[move.source] -= len(move.head_groups)
        groups[move.target] += len(move.head_groups)
    assert groups["d1"] < 0


def test_a_look_in_vain_is_not_repeated_on_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(3, num_devices=4, num_requests=40, head_groups=8, slack=5.0)
    planner, look = StagePlanner(), look_of(problem)
    look = replace(look, changed=frozenset())
    while (found := planner.look(look)) is not None:
        apply_moves(look.head_map, found.moves)
    monkeypatch.setattr(Redispatcher, "solve", None)  # a second search would call it
    assert planner.look(look) is None


def test_nothing_moves_while_something_is_under_way() -> None:
    look = look_of(random_problem(3, num_devices=4, num_requests=40))
    request = look.head_map.requests[0]
    source = look.head_map.devices[request.owners[0]].name
    target = next(device.name for device in look.head_map.devices if device.name != source)
    move = head_map_pb2.Move(request=request.id, head_groups=[0], source=source, target=target)
    assert StagePlanner().look(look) is not None
    for device in look.head_map.devices:
        device.total_blocks += 10_000
    look.head_map.moves.add(change_id="x", move=move)
    assert StagePlanner().look(look) is None


def test_requests_with_kv_on_a_lost_device_neither_move_nor_count() -> None:
    problem = random_problem(5, num_devices=4, num_requests=30, head_groups=8, slack=1.0)
    look = look_of(problem)
    look = replace(look, conditions={"d2/0": report_pb2.DEVICE_STATUS_LOST})
    found = StagePlanner().look(look)
    hit = {request.id for request in look.head_map.requests if 2 in request.owners}
    assert hit
    assert found is None or not hit & {move.request for move in found.moves}
    assert found is None or "d2" not in {move.target for move in found.moves}


def test_blocks_that_requests_of_a_lost_device_still_hold_elsewhere_are_not_free() -> None:
    problem = random_problem(5, num_devices=4, num_requests=30, head_groups=8, slack=1.0)
    look = look_of(problem)
    lost = snapshot_from_proto(look.head_map, look.terms, conditions={"d2/0": report_pb2.DEVICE_STATUS_LOST})
    before = problem.snapshot
    others = [0, 1, 3]
    free = (before.total_blocks() - before.used_blocks())[others]
    assert (lost.total_blocks() - lost.used_blocks())[others].tolist() == free.tolist()
    assert len(lost.ids) < len(before.ids)
