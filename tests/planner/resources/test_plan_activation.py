"""The store decides which plan is active, with a fake fleet that carries it out."""

from __future__ import annotations

import uuid
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from hetis.formats.documents import dump
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.use_cases.place import make_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.solver.budget import Budget, silent
from hetis.solver.plan import ObjectiveKind, Plan, Role
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2, plan_pb2, replica_pb2
from hetis.v1 import plan_service_pb2 as pb2
from tests.planner.resources.planned import PAPER, Planner, make_cluster, planner_in
from tests.planner.resources.served import refused

KEEP, START, DRAIN = pb2.TRANSITION_KIND_KEEP, pb2.TRANSITION_KIND_START, pb2.TRANSITION_KIND_DRAIN
ACTIVATING, ACTIVE = plan_pb2.ACTIVATION_STATE_ACTIVATING, plan_pb2.ACTIVATION_STATE_ACTIVE
INACTIVE, FAILED = plan_pb2.ACTIVATION_STATE_INACTIVE, plan_pb2.ACTIVATION_STATE_FAILED


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Plans of the paper's cluster: small replicas of various types on all of it, and one on the A100s."""
    file = tmp_path_factory.mktemp("cluster") / "paper.yaml"
    file.write_bytes(PAPER)

    def solve(model: str, kind: ObjectiveKind = ObjectiveKind.GOODPUT) -> Plan:
        loaded = load_inputs(cluster=str(file), model=model, workload="azure_conv_2023")
        goal = objective(kind, ttft_s=None, tpot_s=None, demand_rps=None)
        settings = PlacementSettings(roles=(Role.UNIFIED,), engine=engine_rules(None, "hetis"))
        return make_plan(loaded, settings.problem(loaded.inputs, goal), settings, budget=Budget(), report=silent).plan

    return {
        "large": solve("Llama-2-70B"),
        "small": solve("Llama-2-7B"),
        "fast": solve("Llama-2-70B", ObjectiveKind.THROUGHPUT),
    }


async def import_plan(planner: Planner, plan_id: str, plan: Plan) -> None:
    document = document_pb2.Document(content=dump(plan, "json").encode())
    wanted = plan_pb2.Plan(cluster="clusters/paper", imported=document)
    await planner.call("CreatePlan", pb2.CreatePlanRequest(plan_id=plan_id, plan=wanted))


def activate(planner: Planner, name: str, **fields: Any) -> Coroutine[Any, Any, pb2.ActivatePlanResponse]:
    return planner.call("ActivatePlan", pb2.ActivatePlanRequest(name=f"plans/{name}", **fields))


def roll_back(planner: Planner, name: str, **fields: Any) -> Coroutine[Any, Any, pb2.RollbackPlanResponse]:
    return planner.call("RollbackPlan", pb2.RollbackPlanRequest(name=f"plans/{name}", **fields))


async def set_activation(planner: Planner, name: str, activation: plan_pb2.ActivationState.ValueType) -> None:
    """Record that replicas are up or failed, as the fleet does."""
    await planner.store.write(
        lambda tx: tx.plans.update(replace(tx.plans.require(f"plans/{name}"), activation=activation))
    )


async def replicas(planner: Planner) -> dict[str, str]:
    """Return the plan of each replica."""
    records = await planner.store.read(lambda reader: reader.replicas.all(cluster="clusters/paper"))
    return {record.name: record.plan for record in records}


def kinds(response: Any) -> list[tuple[int, int]]:
    return sorted({(step.wave, step.kind) for step in response.steps})


async def test_a_plan_comes_into_force_in_one_transaction(tmp_path: Path, plans: dict[str, Plan]) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        dry = await activate(planner, "a", validate_only=True)
        assert await replicas(planner) == {}
        done = await activate(planner, "a")
        assert done.steps == dry.steps
        assert kinds(done) == [(1, START)]
        assert all(step.load_bytes > 100e9 for step in done.steps)  # 70 billion weights of two bytes
        assert done.plan.activation == ACTIVATING
        assert done.plan.activation_progress.num_starting == len(done.steps) == len(plans["large"].replicas)
        assert await replicas(planner) == {step.replica: "plans/a" for step in done.steps}
        record = (await planner.store.read(lambda reader: reader.replicas.all()))[0]
        assert record.state == replica_pb2.REPLICA_STATE_STARTING
        assert record.body.primary_node == record.body.nodes[0] == "a100"
        assert record.body.model_digest.startswith("sha256:")
        cluster = await planner.store.read(lambda reader: reader.clusters.require("clusters/paper"))
        assert (cluster.active_plan, cluster.earlier_plan, cluster.version) == ("plans/a", "", 2)
        assert planner.fleet.changed[-1] == "clusters/paper"
        again = await activate(planner, "a")
        assert (again.plan, len(again.steps)) == (done.plan, 0)
        in_use = await refused(planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/a")))
        assert in_use.reason == "RESOURCE_IN_USE"


async def test_what_the_next_plan_contains_goes_on_and_rolling_back_finds_it_again(
    tmp_path: Path, plans: dict[str, Plan]
) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        await import_plan(planner, "same", replace(plans["large"], inputs=dict(plans["large"].inputs) | {"seed": 7}))
        await import_plan(planner, "b", plans["small"])
        await activate(planner, "a")
        busy = await refused(activate(planner, "b"))
        assert (busy.code, busy.reason) == (grpc.StatusCode.ABORTED, "ACTIVATION_IN_PROGRESS")
        assert busy.metadata == {"cluster": "clusters/paper", "plan": "plans/a"}
        await set_activation(planner, "a", ACTIVE)
        kept = await activate(planner, "same")
        assert kinds(kept) == [(1, KEEP)]
        assert set((await replicas(planner)).values()) == {"plans/same"}
        await set_activation(planner, "same", ACTIVE)

        moved = await activate(planner, "b", request_id=(moved_id := str(uuid.uuid4())))
        assert {kind for _, kind in kinds(moved)} == {START, DRAIN}
        assert (await planner.get("plans/same")).activation == INACTIVE
        back = await roll_back(planner, "b", request_id=(request_id := str(uuid.uuid4())))
        assert back.plan.name == "plans/same"
        assert (1, KEEP) in kinds(back)  # it has not stopped yet, and need not
        assert await roll_back(planner, "b", request_id=request_id) == back
        twice = await refused(roll_back(planner, "b"))
        assert twice.reason == "PLAN_STATE"
        nowhere = await refused(roll_back(planner, "same"))
        assert (nowhere.reason, nowhere.metadata) == (
            "NO_EARLIER_PLAN",
            {"cluster": "clusters/paper", "plan": "plans/same"},
        )
        await planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/b"))
        assert await activate(planner, "b", request_id=moved_id) == moved


async def test_a_plan_that_failed_to_come_up_is_tried_again_and_never_gone_back_to(
    tmp_path: Path, plans: dict[str, Plan]
) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        for plan_id, kind in (("a", "large"), ("b", "small"), ("c", "fast")):
            await import_plan(planner, plan_id, plans[kind])
        await activate(planner, "a")
        await set_activation(planner, "a", ACTIVE)
        await activate(planner, "b")
        await set_activation(planner, "b", FAILED)
        assert (await activate(planner, "b")).plan.activation == ACTIVATING
        await set_activation(planner, "b", FAILED)
        await activate(planner, "c")
        cluster = await planner.store.read(lambda reader: reader.clusters.require("clusters/paper"))
        assert (cluster.active_plan, cluster.earlier_plan) == ("plans/c", "plans/a")
        await planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/a"))
        assert (await refused(roll_back(planner, "c"))).reason == "NO_EARLIER_PLAN"


async def test_a_first_plan_of_which_nothing_serves_is_withdrawn(tmp_path: Path, plans: dict[str, Plan]) -> None:
    """In the past neither the cluster nor another plan could be used until the activation had failed.

    And a plan that had been ACTIVE once stayed so for ever when all its nodes were gone.
    """
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        await import_plan(planner, "b", plans["small"])
        for activation in (ACTIVATING, FAILED, ACTIVE):
            await activate(planner, "a")
            await set_activation(planner, "a", activation)
            if activation == ACTIVATING:
                busy = await refused(activate(planner, "b"))
                assert busy.message == (
                    "plans/a is being activated in clusters/paper: CancelPlan withdraws its activation, since nothing"
                    " serves"
                )
            for call in (
                roll_back(planner, "a"),
                planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/a")),
            ):
                assert "CancelPlan withdraws its activation" in (await refused(call)).message
            request = pb2.CancelPlanRequest(name="plans/a", request_id=str(uuid.uuid4()))
            done = await planner.call("CancelPlan", request)
            assert (done.plan.state, done.plan.activation) == (plan_pb2.PLAN_STATE_READY, INACTIVE)
            assert done.plan.activation_progress == plan_pb2.ActivationProgress()
            assert await planner.call("CancelPlan", request) == done
            cluster = await planner.store.read(lambda reader: reader.clusters.require("clusters/paper"))
            assert cluster.active_plan == ""
            assert set((await replicas(planner)).values()) == {""}  # no plan's, so that the fleet stops them
            assert planner.fleet.changed[-1] == "clusters/paper"
        assert (await activate(planner, "b")).plan.activation == ACTIVATING
        await planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/a"))


@pytest.mark.parametrize("activation", [ACTIVATING, ACTIVE])
@pytest.mark.parametrize("state", ["SERVING", "DEGRADED", "DRAINING"])
async def test_an_activation_of_which_something_serves_is_not_withdrawn(
    tmp_path: Path, plans: dict[str, Plan], state: str, activation: plan_pb2.ActivationState.ValueType
) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        name = (await activate(planner, "a")).steps[0].replica
        up = replica_pb2.ReplicaState.Value(f"REPLICA_STATE_{state}")
        await planner.store.write(lambda tx: tx.replicas.update(replace(tx.replicas.require(name), state=up)))
        await set_activation(planner, "a", activation)
        before = await planner.get("plans/a")
        assert (await planner.call("CancelPlan", pb2.CancelPlanRequest(name="plans/a"))).plan.etag == before.etag
        assert (await planner.get("plans/a")).activation == activation


async def test_an_activation_with_an_earlier_plan_is_not_withdrawn(tmp_path: Path, plans: dict[str, Plan]) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        await import_plan(planner, "b", plans["small"])
        await activate(planner, "a")
        await set_activation(planner, "a", ACTIVE)
        await activate(planner, "b")
        assert (await planner.call("CancelPlan", pb2.CancelPlanRequest(name="plans/b"))).plan.activation == ACTIVATING


async def test_only_what_was_looked_at_is_put_in_force(tmp_path: Path, plans: dict[str, Plan]) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        stale = await refused(activate(planner, "a", etag="v7"))
        assert (stale.reason, stale.metadata) == ("ETAG_MISMATCH", {"name": "plans/a", "etag": "v1"})
        stale = await refused(activate(planner, "a", cluster_etag="v7"))
        assert stale.metadata["name"] == "clusters/paper"
        await activate(planner, "a", etag="v1", cluster_etag="v1")


@pytest.mark.parametrize("num_changes", [1, 4, 5])
async def test_an_activation_is_prepared_again_if_its_cluster_is_changed_meanwhile(
    tmp_path: Path, plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch, num_changes: int
) -> None:
    changes = iter(range(num_changes))

    async def prepare(self: PlanActivation, name: str) -> Any:
        target = await prepared(self, name)
        for number in changes:
            text = PAPER.replace(b"20us", f"2{number}0us".encode())
            cluster = cluster_pb2.Cluster(name="clusters/paper", document=document_pb2.Document(content=text))
            await planner.clusters.update(cluster_service_pb2.UpdateClusterRequest(cluster=cluster))
            break
        return target

    prepared = PlanActivation._target
    monkeypatch.setattr(PlanActivation, "_target", prepare)
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["small"])
        if num_changes < 5:
            assert (await activate(planner, "a")).plan.activation == ACTIVATING
        else:
            assert (await refused(activate(planner, "a"))).reason == "ETAG_MISMATCH"


async def test_gpus_that_are_gone_since_are_all_named(tmp_path: Path, plans: dict[str, Plan]) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await import_plan(planner, "a", plans["large"])
        await planner.store.write(lambda tx: tx.clusters.delete("clusters/paper"))
        await make_cluster(planner.clusters, "paper", PAPER.replace(b"name: a100,", b"name: h100,"))
        missing = await refused(activate(planner, "a"))
        assert (missing.code, missing.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INVENTORY_MISMATCH")
        assert missing.metadata == {"cluster": "clusters/paper", "missing_gpus": "4"}
