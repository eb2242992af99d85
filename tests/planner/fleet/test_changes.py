"""One change by itself: the messages to its nodes follow from the store and from the authority's status."""

from __future__ import annotations

import pytest

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.changes import ChangeCoordinator, Phase, State, gpus_of_copy, parts_of
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.views import publish
from hetis.v1 import change_pb2, redispatch_pb2, replica_pb2, report_pb2
from tests.planner.fleet.samples import REPLICA, change, shape
from tests.planner.fleet.world import World


def coordinator() -> ChangeCoordinator:
    body = change(2)
    body.change.generation = 3
    parts = parts_of(body.change, shape(), primary_node="a")
    return ChangeCoordinator(body, parts, now_s=0.0, again_s=10.0)


def keep(one: ChangeCoordinator) -> None:
    one.saved(one.to_save())


def say(one: ChangeCoordinator, node: str, phase: Phase.ValueType) -> None:
    one.report(node, change_pb2.ChangeStatus(change_id=one.change_id, phase=phase, generation=3))


def told(one: ChangeCoordinator) -> dict[str, str]:
    return {node: directive.kind for node, directive in one.directives().items()}


def committing() -> ChangeCoordinator:
    one = coordinator()
    keep(one)
    for node in ("a", "b", "c"):
        say(one, node, Phase.CHANGE_PHASE_READY)
    return one


def test_nobody_is_asked_before_the_change_is_kept() -> None:
    one = coordinator()
    assert told(one) == {}
    keep(one)
    assert told(one) == {"a": "prepare", "b": "prepare", "c": "prepare"}


def test_nobody_is_permitted_before_committing_is_kept() -> None:
    one = committing()
    assert one.state == State.REDISPATCH_STATE_COMMITTING
    assert "commit" not in told(one).values()
    keep(one)
    assert told(one) == {"a": "commit"}


@pytest.mark.parametrize("phase", [Phase.CHANGE_PHASE_FLIPPED, Phase.CHANGE_PHASE_ABORTED])
def test_nobody_is_told_the_end_before_it_is_kept_and_the_authority_is_told_last(phase: Phase.ValueType) -> None:
    one = committing()
    keep(one)
    say(one, "a", phase)
    assert "resolved" not in told(one).values()
    keep(one)
    assert told(one) == {"b": "resolved", "c": "resolved"}
    say(one, "b", Phase.CHANGE_PHASE_RELEASED)
    one.reconnected("c", lists_change=False)
    assert told(one) == {"a": "resolved"}
    one.answered("a", "resolved", None, now_s=0.0)
    say(one, "a", Phase.CHANGE_PHASE_RELEASED)
    keep(one)
    assert one.has_ended
    ended = State.REDISPATCH_STATE_DONE if one.was_flipped else State.REDISPATCH_STATE_ABORTED
    assert one.state == ended


def test_an_abort_whose_write_is_under_way_is_no_end_that_may_be_delivered() -> None:
    one = coordinator()
    keep(one)
    one.lose("c")
    saving = one.to_save()  # ABORTING, and the outcome is still unknown
    say(one, "a", Phase.CHANGE_PHASE_ABORTED)
    one.saved(saving)
    assert set(told(one).values()) == {"abort"}
    keep(one)
    assert told(one) == {"b": "resolved", "c": "resolved"}  # c may reconnect at any moment


def test_only_the_authority_says_how_it_ended() -> None:
    one = committing()
    keep(one)
    say(one, "b", Phase.CHANGE_PHASE_FLIPPED)
    say(one, "c", Phase.CHANGE_PHASE_ABORTED)
    assert one.state == State.REDISPATCH_STATE_COMMITTING


def test_what_tells_of_an_earlier_phase_is_old() -> None:
    one = committing()
    say(one, "b", Phase.CHANGE_PHASE_PREPARING)
    assert one.body.nodes[1].status.phase == Phase.CHANGE_PHASE_READY


def test_once_it_is_committing_it_cannot_be_called_off() -> None:
    one = committing()
    one.lose("c")
    assert one.pass_time(1e9) == []
    assert one.state == State.REDISPATCH_STATE_COMMITTING


def test_the_first_word_of_the_authority_stands() -> None:
    one = committing()
    keep(one)
    say(one, "a", Phase.CHANGE_PHASE_FLIPPED)
    say(one, "a", Phase.CHANGE_PHASE_ABORTED)
    assert one.was_flipped
    assert one.num_contradictions == 1


def engine(one: ChangeCoordinator, engine_id: str, num_steps: int = 0) -> None:
    serving = report_pb2.ASSIGNMENT_STATE_SERVING
    one.see_report("a", report_pb2.ReplicaReport(engine_id=engine_id, num_steps=num_steps, assignment_state=serving))


def refuse(one: ChangeCoordinator, node: str, kind: str, reason: Reason.ValueType) -> None:
    one.answered(node, kind, ServiceError(reason, "refused").to_proto(), now_s=0.0)


def forgotten() -> ChangeCoordinator:
    """The authority's agent lost its disk after the permission."""
    one = coordinator()
    engine(one, "first")
    keep(one)
    for node in ("a", "b", "c"):
        say(one, node, Phase.CHANGE_PHASE_READY)
    keep(one)
    refuse(one, "a", "commit", Reason.ERROR_REASON_CHANGE_UNKNOWN)
    return one


def test_an_agent_that_knows_nothing_of_a_permission_is_asked_again_until_its_engine_has_spoken() -> None:
    one = forgotten()
    engine(one, "first")
    keep(one)
    assert one.state == State.REDISPATCH_STATE_COMMITTING
    assert one.pass_time(10.0) == ["a"]
    assert told(one) == {"a": "commit"}
    say(one, "a", Phase.CHANGE_PHASE_FLIPPED)
    assert one.was_flipped
    assert one.num_contradictions == 0


@pytest.mark.parametrize("is_first", [False, True])
def test_a_permission_that_is_forgotten_with_the_engine_came_to_nothing(is_first: bool) -> None:
    one = forgotten()
    if is_first:  # the report arrives before the answer
        one = coordinator()
        engine(one, "first")
        keep(one)
        for node in ("a", "b", "c"):
            say(one, node, Phase.CHANGE_PHASE_READY)
        keep(one)
        engine(one, "second")
        refuse(one, "a", "commit", Reason.ERROR_REASON_CHANGE_UNKNOWN)
    else:
        engine(one, "second")
    assert one.state == State.REDISPATCH_STATE_ABORTING
    keep(one)
    assert told(one) == {"b": "resolved", "c": "resolved"}


def test_an_engine_that_does_not_say_its_run_is_new_when_it_counts_from_the_start() -> None:
    one = coordinator()
    engine(one, "", 50)
    keep(one)
    for node in ("a", "b", "c"):
        say(one, node, Phase.CHANGE_PHASE_READY)
    keep(one)
    refuse(one, "a", "commit", Reason.ERROR_REASON_CHANGE_UNKNOWN)
    one.see_report("a", report_pb2.ReplicaReport(assignment_state=report_pb2.ASSIGNMENT_STATE_LOADING))  # a mere hint
    assert one.state == State.REDISPATCH_STATE_COMMITTING
    engine(one, "", 3)
    assert one.state == State.REDISPATCH_STATE_ABORTING


@pytest.mark.parametrize("restarts", [False, True])
def test_an_authority_that_flipped_corrects_an_abort_that_it_never_spoke_of(restarts: bool) -> None:
    one = forgotten()
    engine(one, "second")
    keep(one)
    one.answered("b", "resolved", None, now_s=0.0)
    if restarts:
        body = redispatch_pb2.Redispatch()
        body.CopyFrom(one.body)
        one = ChangeCoordinator.resumed(body, now_s=0.0, again_s=10.0)
    say(one, "a", Phase.CHANGE_PHASE_FLIPPED)
    assert told(one) == {}  # not before the correction is stored
    keep(one)
    assert one.state == State.REDISPATCH_STATE_RELEASING
    assert told(one) == {"b": "resolved", "c": "resolved"}
    assert one.num_contradictions == 1


def test_a_node_that_holds_another_end_does_not_hold_the_change_up_for_ever() -> None:
    one = committing()
    keep(one)
    say(one, "a", Phase.CHANGE_PHASE_FLIPPED)
    keep(one)
    for node in ("b", "c", "a"):
        refuse(one, node, "resolved", Reason.ERROR_REASON_CHANGE_PHASE)
    keep(one)
    assert one.has_ended
    assert one.num_contradictions == 3


def test_a_planner_that_finds_preparing_calls_it_off() -> None:
    body = redispatch_pb2.Redispatch()
    one = coordinator()
    keep(one)
    body.CopyFrom(one.body)
    next_one = ChangeCoordinator.resumed(body, now_s=0.0, again_s=10.0)
    assert next_one.state == State.REDISPATCH_STATE_ABORTING
    assert told(next_one) == {"a": "abort", "b": "abort", "c": "abort"}


def test_a_generation_that_was_given_to_a_change_is_not_given_again() -> None:
    world = World()
    world.serve()
    world.propose()
    world.flow()
    world.agents["c"].fail_copy()
    world.flow()
    world.restart_planner()
    for node in world.agents:
        world.connect(node)
    world.flow()
    world.propose()
    bodies = [record.body for record in world.store.tables.redispatches.rows.values()]
    assert sorted(body.change.generation for body in bodies) == [3, 4]


def test_parts_follow_the_gpus_of_the_copy_that_is_meant() -> None:
    plan = replica_pb2.ReplicaPlan(
        stages=[replica_pb2.StagePlan(tp=2, copies=2, devices=["a/0", "b/0", "c/0", "d/0"])],
        attention_workers=[replica_pb2.AttentionWorkerPool(stage=0, devices=["e/0", "f/0"])],
    )
    assert gpus_of_copy(plan, 0, 1) == {"c/0": ["c/0", "d/0"], "f/0": ["f/0"]}
    body = change(2, source="c/0", target="f/0").change
    body.copy = 1
    source, target = change_pb2.CHANGE_PART_SOURCE, change_pb2.CHANGE_PART_TARGET
    assert parts_of(body, plan, primary_node="a") == {
        "a": (change_pb2.CHANGE_PART_AUTHORITY,),
        "c": (source,),
        "d": (source,),
        "f": (target,),
    }
    with pytest.raises(ServiceError, match="is not a device of the stage's copy"):
        parts_of(change(2, source="a/0", target="f/0").change, plan, primary_node="a")


def test_a_node_that_moves_no_heads_has_no_part_and_the_authority_does_it() -> None:
    """This happens if the attention workers of a real engine are on nodes whose agents have no engine."""
    world = World()
    world.agents["b"].capabilities = []
    world.serve()
    change_id = world.propose()
    body = world.planner.cluster.changes.under_way[change_id].body
    assert {one.node: list(one.parts) for one in body.nodes} == {
        "a": [change_pb2.CHANGE_PART_AUTHORITY, change_pb2.CHANGE_PART_SOURCE],
        "c": [change_pb2.CHANGE_PART_TARGET],
    }
    world.heal()
    assert world.state(change_id) == "DONE"
    assert not world.planner.cluster.ensure_link("nobody").capabilities
    assert world.planner.cluster.ensure_link("nobody").moves_heads, "what it can is not known before it says so"


def test_a_look_at_nodes_that_never_connected_makes_no_links() -> None:
    world = World()
    cluster = world.planner.cluster
    with pytest.raises(ServiceError, match="is at 0"):
        cluster.changes.propose(change(1), now_s=0.0)
    with pytest.raises(ServiceError, match="node a is not connected"):
        cluster.request_head_maps(REPLICA)
    world.settle()
    assert not cluster.links


async def test_a_change_is_published_after_the_replica_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world, hubs = World(), Hubs(1)
    world.serve()
    cluster = world.planner.cluster
    redispatch = ("redispatch", cluster.changes.under_way[world.propose()].body.name)
    monkeypatch.setattr(cluster.pending, "take_views", lambda: [redispatch, ("replica", REPLICA)])
    publish(cluster, hubs, now_s=0.0)
    events = await anext(hubs.cluster(cluster.name).watch())
    assert [event.key for event in events] == [("replica", REPLICA), redispatch]
