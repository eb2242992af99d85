"""KServe: an LLMInferenceService for each replica, or pair of prefill and decode, with its weight in the route."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hetis.planner.export.groups import PodGroup
from hetis.planner.export.kubernetes import check_cluster_options, mixed_nodes, written_for_cluster
from hetis.planner.export.lws import LEADER, groupable
from hetis.planner.export.replicas import Launchable, LaunchableReplica, paired
from hetis.planner.export.routing import shares_of, weight
from hetis.planner.export.written import Written
from hetis.planner.export.yaml_files import documents
from hetis.solver.plan import Role

_API = "serving.kserve.io/v1alpha2"
_COMPONENT, _NAME = "app.kubernetes.io/component", "app.kubernetes.io/name"
_WORKER, _PREFILL_WORKER = "llminferenceservice-workload-worker", "llminferenceservice-workload-worker-prefill"
# A service on several nodes whose stages form a pipeline needs a preset that KServe does not ship.
_PRESETS = {Role.UNIFIED: "worker", Role.DECODE: "decode-worker", Role.PREFILL: "prefill-worker"}


def write_kserve(launchable: Launchable) -> Written:
    """Return a file for each service.

    Raises:
        NotExportableError: no replica can be a service, or options are missing.
    """
    check_cluster_options(launchable)
    launchable, left_out = groupable(launchable)
    launchable, pairs, alone = paired(launchable, "KServe")
    files, presets = dict[str, str](), dict[str, Any]()
    for number, one in launchable.replicas.items():
        if one.plan.role is Role.DECODE:
            continue
        files[f"{one.name}.yaml"] = documents(_objects(launchable, number, pairs))
        for each in (one, launchable.replicas.get(pairs.get(number, -1))):
            if each is not None and len(each.layout.servers) > 1:
                name = f"kserve-config-llm-{_PRESETS[each.plan.role]}-pipeline-parallel"
                presets[name] = _preset(launchable, name)
    if presets:
        files["presets.yaml"] = documents(presets.values())
    written = written_for_cluster(
        launchable, files, _HOW, not_carried=mixed_nodes(launchable), left_out={**left_out, **alone}
    )
    namespace = launchable.settings.namespace
    inside = f".{namespace}.svc" if namespace else ""
    fronts = {decode: prefill for prefill, decode in pairs.items()}
    endpoints = dict[int, str]()
    for number in launchable.replicas:
        service = _service(launchable, launchable.replicas[fronts.get(number, number)])
        endpoints[number] = f"{service}-kserve-workload-svc{inside}:8000"
    return replace(written, endpoints=endpoints)


def _service(launchable: Launchable, one: LaunchableReplica) -> str:
    return f"{launchable.settings.name}-{one.name}"


def _objects(launchable: Launchable, number: int, pairs: dict[int, int]) -> list[dict[str, Any]]:
    """Return the service, its attention workers, and the plugin's file."""
    one, settings = launchable.replicas[number], launchable.settings
    name, model = _service(launchable, one), one.serving.model
    served = settings.served_name or model
    main = launchable.replicas[pairs[number]] if one.plan.role is Role.PREFILL else one
    uri = f"pvc://{settings.model_claim}{model}" if settings.model_claim else f"hf://{model}"
    spec: dict[str, Any] = {
        "model": {"name": served, "uri": uri},
        # The engine gets the location of its model.
        "storageInitializer": {"enabled": False},
        "replicas": 1,
        **_workload(launchable, main, name, _WORKER),
        "router": {
            "gateway": {},
            "route": {"group": settings.name, "weight": weight(shares_of(launchable)[number])},
            "scheduler": {},
        },
    }
    if one.plan.role is Role.PREFILL:
        spec["prefill"] = {"replicas": 1, **_workload(launchable, one, name, _PREFILL_WORKER)}
    group = PodGroup(launchable, main, leader=LEADER, container="main")
    workers = [made for process in main.layout.attention_workers for made in group.objects.worker(process)]
    config = [group.objects.config()] if main.layout.workers else []
    whole = {"apiVersion": _API, "kind": "LLMInferenceService", "metadata": group.objects.metadata(name), "spec": spec}
    return [*config, *workers, whole]


def _workload(launchable: Launchable, one: LaunchableReplica, name: str, component: str) -> dict[str, Any]:
    """Return parallelism and pods of a replica; its GPUs are named where KServe passes the name on to all pods."""
    workers = {_NAME: name, _COMPONENT: component}
    group = PodGroup(launchable, one, leader=LEADER, container="main", worker_labels=workers)
    leader = group.leader()
    whole: dict[str, Any] = {
        "parallelism": {"tensor": one.layout.tensor_parallel, "pipeline": len(one.layout.servers)},
        "annotations": {"hetis/leader": leader["metadata"]["annotations"]["hetis/devices"]},
        "template": leader["spec"],
    }
    if group.size > 1:
        further = group.workers()
        whole["worker"] = further["spec"]
        whole["annotations"]["hetis/workers"] = further["metadata"]["annotations"]["hetis/devices"]
    else:  # KServe takes a pipeline to span several nodes
        del whole["parallelism"]["pipeline"]
    if one.layout.data_parallel > 1:
        copies = one.layout.data_parallel
        whole["parallelism"] |= {"data": copies, "dataLocal": copies, "expert": True}
    return whole


def _preset(launchable: Launchable, name: str) -> dict[str, Any]:
    where = {"namespace": launchable.settings.namespace} if launchable.settings.namespace else {}
    return {"apiVersion": _API, "kind": "LLMInferenceServiceConfig", "metadata": {"name": name, **where}, "spec": {}}


_HOW = """`kubectl apply -k .` in this folder, where LLMInferenceService is installed. A replica, or a pair of a
prefill and a decode replica, is a service; all are one group of KServe's route, with the plan's shares as weights. For
replicas on several nodes KServe wants presets that it does not ship: `presets.yaml` has them, empty."""
