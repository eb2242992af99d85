"""Proposals as stored."""

from __future__ import annotations

from pathlib import Path

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanSearches
from hetis.planner.resources.plans import Plans
from hetis.planner.resources.proposals import StoredPlacements
from hetis.v1 import plan_pb2
from tests.planner.resources.planned import Planner, planner_in


def placements_of(planner: Planner) -> StoredPlacements:
    documents = StoredPlans(planner.store)
    searches = PlanSearches(planner.store, planner.hubs, planner.pool)
    return StoredPlacements(
        planner.store,
        Plans(planner.store, planner.hubs, planner.fleet, searches, documents),
        planner.creation,
        PlanActivation(planner.store, planner.hubs, planner.fleet, DeclaredFleets(), documents),
        documents,
    )


async def test_a_proposal_is_made_read_with_its_replicas_put_in_force_and_withdrawn(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        placements = placements_of(planner)
        assert await placements.plan_in_force("clusters/paper") is None
        assert await placements.plan("plans/none") is None
        spec = plan_pb2.PlanSpec(model_name="Llama-2-70B", workload_name="azure_conv_2023", skip_verification=True)
        name = await placements.propose("clusters/paper", spec, "For 300 s b is gone.")
        await planner.solved(name)
        plan = await placements.plan(name)
        assert plan is not None
        assert (plan.origin, plan.proposal_reason) == (plan_pb2.PLAN_ORIGIN_PROPOSAL, "For 300 s b is gone.")
        assert plan.spec.model_name == "Llama-2-70B"
        assert plan.result.replicas
        assert await placements.plan(name) is plan  # the plan's document is parsed once
        await placements.activate(name)
        in_force = await placements.plan_in_force("clusters/paper")
        assert in_force is not None
        assert (in_force.name, in_force.activation) == (name, plan_pb2.ACTIVATION_STATE_ACTIVATING)
        other = await placements.propose("clusters/paper", spec, "For 300 s c is gone.")
        assert await placements.capacity_of(other) == frozenset()
        await planner.solved(other)
        assert await placements.open_proposals("clusters/paper") == [other]  # and not the one in force
        assert await placements.open_proposals("clusters/none") == []
        assert await placements.capacity_of(other) == {"a100", "p100", "r3090-0", "r3090-1"}
        await placements.withdraw(other)
        assert await placements.plan(other) is None
        await placements.withdraw(other)
