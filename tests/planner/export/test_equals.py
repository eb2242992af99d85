"""Equal replicas are one object in Kubernetes, tied to nodes only where the plan needs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from hetis.formats.catalogue import find_gpu
from hetis.planner.export import ExportTarget
from hetis.planner.export.equals import PRODUCTS
from hetis.solver.plan import Plan
from tests.planner.export import reading
from tests.planner.export.exporting import IN_CLUSTERS, exported
from tests.planner.export.plans import PLANS, made_of, on, replica
from tests.planner.export.test_schemas import check_object

GPU = "A100-SXM-80GB"


def four(*, fleet: bool = True, **more: Any) -> Plan:
    """Return a plan of four equal replicas on two nodes; ``more``: fields of a third node of the fleet."""
    ones = [replica(on(f"{node}/{i}", f"{node}/{i + 1}", tp=2, gpu=GPU), rate=2.0) for node in "ab" for i in (0, 2)]
    plan = made_of(*ones)
    nodes = [{"name": node, "gpus": [{"type": GPU, "count": 4}]} for node in "ab"]
    cluster = {"apiVersion": "hetis/v1", "kind": "Cluster", "name": "c", "nodes": [*nodes, *([more] if more else [])]}
    cluster["network"] = {"bandwidth": "100Gbps", "latency": "20us"}
    documents = {**plan.inputs["documents"], **({"cluster": cluster} if fleet else {})}
    return replace(plan, inputs={"documents": documents})


def pods(plan: Plan, target: ExportTarget) -> list[tuple[int, dict[str, Any]]]:
    """Return the copies and node affinity of each object that runs engines."""
    made = exported(plan, target)
    assert made.rate == pytest.approx(plan.served_rate())
    objects = [one for path, text in made.files.items() if path.startswith("values") for one in [yaml.safe_load(text)]]
    found = [(one["decode"]["replicas"], one["decode"]["extraConfig"]["affinity"]) for one in objects]
    for one in reading.manifests({path: text for path, text in made.files.items() if not path.startswith("values")}):
        check_object(one)
        spec = one.get("spec", {})
        match one["kind"]:
            case "StatefulSet":
                found.append((spec["replicas"], spec["template"]["spec"]["affinity"]))
            case "LeaderWorkerSet":
                template = spec["leaderWorkerTemplate"]["workerTemplate"]
                found.append((spec["replicas"], template["spec"]["affinity"]))
            case "LLMInferenceService":
                found.append((spec["replicas"], spec["template"]["affinity"]))
            case "DynamoGraphDeployment":
                engines = spec["components"][1:]
                found += [(each["replicas"], each["podTemplate"]["spec"]["affinity"]) for each in engines]
    return [(copies, affinity["nodeAffinity"]) for copies, affinity in found]


def terms(affinity: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return found


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_equal_replicas_are_copies_on_any_node_of_their_type(target: ExportTarget) -> None:
    [(copies, affinity)] = pods(four(), target)
    assert copies == 4
    label = {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-A100-SXM4-80GB"]}
    assert terms(affinity) == [{"matchExpressions": [label]}]
    made = exported(four(), target)
    assert "router.yaml" not in made.files, "one Service is in front of all"
    assert "| r0, r1, r2, r3 | unified |" in made.files["README.md"]


@pytest.mark.parametrize(
    "plan",
    [
        four(fleet=False),
        four(name="mixed", gpus=[{"type": GPU, "count": 2}, {"type": "L4", "count": 2}]),
        four(name="shared", resource="nvidia.com/gpu.shared", gpus=[{"type": "L4", "count": 2}]),
    ],
)
def test_copies_stay_on_the_plans_nodes_where_others_of_their_type_differ(plan: Plan) -> None:
    [(copies, affinity)] = pods(plan, ExportTarget.KUBERNETES)
    assert copies == 4
    by_product = "shared" in str(plan.inputs["documents"].get("cluster"))  # it is of another type
    nodes = [field["values"] for term in terms(affinity) for field in term.get("matchFields", [])]
    assert nodes == ([] if by_product else [["a"], ["b"]])


def test_replicas_beside_pods_of_another_size_stay_on_their_nodes() -> None:
    plan = four()
    small = replica(on("b/2", gpu=GPU), rate=1.0)
    found = pods(replace(plan, replicas=(*plan.replicas[:3], small)), ExportTarget.KUBERNETES)
    nodes = [[field["values"][0] for term in terms(one) for field in term["matchFields"]] for _, one in found]
    assert [copies for copies, _ in found] == [2, 1, 1]
    assert nodes == [["a"], ["b"], ["b"]]


def test_replicas_that_differ_are_objects_of_their_own() -> None:
    assert [copies for copies, _ in pods(PLANS["unlike replicas"], ExportTarget.KUBERNETES)] == [1, 1, 1]


@pytest.mark.parametrize("gpu", PRODUCTS)
def test_product_labels_name_the_types_of_the_catalogue(gpu: str) -> None:
    assert find_gpu(PRODUCTS[gpu].replace("-", " ")).gpu.name == gpu
