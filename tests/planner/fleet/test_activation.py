"""Plans come into force: capacity comes up before other capacity goes down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetis.planner.failures import Reason
from hetis.planner.resources.in_force import withdraw
from hetis.v1 import agent_service_pb2, plan_pb2, replica_pb2, report_pb2
from tests.planner.fleet.samples import PLAN, REPLICA, plan_record, replica_record, shape
from tests.planner.fleet.world import World

NEXT = "plans/next"
BESIDE = "clusters/lab/replicas/next-0"
INSTEAD = "clusters/lab/replicas/next-1"
STARTING = replica_pb2.REPLICA_STATE_STARTING
SERVING = replica_pb2.REPLICA_STATE_SERVING
DRAINING = replica_pb2.REPLICA_STATE_DRAINING
FAILED = replica_pb2.REPLICA_STATE_FAILED


def activate(world: World, *replicas: tuple[str, replica_pb2.ReplicaPlan]) -> None:
    """Activate a plan like ActivatePlan: in one transaction, of which the fleet is then notified."""
    tables = world.store.tables
    cluster = tables.clusters.require("clusters/lab")
    tables.clusters.update(replace(cluster, active_plan=NEXT, earlier_plan=PLAN))
    tables.plans.update(replace(tables.plans.require(PLAN), activation=plan_pb2.ACTIVATION_STATE_INACTIVE))
    tables.plans.insert(plan_record(NEXT))
    for index, (name, its) in enumerate(replicas):
        tables.replicas.insert(replica_record(name, NEXT, index, its))
    world.planner.reread(world.now_s)
    world.settle()


def state(world: World, name: str) -> int:
    record = world.store.tables.replicas.get(name)
    return record.state if record else 0


def work(world: World) -> None:
    """Let engines reach their goals."""
    world.flow()
    for agent in world.agents.values():
        agent.load()
    world.flow()


def test_a_replica_serves_when_all_its_nodes_have_loaded_and_not_before() -> None:
    world = World()
    for node in ("a", "b", "c"):
        world.connect(node)
    world.flow()
    for node in ("a", "b"):
        world.agents[node].load()
    world.flow()
    goals = {agent.held[REPLICA][2].goal for agent in world.agents.values()}
    assert goals == {replica_pb2.ASSIGNMENT_GOAL_LOAD}
    world.agents["c"].load()
    world.flow()
    goals = {agent.held[REPLICA][2].goal for agent in world.agents.values()}
    assert goals == {replica_pb2.ASSIGNMENT_GOAL_SERVE}
    assert state(world, REPLICA) == STARTING
    work(world)
    assert state(world, REPLICA) == SERVING
    plan = world.store.tables.plans.require(PLAN)
    assert plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVE
    assert plan.body.activation_progress.num_serving == 1


def test_only_the_primary_gets_the_stages_and_everybody_the_shape_and_the_sides_of_an_exchange(world: World) -> None:
    assignments = {node: agent.held[REPLICA][2] for node, agent in world.agents.items()}
    assert [len(assignments[node].stages) for node in ("a", "b", "c")] == [1, 0, 0]
    assert {one.shape.SerializeToString() for one in assignments.values()} == {shape().SerializeToString()}
    assert [list(assignments[node].devices) for node in ("a", "b", "c")] == [["a/0"], ["b/0"], ["c/0"]]
    assert {tuple(one.kv_partners[0].gpu_types) for one in assignments.values()} == {("T4",)}
    assert assignments["a"].plan == PLAN


def test_a_plan_goes_through_its_waves(world: World) -> None:
    activate(world, (BESIDE, shape(["a/1"], ["b/1"])), (INSTEAD, shape(["a/0"], ["c/0"])))
    world.flow()
    assert state(world, BESIDE) == STARTING
    assert INSTEAD not in world.agents["a"].held
    assert state(world, REPLICA) == SERVING
    work(world)
    work(world)
    assert state(world, BESIDE) == SERVING
    assert state(world, REPLICA) == DRAINING
    assert INSTEAD not in world.agents["a"].held
    work(world)
    assert state(world, REPLICA) == DRAINING  # requests are still running
    world.agents["a"].num_running = 0
    work(world)
    assert REPLICA not in world.store.tables.replicas.rows
    assert all(REPLICA not in agent.held for agent in world.agents.values())
    work(world)
    work(world)
    assert state(world, INSTEAD) == SERVING
    assert world.store.tables.plans.require(NEXT).activation == plan_pb2.ACTIVATION_STATE_ACTIVE


def test_nothing_that_serves_is_stopped_when_a_new_one_cannot_come_up(world: World) -> None:
    activate(world, (BESIDE, shape(["a/1"], ["b/1"])), (INSTEAD, shape(["a/0"], ["c/0"])))
    world.agents["b"].refuse_with = Reason.ERROR_REASON_DEVICE_UNAVAILABLE
    for _ in range(4):
        work(world)
    assert state(world, BESIDE) == FAILED
    assert state(world, REPLICA) == SERVING
    plan = world.store.tables.plans.require(NEXT)
    assert plan.activation == plan_pb2.ACTIVATION_STATE_FAILED
    assert plan.body.activation_progress.failure.reason == Reason.ERROR_REASON_DEVICE_UNAVAILABLE
    assert INSTEAD not in world.agents["a"].held


def test_a_replica_that_does_not_come_up_in_time_has_failed(world: World) -> None:
    activate(world, (BESIDE, shape(["a/1"], ["b/1"])))
    for _ in range(310):
        for agent in world.agents.values():
            agent.heartbeat()
        world.flow()
        world.pass_time(3.0)
        for node in world.agents:
            if node not in world.sessions:
                world.connect(node)
    assert state(world, BESIDE) == FAILED
    assert state(world, REPLICA) == SERVING


def test_a_replica_whose_engine_restarts_says_that_it_loads_and_serves_again_by_itself(world: World) -> None:
    agent = world.agents["a"]
    agent.states[REPLICA] = report_pb2.ASSIGNMENT_STATE_LOADING
    agent.report()
    world.flow()
    record = world.store.tables.replicas.require(REPLICA)
    assert record.state == FAILED
    assert record.body.failure.message == "node a is loading the replica again: its engine restarted"
    work(world)
    assert state(world, REPLICA) == SERVING


def test_an_activation_goes_on_under_the_next_planner(world: World) -> None:
    activate(world, (BESIDE, shape(["a/1"], ["b/1"])))
    world.flow()
    for _ in range(6):
        world.restart_planner()
        for node in world.agents:
            world.connect(node)
        world.agents["a"].num_running = 0
        work(world)
    assert state(world, BESIDE) == SERVING
    assert REPLICA not in world.store.tables.replicas.rows


def test_a_restart_of_the_planner_alone_sends_nothing(world: World) -> None:
    before = {node: agent.held[REPLICA][0] for node, agent in world.agents.items()}
    world.restart_planner()
    for node in world.agents:
        world.connect(node)
    deltas = [message for queue in world.to_agent.values() for message in queue if message.HasField("delta")]
    assert not deltas
    assert before == {node: agent.held[REPLICA][0] for node, agent in world.agents.items()}


def test_a_rollback_takes_back_a_replica_that_drains(world: World) -> None:
    activate(world, (BESIDE, shape(["a/1"], ["b/1"])))
    for _ in range(3):
        work(world)
    assert state(world, REPLICA) == DRAINING
    roll_back(world)
    world.planner.reread(world.now_s)
    world.settle()
    work(world)
    assert state(world, REPLICA) == SERVING
    assert state(world, BESIDE) == DRAINING


def roll_back(world: World) -> None:
    """Go back to the first plan like RollbackPlan, in one transaction, of which the fleet is not notified yet."""
    tables = world.store.tables
    tables.clusters.update(replace(tables.clusters.require("clusters/lab"), active_plan=PLAN, earlier_plan=""))
    tables.plans.update(replace(tables.plans.require(PLAN), activation=plan_pb2.ACTIVATION_STATE_ACTIVATING))
    tables.plans.update(replace(tables.plans.require(NEXT), activation=plan_pb2.ACTIVATION_STATE_INACTIVE))
    tables.replicas.update(replace(tables.replicas.require(REPLICA), plan=PLAN))
    tables.replicas.update(replace(tables.replicas.require(BESIDE), plan=""))


def test_a_replica_that_a_rollback_takes_back_is_not_stopped_by_an_earlier_decision(world: World) -> None:
    """Its primary reports that nothing runs any more before the fleet has read the records that the rollback wrote."""
    activate(world, (BESIDE, shape(["a/1"], ["b/1"])))
    tables = world.store.tables
    tables.replicas.update(replace(tables.replicas.require(REPLICA), plan=""))
    world.planner.reread(world.now_s)
    for _ in range(3):
        work(world)
    assert state(world, REPLICA) == DRAINING
    roll_back(world)
    world.agents["a"].num_running = 0
    work(world)
    assert state(world, REPLICA) == DRAINING
    world.planner.reread(world.now_s)
    for _ in range(3):
        world.settle()
        work(world)
    assert state(world, REPLICA) == SERVING
    assert BESIDE not in tables.replicas.rows
    assert tables.plans.require(PLAN).body.activation_progress.num_serving == 1


def test_the_progress_names_the_nodes_that_hold_up_an_activation() -> None:
    world = World()
    world.settle()

    def awaited() -> tuple[list[str], int]:
        progress = world.planner.cluster.progress
        return list(progress.awaited_nodes), progress.num_awaited_nodes

    assert awaited() == (["a", "b", "c"], 3)
    world.connect("a")
    assert awaited() == (["b", "c"], 2)
    for node in ("b", "c"):
        world.connect(node)
    world.flow()
    assert awaited() == (["a", "b", "c"], 3)  # no weights are loaded yet
    world.agents["b"].load()
    world.flow()
    world.disconnect("c")
    assert awaited() == (["c", "a"], 2)  # those without an agent first
    world.connect("c")
    work(world)
    work(world)
    assert world.store.tables.plans.require(PLAN).activation == plan_pb2.ACTIVATION_STATE_ACTIVE
    assert awaited() == ([], 0)


def test_replicas_of_an_activation_that_was_withdrawn_are_removed_from_their_nodes() -> None:
    world = World()
    world.connect("a")
    world.connect("b")
    world.connect("c")
    world.flow()
    assert REPLICA in world.agents["b"].held
    tables = world.store.tables
    cluster, plan = withdraw(tables, tables.plans.require(PLAN))  # type: ignore[arg-type]
    assert (cluster.active_plan, plan.activation) == ("", plan_pb2.ACTIVATION_STATE_INACTIVE)
    world.planner.reread(world.now_s)
    world.settle()
    world.flow()
    assert not any(agent.held for agent in world.agents.values())
    assert REPLICA not in tables.replicas.rows


def test_a_node_that_drains_is_told_as_a_condition(world: World) -> None:
    tables = world.store.tables
    node = tables.nodes.require("clusters/lab/nodes/c")
    tables.nodes.update(replace(node, draining=True))
    world.planner.reread(world.now_s)
    world.settle()
    world.flow()
    draining = replica_pb2.DeviceCondition(device="c/0", status=report_pb2.DEVICE_STATUS_DRAINING)
    assert list(world.agents["a"].held[REPLICA][2].conditions) == [draining]
    assert state(world, REPLICA) == SERVING


def test_a_node_that_holds_what_is_not_its_own_is_told_to_remove_it(world: World) -> None:
    agent = world.agents["c"]
    agent.held["clusters/lab/replicas/gone"] = (9, 1, agent.held[REPLICA][2])
    agent.states["clusters/lab/replicas/gone"] = report_pb2.ASSIGNMENT_STATE_SERVING
    world.connect("c")
    world.flow()
    assert list(agent.held) == [REPLICA]


def test_a_node_with_a_later_generation_leads_to_a_new_assignment_for_all(world: World) -> None:
    agent = world.agents["c"]
    agent.held[REPLICA] = (50, 1, agent.held[REPLICA][2])
    world.connect("c")
    world.flow()
    assert {one.held[REPLICA][0] for one in world.agents.values()} == {51}


def test_engines_that_hetis_does_not_steer_count_as_whatever_is_wanted() -> None:
    world = World()
    for agent in world.agents.values():
        agent.capabilities = []
    for node in world.agents:
        world.connect(node)
    for _ in range(3):
        world.flow()
        for agent in world.agents.values():
            for name in agent.held:
                agent.states[name] = report_pb2.ASSIGNMENT_STATE_UNMANAGED
            agent.report()
    world.flow()
    assert state(world, REPLICA) == SERVING


@pytest.mark.parametrize(("reason", "expected"), [("ENGINE_CANNOT", SERVING), ("ENGINE_UNREACHABLE", FAILED)])
def test_an_engine_that_has_loaded_serves_even_if_its_heads_cannot_move(reason: str, expected: int) -> None:
    world = World()
    for node, agent in world.agents.items():
        agent.reports_failure = Reason.Value(f"ERROR_REASON_{reason}") if node == "a" else None
        world.connect(node)
    for _ in range(3):
        work(world)
    assert state(world, REPLICA) == expected


def test_the_newest_report_counts(world: World) -> None:
    link = world.planner.cluster.links["a"]
    newer, older = world.agents["a"].hello(), world.agents["a"].hello()
    for sequence, request, index in ((9, newer, 1), (8, older, 0)):
        request.sequence, request.epoch = sequence, 1
        request.report.CopyFrom(agent_service_pb2.NodeReport(devices=[report_pb2.DeviceReport(index=index)]))
        link.receive(request, now_s=0.0)
    assert [device.index for device in link.devices] == [1]
