"""Plans that the planner proposes by itself after a lasting change of capacity."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.resources.proposals import PlacementProposals, is_better
from hetis.solver.errors import InvalidProblemError
from hetis.v1 import cluster_pb2, plan_pb2, replica_pb2

CLUSTER = "clusters/c"
READY, LOST = cluster_pb2.NODE_STATE_READY, cluster_pb2.NODE_STATE_LOST
SUSPECT = cluster_pb2.NODE_STATE_SUSPECT


@dataclass
class Node:
    state: cluster_pb2.NodeState.ValueType = READY
    is_draining: bool = False


def plan_on(*nodes: str, name: str = "plans/first", rate_rps: float = 1.0) -> plan_pb2.Plan:
    """One replica on each node, of one GPU."""
    replicas = [
        replica_pb2.ReplicaPlan(rate_rps=rate_rps, stages=[replica_pb2.StagePlan(devices=[f"{node}/0"])])
        for node in nodes
    ]
    return plan_pb2.Plan(
        name=name,
        cluster=CLUSTER,
        spec=plan_pb2.PlanSpec(model_name="m", seed=7),
        state=plan_pb2.PLAN_STATE_READY,
        activation=plan_pb2.ACTIVATION_STATE_ACTIVE,
        result=plan_pb2.PlanResult(replicas=replicas),
    )


@dataclass
class World:
    """A cluster of three nodes, its plans, and a clock."""

    mode: cluster_pb2.ReactionMode.ValueType = cluster_pb2.REACTION_MODE_ADVISORY
    now_s: float = 1000.0
    proposed: list[tuple[plan_pb2.PlanSpec, str]] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.nodes = {f"{CLUSTER}/nodes/{name}": Node() for name in "abc"}
        self.plans = {"plans/first": plan_on("a", "b", "c")}
        self.in_force = "plans/first"
        self.capacity: dict[str, frozenset[str]] = {}
        self.proposals = PlacementProposals(self, self, clock=self)
        self.proposals.capacity_changed(CLUSTER)

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s

    def presence_of(self, cluster: str) -> dict[str, tuple[cluster_pb2.NodeState.ValueType, bool]]:
        return {name.rpartition("/")[2]: (node.state, node.is_draining) for name, node in self.nodes.items()}

    def policy_of(self, cluster: str) -> cluster_pb2.ClusterPolicy:
        return cluster_pb2.ClusterPolicy(placement=self.mode)

    def has_plan(self, cluster: str) -> bool:
        return bool(self.in_force)

    async def plan_in_force(self, cluster: str) -> plan_pb2.Plan | None:
        return self.plans.get(self.in_force)

    async def open_proposals(self, cluster: str) -> list[str]:
        return sorted((name for name in self.plans if name.startswith("plans/p")), reverse=True)

    async def capacity_of(self, plan: str) -> frozenset[str]:
        return self.capacity[plan]

    async def plan(self, name: str) -> plan_pb2.Plan | None:
        return self.plans.get(name)

    async def propose(self, cluster: str, spec: plan_pb2.PlanSpec, reason: str) -> str:
        if self.error:
            raise self.error
        self.proposed.append((spec, reason))
        name = f"plans/p{len(self.proposed)}"
        usable = [key[-1] for key, node in self.nodes.items() if node.state == READY and not node.is_draining]
        made = plan_on(*usable, name=name)
        self.capacity[name] = frozenset(usable)
        made.state, made.activation = plan_pb2.PLAN_STATE_SOLVING, plan_pb2.ACTIVATION_STATE_INACTIVE
        self.plans[name] = made
        return name

    async def withdraw(self, plan: str) -> None:
        self.withdrawn.append(plan)
        del self.plans[plan]

    async def activate(self, plan: str) -> None:
        self.plans[self.in_force].activation = plan_pb2.ACTIVATION_STATE_INACTIVE
        self.plans[plan].activation = plan_pb2.ACTIVATION_STATE_ACTIVE
        self.in_force = plan

    def take_over(self) -> None:
        """Begin another term, in which only the store is known, and nodes that do not report are SUSPECT at first."""
        self.nodes |= {name: Node(SUSPECT) for name, node in self.nodes.items() if node.state == LOST}
        self.proposals = PlacementProposals(self, self, clock=self)
        self.proposals.capacity_changed(CLUSTER)

    def set(self, node: str, state: cluster_pb2.NodeState.ValueType = READY, *, draining: bool = False) -> None:
        self.nodes[f"{CLUSTER}/nodes/{node}"] = Node(state, draining)
        self.proposals.capacity_changed(CLUSTER)

    def pass_s(self, seconds: float) -> None:
        """Advance second by second, as `run` would."""

        async def steps() -> None:
            for _ in range(int(seconds)):
                self.now_s += 1
                await self.proposals.step()

        asyncio.run(steps())


def test_while_nothing_changes_nothing_is_proposed() -> None:
    world = World()
    world.pass_s(1000)
    assert world.proposed == []


@pytest.mark.parametrize("draining", [False, True])
def test_a_node_that_is_gone_for_long_leads_to_one_proposal_of_the_same_problem(draining: bool) -> None:
    world = World()
    world.pass_s(10)
    world.set("b", READY if draining else LOST, draining=draining)
    world.pass_s(299)
    assert world.proposed == []
    world.pass_s(2000)
    ((spec, reason),) = world.proposed
    assert spec == world.plans["plans/first"].spec
    assert reason == "For 300 s b is gone."
    assert world.in_force == "plans/first"


def test_a_node_that_blinks_is_no_change() -> None:
    world = World()
    for _ in range(20):
        world.set("b", LOST)
        world.pass_s(200)
        world.set("b")
        world.pass_s(200)
    assert world.proposed == []


def test_a_node_that_the_plan_does_not_use_is_not_missed() -> None:
    world = World()
    world.plans["plans/first"] = plan_on("a", "b")
    world.pass_s(1)
    world.set("c", LOST)
    world.pass_s(1000)
    assert world.proposed == []


def test_automatic_puts_a_ready_proposal_in_force_and_the_next_one_when_the_node_is_back() -> None:
    world = World(mode=cluster_pb2.REACTION_MODE_AUTOMATIC)
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    assert world.in_force == "plans/first"  # the proposal is still being searched
    world.plans["plans/p1"].state = plan_pb2.PLAN_STATE_READY
    world.plans["plans/p1"].result.replicas[0].rate_rps = 1.5
    world.pass_s(5)
    assert world.in_force == "plans/p1"
    world.pass_s(1000)
    world.set("b")
    world.pass_s(310)
    assert [reason for _, reason in world.proposed][1:] == [
        "For 300 s b is available but not used by the plan in force."
    ]
    world.plans["plans/p2"].state = plan_pb2.PLAN_STATE_READY
    world.pass_s(5)
    assert world.in_force == "plans/p2"


@pytest.mark.parametrize(
    "state", [plan_pb2.PLAN_STATE_INFEASIBLE, plan_pb2.PLAN_STATE_FAILED, plan_pb2.PLAN_STATE_READY]
)
def test_what_is_not_better_is_not_put_in_force(state: plan_pb2.PlanState.ValueType) -> None:
    world = World(mode=cluster_pb2.REACTION_MODE_AUTOMATIC)
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    world.plans["plans/p1"].state = state  # as many replicas as the plan in force has without b
    world.pass_s(1000)
    assert world.in_force == "plans/first"
    assert len(world.proposed) == 1


def test_a_proposal_for_what_is_no_more_is_withdrawn_for_the_next_one() -> None:
    world = World()
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    world.set("c", LOST)
    world.pass_s(310)
    assert world.withdrawn == ["plans/p1"]
    assert [reason for _, reason in world.proposed][1:] == ["For 300 s b, c are gone."]


@pytest.mark.parametrize("is_solved", [True, False])
def test_a_takeover_goes_on_with_the_proposal_that_is_stored(is_solved: bool) -> None:
    """In the past every takeover made another one for the same node, and the earlier ones stayed for ever."""
    world = World()
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    if is_solved:
        world.plans["plans/p1"].state = plan_pb2.PLAN_STATE_READY
    for _ in range(2):
        world.take_over()
        world.pass_s(20)
        world.plans["plans/p1"].state = plan_pb2.PLAN_STATE_READY
        world.set("b", LOST)
        world.pass_s(1000)
    assert (len(world.proposed), world.withdrawn) == (1, [])
    world.set("b")
    world.pass_s(1000)
    assert (len(world.proposed), world.withdrawn) == (1, ["plans/p1"])


def test_a_takeover_withdraws_what_is_outdated_and_all_proposals_but_the_newest() -> None:
    world = World()
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    world.plans["plans/p0"] = plan_on("a", name="plans/p0")
    world.plans["plans/p1"].state = plan_pb2.PLAN_STATE_READY
    world.take_over()
    world.pass_s(5)
    assert world.withdrawn == ["plans/p0"]
    world.set("b")  # it comes back under the new leader
    world.pass_s(5)
    assert world.withdrawn == ["plans/p0", "plans/p1"]
    assert len(world.proposed) == 1


def test_a_takeover_activates_a_proposal_of_the_term_before() -> None:
    world = World(mode=cluster_pb2.REACTION_MODE_AUTOMATIC)
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    world.take_over()
    world.set("b", LOST)
    world.plans["plans/p1"].state = plan_pb2.PLAN_STATE_READY
    world.plans["plans/p1"].result.replicas[0].rate_rps = 1.5
    world.pass_s(5)
    assert world.in_force == "plans/p1"
    world.pass_s(1000)
    assert len(world.proposed) == 1


def test_a_cluster_that_forbids_it_gets_no_proposal() -> None:
    world = World(mode=cluster_pb2.REACTION_MODE_OFF)
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(1000)
    assert world.proposed == []


def test_a_proposal_that_cannot_be_made_now_is_made_later() -> None:
    world = World(error=ServiceError(Reason.ERROR_REASON_SOLVER_QUEUE_FULL, "full", retry_after_s=7))
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    world.error = None
    world.pass_s(10)
    assert len(world.proposed) == 1


def test_gpus_on_which_the_engine_does_not_run_are_a_reason_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    why = "vllm needs compute capability 7.5 or higher for any model, P100-PCIe-16GB (Pascal) has 6"
    world = World(error=InvalidProblemError(why))
    world.pass_s(1)
    world.set("b", LOST)
    world.pass_s(310)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert f"no proposal for {CLUSTER}: {why}" in caplog.text
    world.error = None
    world.set("b")
    world.set("c", LOST)
    world.pass_s(700)
    assert len(world.proposed) == 1


def test_a_replica_whose_dense_path_lost_a_node_serves_nothing() -> None:
    before = plan_on("a", "b")
    assert is_better(plan_on("a", name="plans/p", rate_rps=1.02), before, {"a"})
    assert not is_better(plan_on("a", name="plans/p", rate_rps=1.0), before, {"a"})
    assert not is_better(plan_on("a", name="plans/p", rate_rps=1.02), before, {"a", "b"})


def keeping(plan: plan_pb2.Plan, kept_rps: float) -> plan_pb2.Plan:
    """Return the plan with the rate that it keeps as its value."""
    plan.result.value, plan.result.unit = kept_rps, "requests/s"
    return plan


def test_a_plan_counts_by_the_rate_that_it_keeps() -> None:
    before = keeping(plan_on("a", rate_rps=2.0), 1.0)
    assert not is_better(keeping(plan_on("a", rate_rps=3.9), 0.9), before, {"a"})
    assert is_better(keeping(plan_on("a", rate_rps=1.1), 1.05), before, {"a"})
    assert not is_better(keeping(plan_on("a", rate_rps=100.0), 0.0), before, {"a"})


def split_plan(name: str = "plans/p", *, routed_rps: float = 2.0) -> plan_pb2.Plan:
    """Two prefill replicas on a and b, and a decode replica on c."""
    plan = plan_on("a", "b", "c", name=name, rate_rps=1.0)
    for replica, role in zip(plan.result.replicas, (2, 2, 3), strict=True):
        replica.role = replica_pb2.ReplicaRole.ValueType(role)
    plan.result.replicas[2].rate_rps = 5.0
    plan.result.kv_routes.add(prefill=0, decode=2, rate_rps=routed_rps / 2)
    plan.result.kv_routes.add(prefill=1, decode=2, rate_rps=routed_rps / 2)
    return plan


def test_a_split_plan_serves_what_its_routes_carry_and_not_what_its_replicas_could() -> None:
    unified = plan_on("a", "b")
    assert not is_better(split_plan(), unified, {"a", "b", "c"})
    assert is_better(split_plan(routed_rps=2.1), unified, {"a", "b", "c"})
    assert is_better(plan_on("a", rate_rps=2.1), split_plan(), {"a", "b", "c"})


def test_what_is_left_of_a_split_plan_is_its_weaker_side() -> None:
    assert is_better(plan_on("a", rate_rps=1.02), split_plan(), {"a", "c"})
    assert not is_better(plan_on("a", rate_rps=1.0), split_plan(), {"a", "c"})
    assert is_better(plan_on("a", rate_rps=0.01), split_plan(), {"a", "b"})
