"""Exports of plans as tests make and read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import yaml

from hetis.planner.export import ExportTarget
from hetis.planner.export.settings import ExportSettings
from hetis.planner.export.targets import ENGINES, Export, export_plan
from hetis.solver.plan import ClassShare, KvRoute, Plan
from tests.planner.export import reading
from tests.planner.export.plans import (
    DECODES,
    PREFILL,
    made_of,
    model_of,
    on,
    replica,
)

SETTINGS = ExportSettings(
    model="/models/tiny",
    served_name="tiny",
    hosts={node: f"10.0.0.{i}" for i, node in enumerate("abcdef", 1)},
    image="registry.example/engine:1",
    worker_image="registry.example/worker:1",
    worker_key_secret="worker",
    insecure=True,
)


READERS: Mapping[ExportTarget, Callable[[Mapping[str, str]], dict[str, reading.Read]]] = {
    ExportTarget.VLLM: reading.read_shell,
    ExportTarget.SGLANG: reading.read_shell,
    ExportTarget.COMPOSE: reading.read_compose,
    ExportTarget.KUBERNETES: reading.read_kubernetes,
    ExportTarget.LWS: reading.read_lws,
    ExportTarget.LLM_D: reading.read_llm_d,
    ExportTarget.KSERVE: reading.read_kserve,
    ExportTarget.DYNAMO: reading.read_dynamo,
    ExportTarget.RAY: reading.read_ray,
    ExportTarget.SLURM: reading.read_slurm,
}


def exported(plan: Plan, target: ExportTarget, **changes: Any) -> Export:
    engines = ENGINES.get(target, ())
    engine = engines[0] if len(engines) == 1 else None
    return export_plan(plan, model_of(plan), target, replace(SETTINGS, **{"engine": engine, **changes}))


ZONES = {"a": "east", "b": "west", "c": "east", "d": "west"}
NODES = [{"name": name, "zone": zone, "gpus": [{"type": "L4"}]} for name, zone in ZONES.items()]
SLOW = {"between": ["a", "d"], "bandwidth": "1Gbps", "latency": "20us"}
IN_CLUSTERS = {ExportTarget.KUBERNETES, ExportTarget.LWS, ExportTarget.LLM_D, ExportTarget.KSERVE, ExportTarget.DYNAMO}


def of_classes() -> Plan:
    """Return a plan with a pool for each of two classes, and one for all requests."""
    served = [(("short",), 4.0), ((), 2.0), (("long",), 1.0)]
    replicas = [replica(on(f"a/{i}"), rate=rate, classes=classes) for i, (classes, rate) in enumerate(served)]
    shares = (ClassShare(name="short", share=0.8, max_prompt_tokens=2_000), ClassShare(name="long", share=0.2))
    return replace(made_of(*replicas), classes=shares)


def labels_of_pods(files: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the labels of the pods that objects of Kubernetes and LeaderWorkerSets make, and those of the chart."""
    found = [yaml.safe_load(text)["modelArtifacts"]["labels"] for path, text in files.items() if "values-" in path]
    for one in reading.manifests({path: text for path, text in files.items() if "values-" not in path}):
        specs = [role["spec"] for role in one["spec"]["roles"]] if one["kind"] == "DisaggregatedSet" else []
        specs += [one["spec"]] if one["kind"] == "LeaderWorkerSet" else []
        templates = [one["spec"]["template"]] if one["kind"] == "StatefulSet" else []
        for group in (spec["leaderWorkerTemplate"] for spec in specs):
            templates += [group[key] for key in ("leaderTemplate", "workerTemplate") if key in group]
        found += [template["metadata"]["labels"] for template in templates]
    return found


def is_selected(labels: Mapping[str, str], selector: Mapping[str, Any]) -> bool:
    """Return whether a pod's labels meet a selector of Kubernetes."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    assert selector, "it would select every pod"
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms)
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(labels.get(term["key"]) in term["values"] for term in terms)


def ports_from(source: Mapping[str, str], to: Mapping[str, str], policies: list[Any]) -> list[Any]:
    """Return what a pod may reach of another: a list of ports for every policy that allows it; None: any port."""
    return [
        [port["port"] for port in rule["ports"]] if "ports" in rule else None
        for policy in policies
        if is_selected(to, policy["spec"]["podSelector"])
        for rule in policy["spec"]["ingress"]
        if "from" not in rule or any(is_selected(source, each["podSelector"]) for each in rule["from"])
    ]


def two_pairs(
    nodes: list[dict[str, Any]], network: Mapping[str, Any], *, gpu: str = "L4", keeps_zones: bool = False
) -> Plan:
    """Return a plan of two prefill replicas, on a and b, that each send to one decode replica, on c and d."""
    zones = {node: (ZONES[node],) if keeps_zones else () for node in "ab"}
    stage = {node: on(f"{node}/0", gpu=gpu if node in "bd" else "L4") for node in "abcd"}
    senders = [replace(PREFILL, stages=(stage[node],), in_flight=1, kv_zones=zones[node]) for node in "ab"]
    receivers = [replace(DECODES[0], stages=(stage[node],)) for node in "cd"]
    routes = tuple(KvRoute(prefill=i, decode=2 + i, rate=2.0) for i in range(2))
    plan = made_of(*senders, *receivers, routes=routes)
    fleet = {"apiVersion": "hetis/v1", "kind": "Cluster", "name": "four", "nodes": nodes}
    network = {"bandwidth": "100Gbps", "latency": "20us", **network}
    return replace(plan, inputs={"documents": {**plan.inputs["documents"], "cluster": {**fleet, "network": network}}})


def pods_in(value: Any) -> list[dict[str, Any]]:
    """Return the specs of all pods in an object, and in the values of llm-d's chart the part that is like one."""
    if isinstance(value, list):
        return [found for each in value for found in pods_in(each)]
    if not isinstance(value, dict):
        return []
    return [*([value] if "containers" in value else []), *(found for each in value.values() for found in pods_in(each))]


def containers_in(value: Any) -> list[dict[str, Any]]:
    """Return all containers in an object."""
    if isinstance(value, list):
        return [found for each in value for found in containers_in(each)]
    if not isinstance(value, dict):
        return []
    return [*value.get("containers", []), *(found for each in value.values() for found in containers_in(each))]
